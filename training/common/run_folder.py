"""What a run leaves in its output folder, for the code that must not write over it."""

import re
from pathlib import Path


MANIFEST = "manifest.json"  # in each checkpoint, of which it is the last file written
STATE_FILE = "trainer_state.json"
CONFIG_FILE = "config.yaml"
CONFIG_TITLE = "The flags of a run as it was started"  # behind "# ", how such a file begins
LORA_FILE = "pytorch_lora_weights.safetensors"
TRANSFORMER_FOLDER = "transformer"
PIPELINE_FOLDER = "pipeline"
RESULTS = (LORA_FILE, TRANSFORMER_FOLDER, PIPELINE_FOLDER, "checkpoint-[0-9]*")


def list_results(output_dir: Path) -> list[str]:
    """Names of what an earlier run left in the folder."""
    return [path.name for name in RESULTS for path in sorted(output_dir.glob(name))]


def holds_other_config(output_dir: Path) -> bool:
    """Whether the folder has a file named as a run's own flags are, which no run has written."""
    file = output_dir / CONFIG_FILE
    return file.is_file() and not file.read_bytes().startswith(f"# {CONFIG_TITLE}".encode())


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run as (step, folder), oldest first; of each it is known only that it was finished."""
    return [(step, path) for step, path in _numbered(output_dir) if (path / MANIFEST).is_file()]


def list_unfinished(output_dir: Path) -> list[Path]:
    """What is named like a checkpoint and is none."""
    return [path for _, path in _numbered(output_dir) if not (path / MANIFEST).is_file()]


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*"))
    return sorted((int(match.group(1)), path) for match, path in matches if match)
