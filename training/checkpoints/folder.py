"""Save, rotate and load checkpoints; each exists completely or not at all."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError

from checkpoints.manifest import size_of, write_manifest
from checkpoints.state import TrainerState
from common.errors import UserError, first_line
from common.files import nearest_folder, replace_folder
from common.run_folder import STATE_FILE, list_checkpoints
from common.units import in_bytes
from methods.full import FullFinetune
from methods.lora import Lora
from parallel.coordinator import Coordinator
from parallel.fsdp import detach_sharded, is_fsdp, load_optimizer, save_optimizer
from parallel.sharding import gather_weights, load_state, save_state


logger = logging.getLogger(__name__)
_REMOVED = ".removed."
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, UserError)


class CheckpointFolder:
    """The checkpoints of a run: `checkpoint-<step>` in its output folder, which all ranks share.

    A new checkpoint is written under another name, listed in a manifest, flushed to disk and then renamed, so that a
    killed process leaves only complete checkpoints. Older ones are removed after that.

    Args:
        total_limit: the number to keep; None for all.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, coordinator: Coordinator, total_limit: int | None):
        self.folder = folder
        self.accelerator = accelerator
        self.coordinator = coordinator
        self.total_limit = total_limit

    def save(self, state: TrainerState, min_bytes: int = 0) -> Path:
        """Save the complete training state, at least `min_bytes`; called on every rank.

        Raises UserError if there is too little free space or it is not writable; older ones are unchanged.
        """
        target = self.folder / f"checkpoint-{state.step}"
        partial = self.folder / f".partial.{target.name}"
        self.coordinator.from_main(lambda: self._make_room(partial, min_bytes))
        problem = None
        try:
            save_state(self.accelerator, partial)
        except WRITE_ERRORS as error:
            problem = why_unwritten(error)
        # Not a GPU barrier, which could time out: the ranks take different times to write.
        if problems := [found for found in self.coordinator.gather(problem) if found]:
            self.coordinator.from_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise self._cannot_write(target, problems[0])
        self.coordinator.from_main(lambda: self._finish(partial, target, state))
        return target

    def _make_room(self, partial: Path, min_bytes: int) -> None:
        """Remove what killed processes left and check the free space; on the main process."""
        for pattern in (".partial.checkpoint-*", f"{_REMOVED}checkpoint-*", ".replaced.checkpoint-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
        older = list_checkpoints(self.folder)
        needed = max(min_bytes, size_of(older[-1][1]) if older else 0)
        check_space(self.folder, needed, f"{partial.name.removeprefix('.partial.')}{self._what_is_left()}")
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise self._cannot_write(partial, str(error)) from error

    def _finish(self, partial: Path, target: Path, state: TrainerState) -> None:
        """Put the written folder in place and remove those beyond the limit; on the main process."""
        try:
            (partial / STATE_FILE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
            write_manifest(partial)
            replace_folder(partial, target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._cannot_write(target, str(error)) from error
        if self.total_limit is not None:
            older = [path for step, path in list_checkpoints(self.folder) if step < state.step]
            for old in older[: len(older) + 1 - self.total_limit]:
                try:
                    # Renamed first: a half removed folder must not look like a checkpoint.
                    shutil.rmtree(old.rename(old.with_name(_REMOVED + old.name)))
                except OSError as error:
                    logger.warning("warning: %s cannot be removed (%s); %s is complete", old, error, target)

    def _cannot_write(self, target: Path, problem: str) -> UserError:
        return UserError(f"{target} cannot be written: {problem}{self._what_is_left()}")

    def _what_is_left(self) -> str:
        complete = list_checkpoints(self.folder)
        if not complete:
            return ""
        return f"; {complete[-1][1].name} is complete: make room and continue with --resume_from_checkpoint latest"


def check_space(folder: Path, needed: int, what: str) -> None:
    """Check that a folder's disk has `needed` bytes of free space for `what`."""
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free < needed:
        raise UserError(
            f"--output_dir: '{folder}' has {in_bytes(free)} of free space, and at least {in_bytes(needed)} are needed "
            f"for {what}"
        )


def why_unwritten(error: Exception) -> str:
    """Return in one line why a file could not be written; raise the error again if it has another cause."""
    # torch raises a RuntimeError that only its message tells from others.
    words = ("PytorchStreamWriter", "unexpected pos", "No space left", "file write")
    if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
        raise error
    return first_line(error)


def load_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Load weights, optimizer and schedule, or raise a UserError; called on every rank after `accelerator.prepare`."""
    try:
        load_state(accelerator, folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--resume_from_checkpoint: {folder} cannot be loaded ({error}); move it away and pass latest, which is "
            "the one before"
        ) from error


def checkpoint_only_what_trains(accelerator: Accelerator, method: Lora | FullFinetune) -> None:
    """Have `accelerator.save_state` and `load_state` store only what the method trains, in full precision."""
    sharded = detach_sharded(accelerator) if is_fsdp(accelerator) else []

    def transformers(models: Sequence[torch.nn.Module]) -> list[CogVideoXTransformer3DModel]:
        return [accelerator.unwrap_model(model) for model in [*models, *(model for model, _ in sharded)]]

    def save(models: Sequence[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        for model, optimizer in sharded:
            save_optimizer(model, optimizer, Path(output_dir))
        for transformer in transformers(models):
            full = gather_weights(accelerator, transformer, method.weight_names(transformer))
            if accelerator.is_main_process:
                method.save(transformer, Path(output_dir), torch.float32, full)
        weights.clear()  # accelerate must not save them again

    def load(models: list[torch.nn.Module], input_dir: str) -> None:
        for transformer in transformers(models):
            method.load(transformer, Path(input_dir))
        models.clear()
        for model, optimizer in sharded:
            load_optimizer(model, optimizer, Path(input_dir))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
