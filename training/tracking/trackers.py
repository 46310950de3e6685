"""Experiment trackers that never end a run: a failure in one is logged as a warning, and training continues."""

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

# Environment variables that set the id of the run.
RUN_ID_VARIABLES = {"wandb": "WANDB_RUN_ID", "comet_ml": "COMET_EXPERIMENT_KEY"}
FINISH_SECONDS = 300.0  # for W&B at the end, to send values that it kept while its server was unreachable


class SteadyTracker(GeneralTracker):
    """One of accelerate's trackers, started, with warnings instead of its exceptions.

    Warnings are logged for failure 1, 10, 100 and so on, because a server that is unreachable for a night must not
    flood the log.
    """

    requires_logging_directory = False

    def __init__(self, tracker: GeneralTracker):
        self._started = tracker
        self._failures = 0
        super().__init__()

    @property
    def name(self) -> str:
        """The name of the tracker."""
        return self._started.name

    @property
    def tracker(self) -> Any:
        """The run object of the tracker's library, whose exceptions are not caught."""
        return self._started.tracker

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Log the run's settings."""
        self._attempt(self._started.store_init_configuration, values)

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Log values by name."""
        self._attempt(self._started.log, values, step=step, **options)

    def log_images(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Log pictures by name."""
        self._attempt(self._started.log_images, values, step=step, **options)

    def finish(self) -> None:
        """Close the run."""
        self._attempt(self._started.finish)

    def _attempt(self, function: Callable[..., None], *arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except Exception as error:  # trackers raise their own exceptions and those of network libraries
            self._failures += 1
            if self._failures in (10**power for power in range(9)):
                times = "failed" if self._failures == 1 else f"failed {self._failures} times, lastly"
                logger.warning("warning: %s %s (%s); training continues", self.name, times, _described(error))


def start_trackers(
    accelerator: Accelerator, project: str, logging_dir: Path, flags: Mapping[str, Any], *, resumed_at: int | None
) -> None:
    """Start the trackers that the accelerator was created with, and log the run's settings without the hub token.

    A tracker that cannot start is skipped with a warning. W&B without its server keeps its files, to be sent later.

    Args:
        accelerator: gets the trackers, on the main process.
        resumed_at: the step that the run continues after, with its trackers; None for a new run.
    """
    if not accelerator.is_main_process:
        return
    for kind in map(str, accelerator.log_with):
        tracker = _open(kind, project, logging_dir, resumed_at)
        if tracker is not None:
            accelerator.trackers.append(SteadyTracker(tracker))
            accelerator.trackers[-1].store_init_configuration(plain_settings(flags))


def keep_losses(accelerator: Accelerator, folder: Path, *, resumed_at: int | None) -> LossCurve | None:
    """Have the main process write the logged values to the run's folder and draw the losses, besides any trackers.

    Returns the losses, on the main process.
    """
    if not accelerator.is_main_process:
        return None
    try:
        curve = LossCurve(folder, resumed_at)
    except (OSError, UserError) as error:
        logger.warning("warning: there will be no loss curve (%s)", _described(error))
        return None
    accelerator.trackers.append(SteadyTracker(curve))
    return curve


def plain_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags as numbers and texts, which every tracker accepts, without tokens."""
    return {
        name: value
        if isinstance(value, int | float)
        else without_tokens(str(list(value) if isinstance(value, tuple) else value))
        for name, value in flags.items()
        if name != "hub_token" and not isinstance(value, HubToken)
    }


def _open(kind: str, project: str, logging_dir: Path, resumed_at: int | None) -> GeneralTracker | None:
    """Start a tracker, W&B without its server if it must; return None, with a warning, if it does not start."""
    places = [str(logging_dir)] if LOGGER_TYPE_TO_CLASS[kind].requires_logging_directory else []
    for last_resort in ({}, {"mode": "offline"}) if kind == "wandb" else ({},):
        try:
            logging_dir.mkdir(parents=True, exist_ok=True)
            options = _options(kind, logging_dir, resumed_at) | last_resort
            tracker = LOGGER_TYPE_TO_CLASS[kind](project, *places, **options)
            tracker.start()
        except Exception as error:  # trackers raise their own exceptions
            logger.warning("warning: %s cannot be started (%s)", kind, _described(error))
        else:
            if last_resort:
                logger.warning("warning: %s keeps its files in %s; send them with `wandb sync`", kind, logging_dir)
            return tracker
    logger.warning("warning: training continues without %s", kind)
    return None


def _options(kind: str, logging_dir: Path, resumed_at: int | None) -> dict[str, Any]:
    """Return the arguments for a tracker's library besides the name of the project."""
    if kind == "tensorboard" and resumed_at is not None:
        # Steps after the checkpoint are logged again: TensorBoard drops the earlier values.
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
    if "finish_timeout" in wandb.Settings.model_fields:  # older versions wait for their server for days
        options["settings"] = wandb.Settings(finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)
    return options


def run_id_file(kind: str, logging_dir: Path) -> Path:
    """Return the file with the id of a tracker's run, with which a resumed run continues it."""
    return logging_dir / f"{kind}_run_id"


def _run_id(kind: str, logging_dir: Path, resumed_at: int | None) -> str:
    """Return the id of the tracker's run: that of the resumed run, otherwise a new one."""
    file = run_id_file(kind, logging_dir)
    if resumed_at is not None and file.is_file() and (before := file.read_text(encoding="utf-8").strip()):
        return before
    run_id = uuid4().hex  # Comet requires at least 32 characters
    if kind == "wandb":
        run_id = run_id[:8]
    elif kind == "trackio":  # shows it as the run's name
        run_id = f"{logging_dir.resolve().parent.name}-{run_id[:8]}"
    with atomic_write(file) as partial:
        partial.write_text(f"{run_id}\n", encoding="utf-8")
    return run_id


def _described(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 300)
