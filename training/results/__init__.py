"""After the run: sampling, converting, the page of a run, the model card, the hub."""
