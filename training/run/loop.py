"""The training loop: one turn is one optimizer step."""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice

import torch

from dataset import DeviceCopies
from diffusion.randomness import derive_seed, sample_generators, seed_global
from diffusion.timesteps import share_out
from optimizers.build import can_step, clip_gradients, step_if_finite
from parallel.fsdp import is_fsdp
from run.setup import Run
from tracking.bad_steps import StepGuard
from tracking.progress import StepLog


def train(args: argparse.Namespace, run: Run, next_step: Callable[[], None] = lambda: None) -> int:
    """The loop: one turn is one optimizer step on `gradient_accumulation_steps` batches of every rank.

    Args:
        next_step: called at the end of each step, for whoever watches.

    Returns:
        How many steps are done: all, or fewer where a signal stopped the run, which is saved then.

    Raises:
        UserError: too many steps in a row were not finite, or a checkpoint cannot be written.
    """
    to_device, saved_at = DeviceCopies(run.accelerator.device), time.monotonic()
    guard = StepGuard(run.coordinator, args.max_bad_steps, run.output_dir)
    run.trainable.model.train()
    with StepLog(run.accelerator, run.state.step, run.total_steps, args.logging_steps, run.throughput, guard) as log:
        for step in range(run.state.step, run.total_steps):
            loss, names = accumulate_gradients(args, run, step, to_device)
            grad_norm, rate = update_weights(args, run, step)
            log.add(loss, grad_norm, rate, names)
            next_step()

            done = step + 1
            if done == run.total_steps:
                break  # the caller saves and validates the end
            is_late = bool(args.checkpoint_minutes) and time.monotonic() - saved_at > 60 * args.checkpoint_minutes
            if is_late:
                saved_at = time.monotonic()  # asked for once, as the answer may come a step later
            stops, saves = run.coordinator.ask(run.signals.received is not None, is_late and run.coordinator.is_main)
            if stops or saves or done % args.checkpointing_steps == 0:
                log.flush()  # a run that is killed later has lost no logged step
                run.save_checkpoint(done)
                saved_at = time.monotonic()
            if stops:
                break
            if run.schedule.is_due(done, args.validation_steps, args.validation_epochs):
                log.flush()  # trackers want steps in order
                run.validate(done)
        run.coordinator.finish_asking()
        log.finish()
    return log.step


def accumulate_gradients(
    args: argparse.Namespace, run: Run, step: int, to_device: DeviceCopies
) -> tuple[torch.Tensor, list[str]]:
    """Forward and backward passes of the batches that the step after `step` others has.

    Returns:
        The part of the step's loss that this rank has, on the device: the mean over ranks is that over all samples.
        And the names of the clips.
    """
    accelerator, seed, phase = run.accelerator, run.state.seed, run.throughput.phase
    with phase("data"):
        batches = list(islice(run.batches, run.batches_in(step)))
    parts = timestep_parts(args, run, step, [len(batch.names) for batch in batches])
    # A LoRA's dropout draws from the global generator: what it draws must not depend on what happened before, and be
    # the same where ranks have copies of the same text.
    seed_global(accelerator.device, derive_seed(seed, step, run.data_rank))
    # Processes average: together, the mean over all samples.
    share = run.num_data_ranks / run.samples_in(step)
    step_loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches):
        generators = sample_generators(accelerator.device, seed, batch.draws)
        # Ranks exchange gradients once a step, with its last batch; in shards with each, or all had all of them.
        accelerator.sync_gradients = number == len(batches) - 1
        exchanges = accelerator.sync_gradients or is_fsdp(accelerator)
        with nullcontext() if exchanges else accelerator.no_sync(run.trainable.model):
            with phase("data"):
                batch = to_device(batch)
            with phase("forward"):
                loss = run.objective(batch, generators, parts[number]).sum() * share
            step_loss += loss.detach()
            with phase("backward"):
                if can_step(run.trainable.optimizer, step_loss):
                    # A loss that is not finite on one rank must spoil the gradients of all, to be noticed by all.
                    loss = loss * torch.where(step_loss.isfinite(), 1.0, torch.nan)
                    # accelerate divides by the accumulation steps, which the mean has done already.
                    accelerator.backward(loss * args.gradient_accumulation_steps)
        run.throughput.count(batch.bucket, len(batch.names))
    return step_loss, [name for batch in batches for name in batch.names]


def update_weights(args: argparse.Namespace, run: Run, step: int) -> tuple[torch.Tensor | float | None, float]:
    """Clip the gradients, take the optimizer's step if they are finite, and go on along the learning rate's schedule.

    Returns:
        The gradients' norm before, None where nobody knows it, and the learning rate of the step.
    """
    accelerator, trainable = run.accelerator, run.trainable
    with run.throughput.phase("optimizer"):
        grad_norm = clip_gradients(accelerator, trainable.optimizer, trainable.parameters, args.max_grad_norm)
        # Stochastic rounding must do the same on all ranks.
        seed_global(accelerator.device, derive_seed(run.state.seed, step))
        step_if_finite(accelerator, trainable.optimizer, grad_norm)
        trainable.optimizer.zero_grad(set_to_none=True)
        rate = float(trainable.lr_scheduler.get_last_lr()[0])
        # A step that was left out counts, however the run was launched; not those by which fp16 finds its scale.
        if accelerator.scaler is None or not accelerator.optimizer_step_was_skipped:
            trainable.lr_scheduler.step()
            if trainable.ema is not None:
                trainable.ema.step(trainable.parameters)
    return grad_norm, rate


def timestep_parts(args: argparse.Namespace, run: Run, step: int, sizes: list[int]) -> list[torch.Tensor] | list[None]:
    """Which part of the timesteps' distribution each sample of each batch takes; None for all of it."""
    if not args.stratified_timesteps:
        return [None] * len(sizes)
    samples_per_rank = args.train_batch_size * args.gradient_accumulation_steps
    parts = share_out(run.state.seed, step, run.data_rank, run.num_data_ranks, samples_per_rank)
    return list(parts[: sum(sizes)].split(sizes))
