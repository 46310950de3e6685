"""The plan of a data set: what is used, in which bucket, what is skipped and why, and the flags to set."""
