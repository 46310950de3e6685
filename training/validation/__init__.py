"""Sampled videos and the loss on held-out clips."""
