"""The flags of runs with tiny models."""

SIZE = ["--height", "64", "--width", "96", "--frame_buckets", "17", "--max_num_frames", "17"]
