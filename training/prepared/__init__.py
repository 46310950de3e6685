"""A folder of prepared data: its settings, its index of samples, its tensor files."""
