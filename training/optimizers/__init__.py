"""The optimizers and what wraps them."""
