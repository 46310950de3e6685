"""Shared by all packages: errors, files, text, logs, ranks, signals. Imports no other package of ours."""
