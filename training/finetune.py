"""The training run, for every task and method: set up, the loop, the result."""

import argparse
import logging
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch

from auto_fit import fit_into_memory
from diffusion import derive_seed, sample_generators, seed_global
from methods import Lora
from optimizers import clip_gradients
from plan import TrainingData
from prefetch import DeviceCopies
from profiling import PROFILE_FOLDER, profiled
from progress import StepLog
from publish import push_to_hub
from recipe import Method, Task, check_recipe
from run_setup import Run, set_up
from timesteps import share_out
from trial_run import rehearse


logger = logging.getLogger(__name__)


def finetune(args: argparse.Namespace, data: TrainingData, task: Task, method: Method) -> None:
    """Fine-tune a model on `data` and write the result to `args.output_dir`; called on every rank.

    Raises:
        UserError: model, data and flags do not go together; raised before any weights are loaded.
    """
    args, method = fit_into_memory(args, data, task, method, train)
    if args.dry_run:
        rehearse(args, data, task, method, train)
        return
    run = set_up(check_recipe(args, data, task, method))
    if args.validate_first and run.state.step == 0:
        run.validate(0)
    with profiled(profile_folder(args, run), run.state.step) as next_step:
        train(args, run, next_step)
    # The result is safe before the last validation, which can fail or take long.
    run.save_checkpoint(run.total_steps)
    logger.info("saved %s; to use it:\n\n%s\n", run.save_result(), run.usage)
    run.validate(run.total_steps)
    if args.push_to_hub and run.accelerator.is_main_process:
        push_to_hub(
            run.output_dir,
            args.hub_model_id,
            args.hub_token,
            args.pretrained_model_name_or_path,
            run.usage,
            args.validation_prompts,
            [task.name, *(["lora"] if isinstance(method, Lora) else [])],
        )
    run.accelerator.end_training()


def profile_folder(args: argparse.Namespace, run: Run) -> Path | None:
    """Where the main process records what steps do, if that was asked for."""
    return run.output_dir / PROFILE_FOLDER if args.profile and run.accelerator.is_main_process else None


def train(args: argparse.Namespace, run: Run, next_step: Callable[[], None] = lambda: None) -> None:
    """The loop: one turn is one optimizer step on `gradient_accumulation_steps` batches of every rank.

    Args:
        next_step: called at the end of each step, for whoever watches.
    """
    accelerator, learner, schedule, seed = run.accelerator, run.learner, run.schedule, run.state.seed
    phase, to_device = run.throughput.phase, DeviceCopies(accelerator.device)
    log = StepLog(accelerator, run.state.step, run.total_steps, args.logging_steps, run.throughput)
    learner.model.train()
    for step in range(run.state.step, run.total_steps):
        with phase("data"):
            batches = list(islice(run.batches, schedule.batches_before(step + 1) - schedule.batches_before(step)))
        sizes = [len(batch.names) for batch in batches]
        parts = timestep_parts(args, run, step, sizes)
        # A LoRA's dropout draws from the global generator: what it draws must not depend on what happened before.
        seed_global(accelerator.device, derive_seed(seed, step, accelerator.process_index))
        step_loss = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches):
            generators = sample_generators(accelerator.device, seed, batch.draws)
            # Ranks exchange gradients once a step, with its last batch.
            accelerator.sync_gradients = number == len(batches) - 1
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(learner.model):
                with phase("data"):
                    batch = to_device(batch)
                with phase("forward"):
                    losses = run.objective(batch, generators, parts[number])
                    loss = losses.sum() / sum(sizes)
                with phase("backward"):
                    # accelerate divides by the accumulation steps, but the sum above makes the mean already.
                    accelerator.backward(loss * args.gradient_accumulation_steps)
            step_loss += loss.detach()
            run.throughput.count(batch.bucket, len(batch.names))
        with phase("optimizer"):
            grad_norm = clip_gradients(accelerator, learner.optimizer, learner.trainable, args.max_grad_norm)
            # Stochastic rounding must do the same on all ranks.
            seed_global(accelerator.device, derive_seed(seed, step))
            learner.optimizer.step()
            learner.optimizer.zero_grad(set_to_none=True)
            rate = float(learner.lr_scheduler.get_last_lr()[0])
            if not accelerator.optimizer_step_was_skipped:
                learner.lr_scheduler.step()
                if learner.ema is not None:
                    learner.ema.step(learner.trainable)
        log.add(step_loss, grad_norm, rate)
        next_step()

        done = step + 1
        if done == run.total_steps:
            break  # the caller saves and validates the end
        if done % args.checkpointing_steps == 0:
            log.flush()  # a run that is killed later has lost no logged step
            run.save_checkpoint(done)
        if schedule.is_due(done, args.validation_steps, args.validation_epochs):
            log.flush()  # trackers want steps in order
            run.validate(done)
    log.close()


def timestep_parts(args: argparse.Namespace, run: Run, step: int, sizes: list[int]) -> list[torch.Tensor] | list[None]:
    """Which part of the timesteps' distribution each sample of each batch takes; None for all of it."""
    if not args.stratified_timesteps:
        return [None] * len(sizes)
    ranks = run.accelerator.num_processes
    samples_per_rank = args.train_batch_size * args.gradient_accumulation_steps
    parts = share_out(run.state.seed, step, run.accelerator.process_index, ranks, samples_per_rank)
    return list(parts[: sum(sizes)].split(sizes))
