"""Read the state of a run from its checkpoints, and find the checkpoint to resume from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.schedule import ScheduleStart
from common.errors import UserError
from common.run_folder import STATE_FILE
from planning.held_out import FRACTION_FLAG
from video.condition_frames import FIRST


# Settings that are None for a run without what they weight, and what that is.
_WITH = {
    "--regularization_weight": "regularization (--regularization_data_root)",
    "--mask_background_weight": "--use_masks",
}


@dataclass(frozen=True)
class TrainerState:
    """State of a run besides weights, optimizer and learning-rate schedule."""

    step: int  # optimizer steps done
    seed: int
    settings: dict[str, Any]  # that must not change, by flag
    memory: dict[str, Any] = field(default_factory=dict)  # memory settings chosen for the run, by flag
    schedule: ScheduleStart = field(default_factory=ScheduleStart)
    validation_passes: int = 0  # of each measurement of the loss of held-out clips; 0 if there is none

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse to continue with other settings, with a UserError that lists those that differ."""
        made_with = {FRACTION_FLAG: False, **self.settings, "--seed": self.seed}
        differing = [
            _difference(name, before, value)
            for name, value in settings.items()
            # Checkpoints older than a switch were made without it.
            if (before := made_with.get(name, False if value is False else None)) != value
        ]
        if differing:
            raise UserError(
                f"--resume_from_checkpoint: the checkpoint is of a run with other settings: {'; '.join(differing)}; "
                "pass them as they were, or start again in another --output_dir"
            )


def _difference(name: str, before: object, value: object) -> str:
    if name in _WITH and None in (before, value):
        name, before, value = _WITH[name], before is not None, value is not None
    if name == "--condition_frames":  # off in checkpoints, because older ones do not have it
        before, value = before or FIRST, value or FIRST
    return f"{name} was {_in_words(before)}, is now {_in_words(value)}"


def _in_words(value: object) -> object:
    return ("on" if value else "off") if isinstance(value, bool) else value


def read_state(folder: Path) -> TrainerState:
    """Read the state of a run from its checkpoint; raise a UserError if the folder is not one."""
    try:
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return TrainerState(**values | {"schedule": ScheduleStart(**values.get("schedule", {}))})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--resume_from_checkpoint: {folder} is not a complete checkpoint (cannot read its {STATE_FILE})"
        ) from error
