"""Checkpoints that exist whole or not at all: save, rotate, find, resume."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel

from errors import UserError
from files import replace_folder
from methods import FullFinetune, Lora
from run_folder import STATE_FILE, list_checkpoints
from sharding import whole_weights


@dataclass(frozen=True)
class TrainerState:
    """What a resumed run must know beside weights, optimizer and learning-rate schedule."""

    step: int  # optimizer steps done
    seed: int
    settings: dict[str, Any]  # that must not change on the way, by flag
    memory: dict[str, Any] = field(default_factory=dict)  # settings that were chosen for the run, by flag

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Refuse to go on with other settings.

        Raises:
            UserError: lists those that differ.
        """
        words = {True: "on", False: "off"}
        differing = [
            f"{name} was {words.get(before, before)}, is now {words.get(value, value)}"
            for name, value in settings.items()
            # A checkpoint of before there was a switch is one without it.
            if (before := self.settings.get(name, False if value is False else None)) != value
        ]
        if differing:
            raise UserError(
                f"--resume_from_checkpoint: the checkpoint is of a run with other settings: {'; '.join(differing)}"
            )


def save_checkpoint(accelerator: Accelerator, output_dir: Path, state: TrainerState, total_limit: int | None) -> Path:
    """Save the whole training state as `output_dir/checkpoint-<step>`; called on every rank.

    Older checkpoints beyond `total_limit` are removed only when the new one is in place.
    """
    folder = output_dir / f"checkpoint-{state.step}"
    partial = output_dir / f".partial.{folder.name}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE_FILE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
        replace_folder(partial, folder)
        if total_limit is not None:
            older = [path for step, path in list_checkpoints(output_dir) if step < state.step]
            for old in older[: len(older) + 1 - total_limit]:
                (old / STATE_FILE).unlink()  # first, so that a half-removed folder is no checkpoint
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Load weights, optimizer and schedule; called on every rank after `accelerator.prepare`.

    Raises:
        UserError: the checkpoint is damaged, or of other adapters.
    """
    try:
        accelerator.load_state(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--resume_from_checkpoint: {folder} cannot be loaded ({error}); give an earlier checkpoint"
        ) from error


def read_state(folder: Path) -> TrainerState:
    """Read how far the run of a checkpoint was.

    Raises:
        UserError: the folder is no checkpoint.
    """
    try:
        return TrainerState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--resume_from_checkpoint: {folder} is no complete checkpoint (cannot read its {STATE_FILE})"
        ) from error


def find_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: a folder, the latest of `output_dir` for "latest", or None to start anew."""
    if resume_from is None:
        return None
    if resume_from != "latest":
        return Path(resume_from)
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1][1] if checkpoints else None


def checkpoint_only_what_trains(accelerator: Accelerator, method: Lora | FullFinetune) -> None:
    """Have `accelerator.save_state` and `load_state` store only what the method trains, in full precision."""

    def save(models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        for model in models:
            transformer: CogVideoXTransformer3DModel = accelerator.unwrap_model(model)
            whole = whole_weights(accelerator, transformer, method.weight_names(transformer))
            if accelerator.is_main_process:
                method.save(transformer, Path(output_dir), torch.float32, whole)
        weights.clear()  # nothing is left for accelerate to save

    def load(models: list[torch.nn.Module], input_dir: str) -> None:
        while models:
            transformer: CogVideoXTransformer3DModel = accelerator.unwrap_model(models.pop())
            method.load(transformer, Path(input_dir))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
