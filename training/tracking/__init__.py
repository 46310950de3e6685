"""What a run reports while it trains: trackers, loss curve, progress, bad steps, throughput."""
