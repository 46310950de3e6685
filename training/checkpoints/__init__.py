"""Training state on disk: save, verify, rotate, resume."""
