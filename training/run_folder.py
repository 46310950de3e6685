"""What a run leaves in its output folder, for the code that must not write over it."""

import re
from pathlib import Path


STATE_FILE = "trainer_state.json"  # written last into a checkpoint
LORA_FILE = "pytorch_lora_weights.safetensors"
TRANSFORMER_FOLDER = "transformer"
PIPELINE_FOLDER = "pipeline"
RESULTS = (LORA_FILE, TRANSFORMER_FOLDER, PIPELINE_FOLDER, "checkpoint-[0-9]*")


def list_results(output_dir: Path) -> list[str]:
    """Names of what an earlier run left in the folder."""
    return [path.name for name in RESULTS for path in sorted(output_dir.glob(name))]


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, folder), oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE_FILE).is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)
