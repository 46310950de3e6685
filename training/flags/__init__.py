"""Every flag, by subject: frozen dataclasses. Imports nothing heavy."""
