"""The training loop: one turn is one optimizer step on `gradient_accumulation_steps` batches of every rank."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch

from dataset import Batch, DeviceCopies
from diffusion.randomness import derive_seed, sample_generators, seed_global
from diffusion.timesteps import share_out
from optimizers.build import can_step, clip_gradients, step_if_finite
from parallel.fsdp import is_fsdp
from run.setup import Run
from tracking.bad_steps import StepGuard
from tracking.progress import StepLog
from tracking.traces import PROFILE_FOLDER, profiled


def train(run: Run) -> int:
    """Train from the step that the run starts at to its last one.

    Returns:
        How many steps are done: all, or fewer where a signal stopped the run, whose state is then saved.

    Raises:
        UserError: too many steps in a row were not finite, or a checkpoint cannot be written.
    """
    settings, accelerator, trainable, phase = run.settings, run.accelerator, run.trainable, run.throughput.phase
    device, optimizer, accumulation = accelerator.device, trainable.optimizer, accelerator.gradient_accumulation_steps
    profile_folder = run.output_dir / PROFILE_FOLDER if settings.speed.profile and run.coordinator.is_main else None
    to_device, clock = DeviceCopies(device), CheckpointClock(settings.checkpoints.checkpoint_minutes)
    guard = StepGuard(run.coordinator, settings.checkpoints.max_bad_steps, run.output_dir)
    log = StepLog(accelerator, run.state.step, run.total_steps, settings.tracking.logging_steps, run.throughput, guard)
    trainable.model.train()
    with log, profiled(profile_folder, run.state.step) as end_of_step:
        for step in range(run.state.step, run.total_steps):
            with phase("data"):
                batches = list(islice(run.batches, run.batches_in(step)))
            parts = timestep_parts(run, step, batches)
            # A LoRA's dropout draws from the global generator: what it draws must not depend on what happened before,
            # and be the same where ranks have copies of the same text.
            seed_global(device, derive_seed(run.state.seed, step, run.data_rank))
            share = run.num_data_ranks / run.samples_in(step)  # ranks average: together, the mean over all samples
            step_loss = torch.zeros((), device=device)
            for batch, part in zip(batches, parts, strict=True):
                with gradient_exchange(run, is_last=batch is batches[-1]):
                    with phase("data"):
                        batch = to_device(batch)
                    with phase("forward"):
                        generators = sample_generators(device, run.state.seed, batch.draws)
                        loss = run.objective(batch, generators, part).sum() * share
                    step_loss += loss.detach()
                    with phase("backward"):
                        if can_step(optimizer, step_loss):
                            # A loss that is not finite on one rank must spoil the gradients of all ranks.
                            loss = loss * torch.where(step_loss.isfinite(), 1.0, torch.nan)
                            # accelerate divides by the accumulation steps, which `share` has done already.
                            accelerator.backward(loss * accumulation)
                run.throughput.count(batch.bucket, len(batch.names))
            with phase("optimizer"):
                grad_norm = clip_gradients(
                    accelerator, optimizer, trainable.parameters, settings.optimizer.max_grad_norm
                )
                seed_global(device, derive_seed(run.state.seed, step))  # stochastic rounding must agree on all ranks
                step_if_finite(accelerator, optimizer, grad_norm)
                optimizer.zero_grad(set_to_none=True)
                rate = trainable.end_step(accelerator)
            log.add(step_loss, grad_norm, rate, [name for batch in batches for name in batch.names])
            end_of_step()
            # The caller saves and validates after the last step.
            if step + 1 == run.total_steps or save_and_validate(run, step + 1, log, clock):
                break
        run.coordinator.finish_asking()
        log.finish()
    return log.step


def gradient_exchange(run: Run, *, is_last: bool) -> AbstractContextManager[None]:
    """Let ranks exchange gradients once a step, with its last batch; with sharded weights after each.

    Otherwise every rank would hold unsharded gradients.
    """
    run.accelerator.sync_gradients = is_last
    exchanges = is_last or is_fsdp(run.accelerator)
    return nullcontext() if exchanges else run.accelerator.no_sync(run.trainable.model)


def timestep_parts(run: Run, step: int, batches: Sequence[Batch]) -> Sequence[torch.Tensor | None]:
    """Return which part of the timesteps' distribution each sample of each batch draws from; None for all of it."""
    settings = run.settings
    if not settings.objective.stratified_timesteps:
        return [None] * len(batches)
    samples_per_rank = settings.training.train_batch_size * settings.training.gradient_accumulation_steps
    parts = share_out(run.state.seed, step, run.data_rank, run.num_data_ranks, samples_per_rank)
    sizes = [len(batch.names) for batch in batches]
    return parts[: sum(sizes)].split(sizes)


class CheckpointClock:
    """Counts the minutes since the last checkpoint, for `--checkpoint_minutes`; None never asks for one."""

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self.started = time.monotonic()

    def is_late(self) -> bool:
        """Whether a checkpoint is due; asks once, as the answer of all ranks may come a step later."""
        late = self.seconds is not None and time.monotonic() - self.started > self.seconds
        if late:
            self.restart()
        return late


def save_and_validate(run: Run, done: int, log: StepLog, clock: CheckpointClock) -> bool:
    """Save and validate after a step, if it is time; called on every rank.

    Returns:
        Whether the run must stop, because a signal told a rank so.
    """
    checkpoints, validation, coordinator = run.settings.checkpoints, run.settings.validation, run.coordinator
    stops, saves = coordinator.ask(run.signals.received is not None, clock.is_late() and coordinator.is_main)
    if stops or saves or done % checkpoints.checkpointing_steps == 0:
        log.flush()  # a run that is killed later has lost no logged step
        run.save_checkpoint(done)
        clock.restart()
    if not stops and run.schedule.is_due(done, validation.validation_steps, validation.validation_epochs):
        log.flush()  # trackers want steps in order
        run.validate(done)
    return stops
