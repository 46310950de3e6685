"""Every flag, by subject: frozen dataclasses, and the parser built from them. Imports nothing heavy."""
