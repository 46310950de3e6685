"""Clips to latents and text embeddings on disk."""
