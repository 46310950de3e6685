"""The training loop: each turn is one optimizer step on `gradient_accumulation_steps` batches of every rank."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice

import torch

from dataset import Batch, DeviceCopies, MixedBatch
from diffusion.randomness import derive_seed, sample_generators, seed_global
from diffusion.timesteps import share_out
from optimizers.build import can_step, clip_gradients, step_if_finite
from parallel.fsdp import is_fsdp
from run.setup import Run
from tracking.progress import KeptPart, StepLog
from tracking.traces import PROFILE_FOLDER, profiled


def train(run: Run) -> int:
    """Train from the step that the run starts at to its last one.

    Returns how many steps are done: all, or fewer if a signal stopped the run, whose state is then saved. Raises
    UserError if too many steps in a row were not finite, or a checkpoint cannot be written.
    """
    spec, trainable, phase, seed = run.spec, run.trainable, run.throughput.phase, run.state.seed
    settings, accelerator, coordinator = spec.settings, spec.accelerator, spec.coordinator
    device, optimizer, accumulation = accelerator.device, trainable.optimizer, accelerator.gradient_accumulation_steps
    profile_folder = spec.output_dir / PROFILE_FOLDER if settings.speed.profile and coordinator.is_main else None
    to_device, clock = DeviceCopies(device), CheckpointClock(settings.checkpoints.checkpoint_minutes)
    interval, throughput, memory = settings.tracking.logging_steps, run.throughput, run.memory
    weight = settings.regularization.regularization_weight
    log = StepLog(accelerator, run.state.step, run.total_steps, interval, throughput, memory, run.guard)
    trainable.model.train()
    # Closed, because Python would wait for data workers at exit, which outlive the signal that ends them by minutes.
    with closing(run.batches), log, profiled(profile_folder, run.state.step) as end_of_step:
        for step in range(run.state.step, run.total_steps):
            with phase("data"):
                batches = list(islice(run.batches, run.batches_in(step)))
            parts = timestep_parts(run, step, batches)
            # LoRA dropout draws from the global generator, which must depend only on the step and the rank's data.
            seed_global(device, derive_seed(seed, step, spec.data_rank))
            num_trained, num_kept = run.samples_in(step)  # those kept are for regularization
            share = spec.num_data_ranks / (num_trained + num_kept)  # the average over ranks is the mean over samples
            step_loss, kept_loss = torch.zeros((), device=device), torch.zeros((), device=device)
            for batch, part in zip(batches, parts, strict=True):
                is_kept = run.sampler.is_regularization(batch.draws)
                with gradient_exchange(run, is_last=batch is batches[-1]):
                    with phase("data"):
                        batch = to_device(batch)
                    with phase("forward"):
                        generators = sample_generators(device, seed, batch.draws)
                        loss = run.objective(batch, generators, part).sum() * (share * weight if is_kept else share)
                    step_loss += loss.detach()
                    if is_kept:
                        kept_loss += loss.detach()
                    with phase("backward"):
                        if can_step(optimizer, step_loss):
                            # A loss that is not finite on one rank must make the gradients of all ranks NaN.
                            loss = loss * torch.where(step_loss.isfinite(), 1.0, torch.nan)
                            # accelerate divides by the accumulation steps, which `share` has done already.
                            accelerator.backward(loss * accumulation)
                for part_of_bucket in batch.parts:
                    run.throughput.count(part_of_bucket.bucket, len(part_of_bucket.names))
            with phase("optimizer"):
                max_norm = settings.optimizer.max_grad_norm
                grad_norm = clip_gradients(accelerator, optimizer, trainable.parameters, max_norm)
                seed_global(device, derive_seed(seed, step))  # stochastic rounding must agree on all ranks
                step_if_finite(accelerator, optimizer, grad_norm)
                optimizer.zero_grad(set_to_none=True)
                rate = trainable.end_step(accelerator)
            kept = KeptPart(kept_loss, num_kept / (num_trained + num_kept), weight)
            log.add(step_loss, grad_norm, rate, [name for batch in batches for name in batch.names], kept)
            end_of_step()
            # After the last step, the caller saves and validates.
            if step + 1 == run.total_steps or save_and_validate(run, step + 1, log, clock):
                break
        coordinator.finish_asking()
        log.finish()
    return log.step


def timestep_parts(run: Run, step: int, batches: Sequence[Batch | MixedBatch]) -> Sequence[torch.Tensor | None]:
    """Return the part of the timestep distribution for each sample, by batch; None for the full distribution."""
    settings = run.spec.settings
    if not settings.objective.stratified_timesteps:
        return [None] * len(batches)
    samples_per_rank = settings.training.train_batch_size * settings.training.gradient_accumulation_steps
    parts = share_out(run.state.seed, step, run.spec.data_rank, run.spec.num_data_ranks, samples_per_rank)
    sizes = [len(batch.names) for batch in batches]
    return parts[: sum(sizes)].split(sizes)


def gradient_exchange(run: Run, *, is_last: bool) -> AbstractContextManager[None]:
    """Let ranks exchange gradients only with the last batch of a step.

    With sharded weights they do after each batch, because otherwise every rank would hold unsharded gradients.
    """
    accelerator = run.spec.accelerator
    accelerator.sync_gradients = is_last
    return nullcontext() if is_last or is_fsdp(accelerator) else accelerator.no_sync(run.trainable.model)


class CheckpointClock:
    """Times the checkpoints of `--checkpoint_minutes`; with None, none is ever due."""

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else 60 * minutes
        self.is_overdue = False  # whether a checkpoint was put off
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self.started = time.monotonic()

    def is_late(self) -> bool:
        """Return whether a checkpoint is due, once: the ranks may agree to save it only a step later."""
        late = self.seconds is not None and time.monotonic() - self.started > self.seconds
        if late:
            self.restart()
        return late


def save_and_validate(run: Run, done: int, log: StepLog, clock: CheckpointClock) -> bool:
    """Save and validate after a step if due; return whether a signal must stop the run. Called on every rank."""
    settings, coordinator = run.spec.settings, run.spec.coordinator
    checkpoints = settings.checkpoints
    stops, saves = coordinator.ask(run.signals.received is not None, clock.is_late() and coordinator.is_main)
    if stops or saves or clock.is_overdue or done % checkpoints.checkpointing_steps == 0:
        log.flush()  # so that a run killed later has logged all steps
        # The last update may be why steps are skipped now: an older checkpoint must not be removed for its weights.
        clock.is_overdue = run.guard.skipped_since is not None and not stops
        if not clock.is_overdue:
            run.save_checkpoint(done)
            clock.restart()
    if not stops and (run.measures_loss(done) or run.samples(done)):
        log.flush()  # trackers need the steps in order
        run.validate(done)
    return stops
