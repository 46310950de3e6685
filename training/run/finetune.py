"""The training run, for every task and method: set up, the loop, the result."""

import argparse
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch

from common.failures import explained_failures
from common.ranks import launch_rank
from common.signals import STOPPED_EXIT_CODE
from data.plan import TrainingData
from diffusion.latents import derive_seed, sample_generators, seed_global
from diffusion.timesteps import share_out
from optimizers.build import can_step, clip_gradients, step_if_finite
from parallel.fsdp import is_fsdp
from prefetch import DeviceCopies
from results.model_card import card_facts
from results.publish import check_access, push_to_hub
from run.auto_fit import fit_into_memory
from run.config import write_config
from run.dry_run import rehearse
from run.memory_fit import describe_savings
from run.setup import Run, set_up
from run.spec import Method, Task, check_recipe
from tracking.bad_steps import StepGuard
from tracking.progress import StepLog
from tracking.traces import PROFILE_FOLDER, profiled


logger = logging.getLogger(__name__)


def finetune(args: argparse.Namespace, data: TrainingData, task: Task, method: Method) -> None:
    """Fine-tune a model on `data` and write the result to `args.output_dir`; called on every rank.

    Raises:
        UserError: model, data and flags do not go together, or the result must not be uploaded as asked; raised before
            any weights are loaded. Or memory ran out, or a data worker died.
    """
    if args.push_to_hub and launch_rank() == 0:
        check_access(Path(args.output_dir), args.hub_model_id, args.hub_token)
    with explained_failures(lambda: describe_savings(args, data, method)):
        args, method = fit_into_memory(args, data, task, method, train)
        if args.dry_run:
            rehearse(args, data, task, method, train)
        else:
            run_recipe(args, data, task, method)


def run_recipe(args: argparse.Namespace, data: TrainingData, task: Task, method: Method) -> None:
    """Set up, train, save, validate and upload."""
    recipe = check_recipe(args, data, task, method)
    recipe.agreement.from_main(lambda: write_config(recipe))
    run = set_up(recipe)
    if args.validate_first and run.state.step == 0:
        run.validate(0)
    with run.signals:
        with profiled(profile_folder(args, run), run.state.step) as next_step:
            done = train(args, run, next_step)
        if done < run.total_steps:
            leave(run, done)
        # The result is safe before the last validation, which can fail or take long.
        if run.state.step < run.total_steps:
            run.save_checkpoint(run.total_steps)
        logger.info("saved %s; to use it:\n\n%s\n", run.save_result(), run.usage)
        run.validate(run.total_steps)
    run.accelerator.end_training()  # the loss curve is drawn to its end
    if args.push_to_hub and run.accelerator.is_main_process:
        push_to_hub(run.output_dir, args.hub_model_id, args.hub_token, card_facts(recipe, run.total_steps))


def leave(run: Run, step: int) -> None:
    """End a run that was told to stop, when it is saved.

    Raises:
        SystemExit: always, with a code of its own.
    """
    run.accelerator.end_training()
    logger.info("stopped after step %d of %d; go on with --resume_from_checkpoint latest", step, run.total_steps)
    raise SystemExit(STOPPED_EXIT_CODE)


def profile_folder(args: argparse.Namespace, run: Run) -> Path | None:
    """Where the main process records what steps do, if that was asked for."""
    return run.output_dir / PROFILE_FOLDER if args.profile and run.accelerator.is_main_process else None


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
    guard = StepGuard(run.agreement, args.max_bad_steps, run.output_dir)
    run.learner.model.train()
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
            stops, saves = run.agreement.ask(run.signals.received is not None, is_late and run.agreement.is_main)
            if stops or saves or done % args.checkpointing_steps == 0:
                log.flush()  # a run that is killed later has lost no logged step
                run.save_checkpoint(done)
                saved_at = time.monotonic()
            if stops:
                break
            if run.schedule.is_due(done, args.validation_steps, args.validation_epochs):
                log.flush()  # trackers want steps in order
                run.validate(done)
        run.agreement.finish_asking()
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
        with nullcontext() if exchanges else accelerator.no_sync(run.learner.model):
            with phase("data"):
                batch = to_device(batch)
            with phase("forward"):
                loss = run.objective(batch, generators, parts[number]).sum() * share
            step_loss += loss.detach()
            with phase("backward"):
                if can_step(run.learner.optimizer, step_loss):
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
    accelerator, learner = run.accelerator, run.learner
    with run.throughput.phase("optimizer"):
        grad_norm = clip_gradients(accelerator, learner.optimizer, learner.trainable, args.max_grad_norm)
        # Stochastic rounding must do the same on all ranks.
        seed_global(accelerator.device, derive_seed(run.state.seed, step))
        step_if_finite(accelerator, learner.optimizer, grad_norm)
        learner.optimizer.zero_grad(set_to_none=True)
        rate = float(learner.lr_scheduler.get_last_lr()[0])
        # A step that was left out counts, however the run was launched; not those by which fp16 finds its scale.
        if accelerator.scaler is None or not accelerator.optimizer_step_was_skipped:
            learner.lr_scheduler.step()
            if learner.ema is not None:
                learner.ema.step(learner.trainable)
    return grad_norm, rate


def timestep_parts(args: argparse.Namespace, run: Run, step: int, sizes: list[int]) -> list[torch.Tensor] | list[None]:
    """Which part of the timesteps' distribution each sample of each batch takes; None for all of it."""
    if not args.stratified_timesteps:
        return [None] * len(sizes)
    samples_per_rank = args.train_batch_size * args.gradient_accumulation_steps
    parts = share_out(run.state.seed, step, run.data_rank, run.num_data_ranks, samples_per_rank)
    return list(parts[: sum(sizes)].split(sizes))
