"""Write what a run is, what happens in it, and the page that shows both, into its folder; none of it can end a run."""

import json
import logging
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

from cli.schema import flag_values
from common.errors import first_line, one_line
from common.files import atomic_write, path_of_script
from common.hub_token import TOOLKIT, without_tokens
from common.run_folder import FACTS_FILE, NOTES_FILE, REPORT_FILE, TARGETS_FOLDER
from common.text_files import read_rows
from flags.settings import training_script
from planning.captions import nearest_caption
from planning.samples import PreparedData, TrainingData
from results.publish import upload_command
from results.run_page import write_run_page
from results.run_record import FAILED, FINISHED, RUNNING, STOPPED, last_news
from run.config import recorded_versions
from run.spec import RunSpec
from run.summary import sample_command
from validation.schedule import QUANTILES, LossSchedule, share_pairs
from validation.videos import Conditions
from video.io import read_frames
from video.preview import LONGER_SIDE, write_preview


logger = logging.getLogger(__name__)

_SECONDS = 30.0  # at least, between two pages, ...
_TIMES = 50  # ... and times what the last one took: 2% of the run
_MOST_CAPTIONS = 20_000  # that prompts are compared with, in less than a second


class RunReport(GeneralTracker):
    """A tracker that keeps the page of a run up to date, from the files in its folder, within a `with` statement.

    Args:
        describe: returns the facts of the run.
        trackers: those of the run, which this one joins.
        started: the step that the run starts after; above 0, the notes of an earlier start are continued.
        is_main: only the report of the main process does anything.
    """

    name = "run_report"
    requires_logging_directory = False
    tracker = None

    def __init__(
        self,
        folder: Path,
        describe: Callable[[], Mapping[str, Any]],
        trackers: list[GeneralTracker],
        started: int,
        *,
        is_main: bool = True,
    ):
        super().__init__()
        self.folder, self.describe, self.trackers, self.is_main = folder, describe, trackers, is_main
        self.started, self.notes = started, NoteHandler(folder / NOTES_FILE, started)
        self.next_at, self.has_failed = 0.0, False

    def __enter__(self) -> "RunReport":
        self._attempt(self._start)
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        state = FINISHED if error is None else STOPPED if isinstance(error, SystemExit) else FAILED
        state = STOPPED if isinstance(error, KeyboardInterrupt) else state
        why = {"why": one_line(without_tokens(f"{first_line(error)}"))} if state == FAILED else {}
        self._attempt(lambda: self.notes.write({"state": state} | why))
        self.update(at_once=True)
        self._attempt(self.notes.close)
        logging.getLogger().removeHandler(self.notes)

    def log(self, values: Mapping[str, Any], step: int | None = None, **options: Any) -> None:
        """Note that a step was logged; write the page, unless it is recent."""
        self.notes.step = self.notes.step if step is None else step
        self.update()

    def update(self, *, at_once: bool = False) -> None:
        """Write the page, unless it is recent."""
        started = time.monotonic()
        if at_once or started >= self.next_at:
            self._attempt(lambda: write_run_page(self.folder))
            now = time.monotonic()
            self.next_at = now + max(_SECONDS, _TIMES * (now - started))

    def _start(self) -> None:
        kept = list(read_rows(self.folder / NOTES_FILE)) if self.started else []
        # Without what is trained again; how it ended is kept for the time of the run.
        kept = [note for note in kept if note.get("step", 0) <= self.started or "state" in note]
        news = last_news(self.folder).isoformat(timespec="seconds")
        kept += [{"time": news, "step": self.started}] if kept else []  # tells when a killed run ended
        with atomic_write(self.folder / NOTES_FILE) as unfinished:
            unfinished.write_text("".join(f"{json.dumps(note)}\n" for note in kept), encoding="utf-8")
        self.notes.write({"state": RUNNING})
        logging.getLogger().addHandler(self.notes)
        self.trackers.append(self)
        facts = json.dumps(self.describe(), ensure_ascii=False, default=str)
        with atomic_write(self.folder / FACTS_FILE) as unfinished:
            unfinished.write_text(f"{without_tokens(facts)}\n", encoding="utf-8", errors="backslashreplace")

    def _attempt(self, function: Callable[[], object]) -> None:
        """Call a function; its first failure is a warning, because a page must not end a run."""
        try:
            if self.is_main:
                function()
        except Exception as error:
            if not self.has_failed:
                self.has_failed = True
                problem = one_line(f"{type(error).__name__}: {error}", 300)
                logger.warning("warning: %s cannot be kept up to date (%s)", self.folder / REPORT_FILE, problem)


class NoteHandler(logging.Handler):
    """Appends warnings, and records with a `noted` attribute, to a file of JSON lines with time and step."""

    def __init__(self, file: Path, step: int):
        super().__init__()
        self.file, self.step = file, step

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, if it is a warning; one of a data worker, too."""
        if record.levelno >= logging.WARNING:
            with suppress(OSError):  # a full disk has other warnings
                text = without_tokens(record.getMessage()).removeprefix("warning: ")
                self.write(getattr(record, "noted", {"warning": one_line(text)}))

    def write(self, note: Mapping[str, Any]) -> None:
        """Append a note."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        line = json.dumps({"time": now, "step": self.step} | note)
        with open(self.file, "a", encoding="utf-8") as file:  # not kept open: data workers would inherit it
            file.write(f"{line}\n")


