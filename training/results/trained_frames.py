"""Which frames the results of image-to-video training were given, from the files of their runs."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import yaml

from common.run_folder import CONFIG_FILE, CONFIG_TITLE, PIPELINE_FOLDER
from video.condition_frames import FIRST, parse_condition_frames


def find_trained_frames(results: Iterable[str | None], base: str | None) -> tuple[str, str] | None:
    """Return the condition frames of a result's training, and the result; None for one outside of its run's folder.

    They are in the `config.yaml` of a run, whose checkpoints, validations and pipeline are folders in it, or of a
    folder that convert_lora.py merged. A LoRA trained on first frames goes together with one for others.

    Args:
        results: LoRAs and transformers, paths or hub ids.
        base: the base model, which may be the pipeline of a run.
    """
    places = {one: (Path(one), *list(Path(one).parents)[:3]) for one in results if one and Path(one).exists()}
    if base and Path(base).resolve().name == PIPELINE_FOLDER:
        places[base] = (Path(base).resolve().parent,)
    found = [(frames, one) for one, folders in places.items() if (frames := _first_noted(folders))]
    return next((one for one in found if one[0] != FIRST), found[0] if found else None)


def _first_noted(folders: Iterable[Path]) -> str | None:
    for folder in folders:
        with suppress(OSError, ValueError, AttributeError, yaml.YAMLError):  # the user may have changed the file
            text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
            if text.startswith(f"# {CONFIG_TITLE}"):
                return parse_condition_frames((yaml.safe_load(text) or {}).get("condition_frames", FIRST))
    return None


def note_trained_frames(folder: Path, frames: str) -> None:
    """Write the condition frames of a merged result where `find_trained_frames` finds them."""
    text = f"# {CONFIG_TITLE}, as far as samples depend on them\ncondition_frames: {frames}\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
