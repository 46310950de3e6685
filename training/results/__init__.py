"""After the run: sampling, the model card, the hub."""
