"""Experiment trackers that never end a run: what goes wrong in one is a warning, and training goes on without it."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from common.errors import UserError, one_line
from common.files import atomic_write
from common.hub_token import HubToken, without_tokens
from tracking.loss_curve import LossCurve


logger = logging.getLogger(__name__)

# By which the environment may say which run it is.
RUN_ID_VARIABLES = {"wandb": "WANDB_RUN_ID", "comet_ml": "COMET_EXPERIMENT_KEY"}
FINISH_SECONDS = 300.0  # that W&B may take at the end to send what it has kept back while its server was away


class SteadyTracker(GeneralTracker):
    """One of accelerate's trackers, with warnings in the place of its exceptions.

    The first failure is warned of, then the 10th, the 100th and so on: a server that is away for a night must not bury
    what else is logged.

    Args:
        tracker: that has started.
    """

    requires_logging_directory = False

    def __init__(self, tracker: GeneralTracker):
        self._started = tracker
        self._failures = 0
        super().__init__()

    @property
    def name(self) -> str:
        """The tracker's own."""
        return self._started.name

    @property
    def tracker(self) -> Any:
        """What the tracker's library calls a run, whose exceptions are not kept back."""
        return self._started.tracker

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Note the run's settings."""
        self._attempt(self._started.store_init_configuration, values)

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Note values by name."""
        self._attempt(self._started.log, values, step=step, **options)

    def log_images(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Note pictures by name."""
        self._attempt(self._started.log_images, values, step=step, **options)

    def finish(self) -> None:
        """Close the run."""
        self._attempt(self._started.finish)

    def _attempt(self, function: Callable[..., None], *arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except Exception as error:  # each tracker has exceptions of its own, and those of its network library
            self._failures += 1
            if self._failures in (10**power for power in range(9)):
                times = "failed" if self._failures == 1 else f"failed {self._failures} times, lastly"
                logger.warning("warning: %s %s (%s); training goes on", self.name, times, _described(error))


def start_trackers(
    accelerator: Accelerator, project: str, logging_dir: Path, flags: Mapping[str, Any], *, resumed_at: int | None
) -> None:
    """Open the trackers that the accelerator was made with, with the run's settings; the hub token stays out of them.

    A tracker that cannot be opened is left out with a warning; W&B without its server keeps its files, to be sent
    later.

    Args:
        accelerator: gets the trackers, on the main process.
        project: the runs' name in the tracker.
        logging_dir: folder of the trackers' files.
        flags: the run's, by name.
        resumed_at: the step that the run goes on after; its trackers go on as well. None for a new run.
    """
    if not accelerator.is_main_process:
        return
    settings = plain_settings(flags)
    for kind in map(str, accelerator.log_with):
        tracker = _open(kind, project, logging_dir, resumed_at)
        if tracker is not None:
            steady = SteadyTracker(tracker)
            accelerator.trackers.append(steady)
            steady.store_init_configuration(settings)


def keep_losses(accelerator: Accelerator, folder: Path, *, resumed_at: int | None) -> None:
    """Have the main process keep what is logged in the run's folder, and draw the losses there, whatever trackers
    there are."""
    if not accelerator.is_main_process:
        return
    try:
        accelerator.trackers.append(SteadyTracker(LossCurve(folder, resumed_at)))
    except (OSError, UserError) as error:
        logger.warning("warning: there will be no loss curve (%s)", _described(error))


def plain_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags as trackers take them, numbers and texts, without tokens."""
    return {
        name: value
        if isinstance(value, int | float)
        else without_tokens(str(list(value) if isinstance(value, tuple) else value))
        for name, value in flags.items()
        if name != "hub_token" and not isinstance(value, HubToken)
    }


def _open(kind: str, project: str, logging_dir: Path, resumed_at: int | None) -> GeneralTracker | None:
    """Start a tracker, W&B without its server if need be; None, with a warning, if it does not start."""
    places = [str(logging_dir)] if LOGGER_TYPE_TO_CLASS[kind].requires_logging_directory else []
    for last_resort in ({}, {"mode": "offline"}) if kind == "wandb" else ({},):
        try:
            logging_dir.mkdir(parents=True, exist_ok=True)
            options = _options(kind, logging_dir, resumed_at) | last_resort
            tracker = LOGGER_TYPE_TO_CLASS[kind](project, *places, **options)
            tracker.start()
        except Exception as error:  # each tracker has exceptions of its own
            logger.warning("warning: %s cannot be started (%s)", kind, _described(error))
        else:
            if last_resort:
                logger.warning("warning: %s keeps its files in %s; send them by `wandb sync`", kind, logging_dir)
            return tracker
    logger.warning("warning: going on without %s", kind)
    return None


def _options(kind: str, logging_dir: Path, resumed_at: int | None) -> dict[str, Any]:
    """What a tracker's library is told beside the project's name."""
    if kind == "tensorboard" and resumed_at is not None:
        # What the run logged after its checkpoint comes once more: TensorBoard forgets the first time.
        return {"purge_step": resumed_at + 1}
    if kind not in ("wandb", "comet_ml", "trackio"):
        return {}
    run_id = None if os.environ.get(RUN_ID_VARIABLES.get(kind, "")) else _run_id(kind, logging_dir, resumed_at)
    if kind == "wandb":
        return _wandb_options(logging_dir, run_id)
    if kind == "comet_ml":
        return {"experiment_key": run_id, "mode": "get_or_create"}
    return {"name": run_id, "resume": "allow"}


def _wandb_options(logging_dir: Path, run_id: str | None) -> dict[str, Any]:
    import wandb

    options: dict[str, Any] = {"dir": str(logging_dir), "resume": "allow", "id": run_id}
    if "finish_timeout" in wandb.Settings.model_fields:  # older ones wait for their server for days
        options["settings"] = wandb.Settings(finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)
    return options


def run_id_file(kind: str, logging_dir: Path) -> Path:
    """Where the id of a tracker's run is kept, so that a resumed run goes on in it."""
    return logging_dir / f"{kind}_run_id"


def _run_id(kind: str, logging_dir: Path, resumed_at: int | None) -> str:
    """The id of the tracker's run: that of the run that is resumed, else a new one."""
    file = run_id_file(kind, logging_dir)
    if resumed_at is not None and file.is_file() and (before := file.read_text(encoding="utf-8").strip()):
        return before
    run_id = uuid4().hex  # Comet takes no fewer letters
    if kind == "wandb":
        run_id = run_id[:8]
    elif kind == "trackio":  # where it is the run's name as well
        run_id = f"{logging_dir.resolve().parent.name}-{run_id[:8]}"
    with atomic_write(file) as partial:
        partial.write_text(f"{run_id}\n", encoding="utf-8")
    return run_id


def _described(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 300)
