"""The list of clips and what becomes of it: sources, tables, buckets, sampler, prepared folders, the plan."""
