"""Checkpoints that exist whole or not at all: save, rotate, find, resume."""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel

from errors import UserError
from files import replace_folder
from methods import Lora


STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class TrainerState:
    """What a resumed run must know beside weights, optimizer and learning-rate schedule."""

    step: int  # optimizer steps done
    seed: int


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
            for _, old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(accelerator: Accelerator, folder: Path) -> TrainerState:
    """Load the whole training state; called on every rank after `accelerator.prepare`."""
    accelerator.load_state(str(folder))
    return read_state(folder)


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


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, folder), oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE_FILE).is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def find_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: a folder, the latest of `output_dir` for "latest", or None to start anew."""
    if resume_from is None:
        return None
    if resume_from != "latest":
        return Path(resume_from)
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1][1] if checkpoints else None


def checkpoint_only_what_trains(accelerator: Accelerator, method: Lora) -> None:
    """Have `accelerator.save_state` and `load_state` store only what the method trains, in full precision."""

    def save(models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        for model in models:
            if accelerator.is_main_process:
                method.save(accelerator.unwrap_model(model), Path(output_dir), torch.float32)
        weights.clear()  # nothing is left for accelerate to save

    def load(models: list[torch.nn.Module], input_dir: str) -> None:
        while models:
            transformer: CogVideoXTransformer3DModel = accelerator.unwrap_model(models.pop())
            method.load(transformer, Path(input_dir))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
