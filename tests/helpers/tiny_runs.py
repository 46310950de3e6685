"""The flags of runs with tiny models."""

from pathlib import Path


SIZE = ["--height", "64", "--width", "96", "--frame_buckets", "17", "--max_num_frames", "17"]


def run_flags(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """Return the flags of a run on the demo clips without trackers, and `more`."""
    flags = ["--pretrained_model_name_or_path", str(model), "--data_root", str(data), "--output_dir", str(output)]
    return [*flags, "--caption_column", "prompts.txt", "--report_to", "none", *SIZE, *more]
