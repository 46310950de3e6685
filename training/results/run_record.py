"""Read what a run left in its folder, while it trains or years later; imports no torch."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from common.errors import UserError
from common.run_folder import (
    CONFIG_FILE,
    FACTS_FILE,
    LORA_FILE,
    METRICS_FILE,
    NOTES_FILE,
    RESULTS,
    STRENGTHS_FOLDER,
    VALIDATION_FOLDER,
)
from common.text_files import read_rows
from tracking.verdict import Points, Verdict, best_point, judge


RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
_RECENT = 20  # intervals whose speed tells the time left
_SILENT, _SHORTEST = 10, 600.0  # intervals between logged steps, and least seconds, without news of a killed run
_UNKNOWN = 360.0  # seconds of an interval before any is logged: the first one can take long

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder has it; everything but the metrics may be missing, as in runs of earlier versions."""

    folder: Path
    facts: Row  # of FACTS_FILE: what is trained on what, flags, versions, commands
    metrics: Sequence[Row]  # of METRICS_FILE, in the order of steps
    notes: Sequence[Row]  # of NOTES_FILE: {"time", "step"} and "state", "skipped" or "warning"
    videos: Mapping[str, Mapping[int, Path]]  # name of a validation video -> step -> file
    strengths: Mapping[float, Path]  # scale of the LoRA -> a video of the first prompt
    results: Sequence[str]  # names of the trained weights in the folder
    updated: datetime  # when the run had its last news

    @cached_property
    def flags(self) -> Row:
        """The values of all flags; of an earlier version's run only those that were passed."""
        return self.facts.get("flags") or read_flags(self.folder / CONFIG_FILE) or {}

    @property
    def step(self) -> int:
        """The optimizer steps that are logged."""
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def total_steps(self) -> int | None:
        """The steps of the complete run, if known."""
        return self.facts.get("total_steps")

    @property
    def state(self) -> Row:
        """How the run is: {"state": one of RUNNING and so on, "why": for a failure}."""
        return next((note for note in reversed(self.notes) if "state" in note), {"state": None})

    @property
    def warnings(self) -> list[Row]:
        """The warnings, in their order."""
        return [note for note in self.notes if "warning" in note]

    @property
    def skipped(self) -> list[Row]:
        """The steps that were skipped: {"skipped": step, "what": loss or gradient, "clips"}."""
        return [note for note in self.notes if "skipped" in note]

    def curve(self, name: str) -> Points:
        """Return the logged values of a name as (step, value); those that are not finite are NaN."""
        return [(row["step"], _number(row[name])) for row in self.metrics if name in row]

    def names(self, start: str) -> list[str]:
        """Return the names of values that begin so, in the order in which they were first logged."""
        return list(dict.fromkeys(name for row in self.metrics for name in row if name.startswith(start)))

    @cached_property
    def best(self) -> tuple[int, float] | None:
        """The step with the lowest validation loss, and the loss."""
        return best_point(self.curve("validation_loss"))

    @cached_property
    def verdict(self) -> Verdict | None:
        """What the losses say about the run."""
        return judge(self.curve("validation_loss"), self.curve("loss"))

    @property
    def seconds_left(self) -> float | None:
        """The seconds that the remaining steps take at the speed of the last ones; None if unknown."""
        speeds = [value for _, value in self.curve("throughput/step_seconds")[-_RECENT:]]
        return median(speeds) * (self.total_steps - self.step) if speeds and self.total_steps else None

    @property
    def was_killed(self) -> bool:
        """Whether the run did not end but is silent for so long that it was probably killed."""
        points = self.curve("throughput/step_seconds")
        steps = [0, *(step for step, _ in points)]
        longest = max((one * (step - before) for before, (step, one) in zip(steps, points, strict=False)), default=0)
        limit = max(_SILENT * (longest or _UNKNOWN), _SHORTEST)
        return self.state["state"] == RUNNING and time.time() - self.updated.timestamp() > limit

    @property
    def seconds(self) -> float:
        """The seconds from each start to its end, or to the last news."""
        total, started, news = 0.0, None, None
        for note in [*self.notes, {"state": STOPPED, "time": self.updated.isoformat()}]:
            at = datetime.fromisoformat(note["time"])
            if "state" in note and started is not None:
                # A run that starts again without having ended was killed after its last news.
                total += ((news if note["state"] == RUNNING else at) - started).total_seconds()
                started = None
            if note.get("state") == RUNNING:
                started = at
            news = at
        return max(total, 0.0)


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder; a UserError if it has no metrics. Damaged lines, files and facts are skipped."""
    metrics = [row for row in read_rows(folder / METRICS_FILE) if isinstance(row.get("step"), int)]
    facts = {name: fact for name, fact in next(read_rows(folder / FACTS_FILE), {}).items() if _is_fact(name, fact)}
    if not metrics and not facts:
        raise UserError(f"{folder} is not the folder of a run: it has no {METRICS_FILE}; pass the --output_dir of one")
    last = max((row["step"] for row in metrics), default=0)
    return RunRecord(
        folder,
        facts,
        metrics,
        [note for note in read_rows(folder / NOTES_FILE) if _is_time(note.get("time"))],
        _list_videos(folder / VALIDATION_FOLDER, last),
        _list_strengths(folder / STRENGTHS_FOLDER),
        [path.name for name in RESULTS[:3] for path in folder.glob(name)],
        last_news(folder),
    )


def last_news(folder: Path) -> datetime:
    """Return when a run last wrote what it is, a metric, a note or a validation video."""
    files = [folder / name for name in (METRICS_FILE, FACTS_FILE, NOTES_FILE)]
    files += folder.glob(f"{VALIDATION_FOLDER}/step-*/*.mp4")
    written = max((file.stat().st_mtime for file in files if file.is_file()), default=0)
    return datetime.fromtimestamp(written).astimezone()


def _is_fact(name: str, value: object) -> bool:
    """Return whether a fact has the type that pages need: a run may be newer, or its file was edited."""
    if name == "videos":
        return isinstance(value, list) and all(
            isinstance(video, dict)
            and isinstance(video.get("prompt"), str)
            and _is_target(video.get("target"))
            and _is_texts(video.get("control", {}))
            for video in value
        )
    if name in ("summary", "versions"):
        return _is_texts(value)
    if name in ("given", "start", "sample", "publish"):
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    types = {"flags": dict, "measured": dict, "total_steps": int, "output_dir": str, "revision": str}
    return isinstance(value, types.get(name, object))


def _is_target(value: object) -> bool:
    return _is_texts(value) and (not value or "caption" in value)


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _is_time(text: object) -> bool:
    with suppress(TypeError, ValueError):
        return datetime.fromisoformat(text).tzinfo is not None
    return False


def _list_videos(folder: Path, last_step: int) -> dict[str, dict[int, Path]]:
    """Return the videos of all validations up to a step; later ones are of before the run was resumed."""
    found = [(re.fullmatch(r"step-(\d+)", path.parent.name), path) for path in sorted(folder.glob("step-*/*.mp4"))]
    videos: dict[str, dict[int, Path]] = {}
    for step, path in sorted((int(match[1]), path) for match, path in found if match):
        if step <= last_step:
            videos.setdefault(path.stem, {})[step] = path
    return dict(sorted(videos.items()))


def _list_strengths(folder: Path) -> dict[float, Path]:
    files = (file for file in folder.glob("*.mp4") if re.fullmatch(r"\d+(\.\d+)?", file.stem))
    return dict(sorted((float(file.stem), file) for file in files))


def read_flags(file: Path) -> dict[str, Any] | None:
    """Return the flags of a config file of a run; None if it is missing, or changed into something else."""
    try:
        flags = yaml.safe_load(file.read_bytes())
    except (OSError, yaml.YAMLError):
        return None
    return flags if isinstance(flags, dict) else None


def has_lora(record: RunRecord, step: int) -> bool:
    """Return whether the LoRA of a validation was kept."""
    return (record.folder / VALIDATION_FOLDER / f"step-{step}" / LORA_FILE).is_file()
