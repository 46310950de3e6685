"""One file on disk: probe it, choose its frames, decode, write."""
