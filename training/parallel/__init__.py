"""Many processes: agreement between ranks, DDP, DeepSpeed, FSDP, context parallelism."""
