"""The files of a run in its output folder, for code that must not overwrite them."""

import re
from pathlib import Path


MANIFEST = "manifest.json"  # the last file written of each checkpoint
STATE_FILE = "trainer_state.json"
CONFIG_FILE = "config.yaml"
CONFIG_TITLE = "The flags of a run as it was started"  # the file begins with "# " and this
METRICS_FILE = "metrics.jsonl"  # what was logged, a line for each step
PICTURE_FILE = "loss.png"  # the curves of its losses
FACTS_FILE = "run_facts.json"  # what a run is, written when it starts
NOTES_FILE = "run_notes.jsonl"  # its warnings and skipped steps, when it started, and how it ended
REPORT_FILE = "report.html"  # shows all of it
LORA_FILE = "pytorch_lora_weights.safetensors"
TRANSFORMER_FOLDER = "transformer"
PIPELINE_FOLDER = "pipeline"
VALIDATION_FOLDER = "validation"  # with a folder step-N for each validation
# For each prompt the training clip with the nearest caption, and its control.
TARGETS_FOLDER = f"{VALIDATION_FOLDER}/targets"
STRENGTHS_FOLDER = f"{VALIDATION_FOLDER}/strengths"  # videos that the user samples with the LoRA, named by its scale
RESULTS = (LORA_FILE, TRANSFORMER_FOLDER, PIPELINE_FOLDER, "checkpoint-[0-9]*")


def list_results(output_dir: Path) -> list[str]:
    """Return the names of an earlier run's results in the folder."""
    return [path.name for name in RESULTS for path in sorted(output_dir.glob(name))]


def holds_other_config(output_dir: Path) -> bool:
    """Return whether the folder has a config file that no run has written."""
    file = output_dir / CONFIG_FILE
    return file.is_file() and not file.read_bytes().startswith(f"# {CONFIG_TITLE}".encode())


def list_checkpoints(output_dir: Path, *, finished: bool = True) -> list[tuple[int, Path]]:
    """Return the finished or unfinished checkpoints as (step, folder), oldest first; their content is not checked."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    numbered = sorted((int(match[1]), path) for match, path in matches if match)
    return [(step, path) for step, path in numbered if (path / MANIFEST).is_file() == finished]


def list_validated(output_dir: Path) -> list[tuple[int, Path]]:
    """Return the validations whose weights were kept as (step, folder), in the order of steps."""
    weights = (
        path for name in (LORA_FILE, TRANSFORMER_FOLDER) for path in output_dir.glob(f"{VALIDATION_FOLDER}/*/{name}")
    )
    matches = [(re.fullmatch(r"step-(\d+)", path.parent.name), path.parent) for path in weights]
    return sorted((int(match[1]), folder) for match, folder in matches if match)
