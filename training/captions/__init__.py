"""Captions written by a model or by a server."""
