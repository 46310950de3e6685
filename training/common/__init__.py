"""What every room may use: errors, files, text, logs, ranks, signals. Imports no other package of ours."""
