"""Lists of clips and how they become batches: sources, tables, buckets, sampler."""
