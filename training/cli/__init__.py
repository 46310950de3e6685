"""The command line: the parser that is built from the flags, config files, value types. Imports nothing heavy."""
