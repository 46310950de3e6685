"""What the results of training are given besides prompts, from the files of their runs: frames, or a control."""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from common.run_folder import CONFIG_FILE, CONFIG_TITLE, PIPELINE_FOLDER
from video.condition_frames import FIRST, parse_condition_frames
from video.controls import KINDS
from video.frames import UNCUT, Cut


@dataclass(frozen=True)
class TrainedConditions:
    """What a result was trained to be given, and how that was cut from files."""

    frames: str = FIRST  # those of image-to-video
    takes_control: bool = False
    control: str | None = None  # how controls were computed from clips; None for clips that are controls
    cut: Cut = UNCUT


def find_trained_conditions(
    results: Iterable[str | None], base: str | None
) -> tuple[TrainedConditions, str] | tuple[None, None]:
    """Return the conditions of a result's training, and the result; None for one outside of its run's folder.

    They are in the `config.yaml` of a run, whose checkpoints, validations and pipeline are folders in it, or of a
    folder that convert_lora.py merged. A LoRA trained on first frames or on none goes together with one for others.

    Args:
        results: LoRAs and transformers, paths or hub ids.
        base: the base model, which may be the pipeline of a run, or a merged one.
    """
    places = {one: _places(one) for one in results if one}
    if base and Path(base).exists():
        folder = Path(base).resolve()
        places[base] = (folder, *([folder.parent] if folder.name == PIPELINE_FOLDER else []))
    found = [(noted, one) for one, folders in places.items() if (noted := _first_noted(folders))]
    special = (one for one in found if one[0].frames != FIRST or one[0].takes_control)
    return next(special, found[0] if found else (None, None))


def takes_control(result: str) -> bool | None:
    """Return whether a result was trained with controls; None for one outside of its run's folder."""
    noted = _first_noted(_places(result))
    return None if noted is None else noted.takes_control


def _places(result: str) -> list[Path]:
    """Return the folders whose run may have trained a result, which may be a link or a path from inside the run."""
    paths = (Path(result).resolve(), Path(result).absolute()) if Path(result).exists() else ()
    return [place for path in paths for place in (path, *path.parents[:3])]


def _first_noted(folders: Iterable[Path]) -> TrainedConditions | None:
    for folder in folders:
        # The user may have changed the file.
        with suppress(OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
            text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
            if text.startswith(f"# {CONFIG_TITLE}"):
                return _parse(text)
    return None


def _parse(text: str) -> TrainedConditions:
    flags = yaml.safe_load(text) or {}
    frames, control = parse_condition_frames(flags.get("condition_frames", FIRST)), flags.get("compute_control")
    if control not in (None, *KINDS):
        raise ValueError(f"no such control: {control}")
    # Runs of other tasks do not have the flag, not even among the comments.
    takes_control = re.search(r"^(# )?compute_control:", text, re.MULTILINE) is not None
    return TrainedConditions(frames, takes_control, control, Cut.of(flags))


def note_trained_conditions(folder: Path, conditions: TrainedConditions) -> None:
    """Write the conditions of a merged result where `find_trained_conditions` finds them."""
    flags = {"condition_frames": conditions.frames} | asdict(conditions.cut)
    flags |= {"compute_control": conditions.control} if conditions.takes_control else {}
    text = f"# {CONFIG_TITLE}, as far as samples depend on them\n{yaml.safe_dump(flags, sort_keys=False)}"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
