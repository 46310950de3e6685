"""The state of a run in its checkpoints: what is recorded beside the weights, and which checkpoint to resume."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.manifest import find_damage
from checkpoints.schedule import ScheduleStart
from common.errors import UserError
from common.run_folder import STATE_FILE, list_checkpoints, list_unfinished


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerState:
    """What a resumed run must know beside weights, optimizer and learning-rate schedule."""

    step: int  # optimizer steps done
    seed: int
    settings: dict[str, Any]  # that must not change on the way, by flag
    memory: dict[str, Any] = field(default_factory=dict)  # settings that were chosen for the run, by flag
    schedule: ScheduleStart = field(default_factory=ScheduleStart)  # that the steps are counted from

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings.

        Raises:
            UserError: lists those that differ.
        """
        made_with = {**self.settings, "--seed": self.seed}
        differing = [
            f"{name} was {_in_words(before)}, is now {_in_words(value)}"
            for name, value in settings.items()
            # A checkpoint of before there was a switch is one without it.
            if (before := made_with.get(name, False if value is False else None)) != value
        ]
        if differing:
            raise UserError(
                f"--resume_from_checkpoint: the checkpoint is of a run with other settings: {'; '.join(differing)}; "
                "give them as they were, or start anew in another --output_dir"
            )


def _in_words(value: object) -> object:
    return ("on" if value else "off") if isinstance(value, bool) else value


def read_state(folder: Path) -> TrainerState:
    """Read how far the run of a checkpoint was.

    Raises:
        UserError: the folder is no checkpoint.
    """
    try:
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return TrainerState(**values | {"schedule": ScheduleStart(**values.get("schedule", {}))})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--resume_from_checkpoint: {folder} is no complete checkpoint (cannot read its {STATE_FILE})"
        ) from error


def newest_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """What `find_checkpoint` returns if nothing is damaged, found without reading it all."""
    if resume_from != "latest":
        return None if resume_from is None else Path(resume_from)
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1][1] if checkpoints else None


def find_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: a folder, or for "latest" the newest whole one; None to start anew.

    Every byte of it is compared with its manifest. Damaged ones that "latest" passes over are named in a warning.

    Raises:
        UserError: the folder given is damaged or no checkpoint, or all that there are.
    """
    if resume_from is None:
        return None
    if resume_from != "latest":
        folder = Path(resume_from)
        if damage := find_damage(folder):
            raise UserError(
                f"--resume_from_checkpoint: {folder} is no whole checkpoint: {damage}; latest passes over it"
            )
        return folder
    for folder in list_unfinished(output_dir):
        logger.warning("warning: %s is no checkpoint (it was never finished); passed over", folder)
    checkpoints = [folder for _, folder in list_checkpoints(output_dir)]
    for folder in reversed(checkpoints):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning("warning: %s is damaged (%s); passed over", folder, damage)
    if checkpoints:
        raise UserError(
            f"--resume_from_checkpoint latest: every checkpoint in '{output_dir}' is damaged; to start anew, give "
            "another --output_dir"
        )
    return None
