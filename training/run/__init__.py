"""A run from its settings to its end: the checks, the set-up, the loop, the summary."""
