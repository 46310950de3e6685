"""Every flag, by subject, and which of them go together. Imports nothing heavy."""
