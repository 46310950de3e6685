"""Validation during training: sampled videos, and the loss on held-out clips."""
