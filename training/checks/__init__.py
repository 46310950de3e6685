"""Which flags go together, and what must exist before anything loads. Imports nothing heavy."""