def make_report(
    spec: RunSpec,
    total_steps: int,
    summary: Mapping[str, str],
    losses: LossSchedule | None,
    conditions: Conditions | None,
) -> RunReport:
    """Return the report of a run.

    Args:
        summary: what the run trains on what, as from `start_rows`.
        losses: when and on what the validation loss is measured; None if no clip is held out.
        conditions: of the validation videos, one for each prompt; controls are shown on the page.
    """

    def describe() -> dict[str, Any]:
        controls = conditions if conditions and spec.task.condition == "control" else ()
        facts = describe_run(spec, total_steps, summary, controls)
        return facts | {"measured": describe_measured(spec, losses)}

    is_main = spec.accelerator.is_main_process
    return RunReport(spec.output_dir, describe, spec.accelerator.trackers, spec.state.step, is_main=is_main)


def describe_run(
    spec: RunSpec, total_steps: int, summary: Mapping[str, str], controls: Sequence[Sequence[Image.Image]]
) -> dict[str, Any]:
    """Return the facts of a run that its page needs, as JSON takes them.

    The clips that its videos aim at, and the controls that they follow, are written into its folder.
    """
    settings = spec.settings
    launch = ["accelerate", "launch", "--config_file", "CONFIG"] if spec.accelerator.num_processes > 1 else ["python"]
    return {
        "task": spec.task.name,
        "method": settings.method,
        "total_steps": total_steps,
        "summary": dict(summary),
        "flags": {name: value for name, value in flag_values(settings).items() if name != "hub_token"}
        | {"seed": spec.state.seed}
        | ({"compute_control": spec.task.kind} if spec.task.name == "control-to-video" else {}),  # of prepared data
        "given": sorted(settings.given),
        "revision": read_revision(),
        "versions": {"Python": platform.python_version()} | recorded_versions(),
        "output_dir": str(spec.output_dir),
        "videos": describe_videos(spec, controls),
        "start": [*launch, path_of_script(training_script(spec.task.name, settings.method))],
        "sample": sample_command(spec, spec.output_dir),
        "publish": upload_command(spec.output_dir.resolve().name, spec.output_dir),
    }


def describe_measured(spec: RunSpec, losses: LossSchedule | None) -> dict[str, Any] | None:
    """Return what the validation losses depend on besides the weights: runs that share it can be compared."""
    if losses is None:
        return None
    numbers = share_pairs(losses.pairs, 0, 1)
    return {
        "clips": spec.data.held_out.fingerprint,
        "noise levels": {clip: sorted(QUANTILES[number] for number in numbers[clip]) for clip in sorted(numbers)},
        "base model": f"{spec.source.fingerprint()} {spec.configs.kind}",
        "task": {"name": spec.task.name} | dict(spec.task.settings),
        "reshape mode": spec.settings.clips.video_reshape_mode,
    }


def describe_videos(spec: RunSpec, controls: Sequence[Sequence[Image.Image]]) -> list[dict[str, Any]]:
    """Return each prompt, its control if it has one, and the training clip with the nearest caption."""
    data = spec.data.trained
    captions = data.clips.captions if isinstance(data, PreparedData) else data.captions
    captions = list(dict.fromkeys(map(str, captions)))
    few, videos = captions[:: len(captions) // _MOST_CAPTIONS + 1], []
    for number, prompt in enumerate(spec.settings.validation.prompts):
        nearest = prompt if prompt in captions else nearest_caption(prompt, few)
        target = {} if nearest is None else {"caption": nearest} | write_target(spec, data, nearest, number)
        videos.append({"prompt": prompt, "target": target})
        if controls:
            videos[-1]["control"] = write_copy(spec, f"{number:02d}-control.mp4", partial(_shrink, controls[number]))
    return videos


def write_target(spec: RunSpec, data: TrainingData, caption: str, number: int) -> dict[str, str]:
    """Write a small copy of the first training clip with a caption; return its names, or why it is missing."""
    if isinstance(data, PreparedData):
        origin = data.clips.origin_of(caption)
        if origin is None:
            return {"missing": "it is held out, or the prepared data does not name its file"}
        clip, first, last = Path(origin[0]), *origin[1:]
        if not clip.is_file():  # an index from elsewhere must not have a URL fetched
            return {"clip": str(clip), "missing": f"{clip} is not on this machine"}
        count = min(spec.settings.clips.max_num_frames, last - first + 1)
        indices = np.linspace(first, last, count).round().astype(int).tolist()
    else:
        sample = next(one for one in data.clips if one.clip.caption == caption)
        clip, indices = sample.clip.video, sample.frame_indices
    read = partial(read_frames, clip, indices, longer_side=LONGER_SIDE)
    return {"clip": str(clip)} | write_copy(spec, f"{number:02d}.mp4", read)


def write_copy(spec: RunSpec, name: str, read: Callable[[], Sequence[np.ndarray]]) -> dict[str, str]:
    """Write a small video of the frames that `read` returns; return its file, or why it is missing."""
    file = Path(TARGETS_FOLDER, name)
    try:
        frames = read()
        with atomic_write(spec.output_dir / file) as unfinished:
            write_preview(unfinished, frames, spec.video_fps)
    except (ValueError, OSError) as error:
        return {"missing": first_line(error)}
    return {"file": file.as_posix()}


def _shrink(frames: Sequence[Image.Image]) -> list[np.ndarray]:
    copies = [frame.copy() for frame in frames]
    for copy in copies:
        copy.thumbnail((LONGER_SIDE, LONGER_SIDE))
    return list(map(np.asarray, copies))


def read_revision() -> str | None:
    """Return the commit of this toolkit, and whether files differ from it; None without git."""
    git = ["git", "-C", str(TOOLKIT)]
    try:
        options = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **options).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}, with changes" if changed else commit
