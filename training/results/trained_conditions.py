"""What the results of training are given besides prompts, from the files of their runs: frames, or a control."""

import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from common.run_folder import CONFIG_FILE, CONFIG_TITLE, PIPELINE_FOLDER
from flags.generation import AS_IT_IS
from video.condition_frames import FIRST, parse_condition_frames
from video.controls import KINDS
from video.frames import UNCUT, Cut


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedConditions:
    """What a result was trained to be given, and how that was cut from files."""

    frames: str = FIRST  # those of image-to-video
    takes_control: bool = False
    control: str | None = None  # how controls were computed from clips; None for clips that are controls
    cut: Cut = UNCUT
    loras: tuple[str, ...] = ()  # files that it was merged of, or that its training started from

    @property
    def flag(self) -> str:
        """The flag of generate.py that says it."""
        if self.takes_control:
            return f"--compute_control {self.control or AS_IT_IS}"
        return f"--condition_frames {self.frames}"


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
    return next(iter(_find_all(results, base)), (None, None))


def warn_of_conflicts(results: Sequence[str | None], base: str | None, *, is_chosen: bool = False) -> None:
    """Warn of results that do not go together, and of LoRAs that others or the base contain.

    Args:
        results, base: as for `find_trained_conditions`.
        is_chosen: whether flags say what samples are given, whatever the results were trained with.
    """
    found = _find_all(results, base)
    for conditions, one in [] if is_chosen else found:
        if conditions.flag not in (found[0][0].flag, TrainedConditions().flag):
            logger.warning(
                "warning: '%s' was trained with %s, not with %s as '%s', which samples follow; omit one of them",
                one,
                conditions.flag,
                found[0][0].flag,
                found[0][1],
            )
    held = {Path(file).resolve(): one for conditions, one in found for file in conditions.loras}
    for one in results:
        if one and Path(one).resolve() in held:
            within = held[Path(one).resolve()]
            logger.warning("warning: '%s' is in '%s' already, and would count twice; omit it", one, within)


def _find_all(results: Iterable[str | None], base: str | None) -> list[tuple[TrainedConditions, str]]:
    """Return the conditions of each result and of the base, if known; those on more than first frames precede."""
    places = {one: _places(one) for one in results if one}
    if base and Path(base).exists():
        folder = Path(base).resolve()
        places[base] = (folder, *([folder.parent] if folder.name == PIPELINE_FOLDER else []))
    found = [(noted, one) for one, folders in places.items() if (noted := _first_noted(folders))]
    return sorted(found, key=lambda one: one[0].flag == TrainedConditions().flag)


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
    started_from = flags.get("lora_weights")
    loras = (*([started_from] if started_from else []), *flags.get("merged_loras", []))
    return TrainedConditions(frames, takes_control, control, Cut.of(flags), loras)


def note_trained_conditions(folder: Path, conditions: TrainedConditions) -> None:
    """Write the conditions of a merged result where `find_trained_conditions` finds them."""
    flags = {"condition_frames": conditions.frames} | asdict(conditions.cut)
    flags |= {"compute_control": conditions.control} if conditions.takes_control else {}
    flags |= {"merged_loras": [str(Path(file).resolve()) for file in conditions.loras]}
    text = f"# {CONFIG_TITLE}, as far as samples depend on them\n{yaml.safe_dump(flags, sort_keys=False)}"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
