"""Which settings of memory a run takes: those that fit `--memory_budget_gb`, or the next ones for `--auto_fit`."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import torch

from checkpoints.state import newest_checkpoint, read_state
from common.ranks import precision_of
from data.plan import TrainingData
from memory.accounting import MemoryAccount, account
from memory.facts import Workload, model_facts
from memory.ladder import (
    Choice,
    RunFacts,
    adapter_key,
    choose,
    describe_settings,
    ladder,
    measure_or_calculate,
    model_key,
    next_rung,
    read_measured,
    usable_filter,
)
from memory.settings import GB, MemorySettings, apply_settings, describe_change, memory_settings_of
from methods.lora import Lora
from models.configs import ModelConfigs
from run.spec import Method, model_source, sampled_size


logger = logging.getLogger(__name__)


def chosen_before(args: argparse.Namespace) -> MemorySettings | None:
    """The settings that were chosen for the run that is resumed: another choice could not read its checkpoint.

    None where nothing is resumed, or where the flags say the settings now or said them then.

    Raises:
        UserError: the checkpoint is no complete one.
    """
    checkpoint = newest_checkpoint(args.resume_from_checkpoint, Path(args.output_dir))
    if checkpoint is None or not (args.memory_budget_gb or args.auto_fit):
        return None
    chosen = read_state(checkpoint).memory
    return MemorySettings(**chosen) if chosen else None


def choose_by_budget(args: argparse.Namespace, data: TrainingData, method: Method) -> MemorySettings:
    """The fastest settings that fit into `--memory_budget_gb`.

    Raises:
        UserError: nothing fits, or the model's configs cannot be read.
    """
    settings, is_usable = memory_settings_of(args), _usable_here(args)
    configs = model_source(args).configs()
    account_for = _accounting(args, data, method, configs)
    choice = choose(
        args.memory_budget_gb,
        ladder(settings, args.given, is_usable),
        args.given,
        run_facts(args, data, method, configs),
        lambda rung: account_for(rung).peak,
        read_measured(),
        is_usable,
    )
    logger.info("%s", describe_settings(choice, settings, args.memory_budget_gb))
    return choice.settings


def step_down(args: argparse.Namespace, data: TrainingData, method: Method) -> MemorySettings | None:
    """The next stronger savings, for `--auto_fit` when these flags ran out of memory; None: there are none."""
    settings = memory_settings_of(args)
    rungs = ladder(settings, args.given, _usable_here(args))
    account_for = _accounting(args, data, method, model_source(args).configs())
    # Training or validation, who knows which ran out: less for either is worth a try.
    rung = next_rung(rungs, settings, lambda rung: account_for(rung).training + account_for(rung).validation)
    if rung is not None:
        logger.warning("out of GPU memory; --auto_fit starts again with %s", describe_change(rung, settings))
    return rung


def training_memory_advice(args: argparse.Namespace, data: TrainingData, method: Method) -> list[str]:
    """What a run takes of the GPU's memory, and how much less it would take otherwise, for the user: a line each.

    The settings are those of the ladder, each with all that it needs beside the flags as they are, the fastest first.
    """
    settings, is_usable = memory_settings_of(args), _usable_here(args)
    taken = _memory_taken(args, data, method)
    now = smallest = taken(settings)
    size = max(data.buckets, key=prod)
    lines = [f"now: {args.train_batch_size} x {size} takes {now.needed / GB:.2f} GB ({now.how})"]
    if args.train_batch_size > 1:
        alone = argparse.Namespace(**(vars(args) | {"train_batch_size": 1}))
        steps = args.gradient_accumulation_steps * args.train_batch_size
        flags = f"--train_batch_size 1 --gradient_accumulation_steps {steps} (the same steps)"
        lines.append(_saving(flags, _memory_taken(alone, data, method)(settings), now))
    rungs = ladder(settings, args.given, is_usable)[1:]
    offloaded = replace(settings, enable_model_cpu_offload=True)
    if sampled_size(args) is not None and is_usable(offloaded):
        rungs.insert(0, offloaded)
    for choice in map(taken, rungs):
        if choice.needed < smallest.needed:
            lines.append(_saving(describe_change(choice.settings, settings), choice, now))
            smallest = choice
    return [*lines, "smaller --height and --width, or fewer frames in --frame_buckets and --max_num_frames"]


def expected_memory(args: argparse.Namespace, data: TrainingData, method: Method) -> Choice:
    """What the run takes of one card that shares nothing with others, under its settings."""
    return _memory_taken(args, data, method)(memory_settings_of(args))


def _memory_taken(args: argparse.Namespace, data: TrainingData, method: Method) -> Callable[[MemorySettings], Choice]:
    """What the run takes of a card under some settings, measured or calculated."""
    configs = model_source(args).configs()
    facts, account_for = run_facts(args, data, method, configs), _accounting(args, data, method, configs)
    return lambda rung: measure_or_calculate(rung, facts, lambda some: account_for(some).peak, read_measured())


def _saving(flags: str, choice: Choice, now: Choice) -> str:
    less = (now.needed - choice.needed) / GB
    return f"{flags}: {choice.needed / GB:.2f} GB, {less:.2f} less ({choice.how})"


def with_settings(
    args: argparse.Namespace, method: Method, settings: MemorySettings
) -> tuple[argparse.Namespace, Method]:
    """Flags and method with other settings."""
    args = apply_settings(args, settings)
    if isinstance(method, Lora):
        return args, replace(method, quantize_base=settings.quantize_base)
    return args, replace(method, weights_dtype=settings.weights_dtype)


def run_facts(args: argparse.Namespace, data: TrainingData, method: Method, configs: ModelConfigs) -> RunFacts:
    """What memory depends on beside the settings."""
    is_lora = isinstance(method, Lora)
    return RunFacts(
        model=model_key(configs.transformer),
        method=args.method,
        size=max(data.buckets, key=prod),
        batch_size=args.train_batch_size,
        adapters=adapter_key(method.rank, method.target_modules, use_dora=method.use_dora) if is_lora else "",
        sampled=sampled_size(args),
        mixed_precision=precision_of(args),
    )


def _usable_here(args: argparse.Namespace) -> Callable[[MemorySettings], bool]:
    return usable_filter(args, args.given, mixed_precision=precision_of(args), has_gpu=torch.cuda.is_available())


def _accounting(
    args: argparse.Namespace, data: TrainingData, method: Method, configs: ModelConfigs
) -> Callable[[MemorySettings], MemoryAccount]:
    """What the run takes under some settings."""
    facts, model = run_facts(args, data, method, configs), model_facts(configs, method)
    workload = Workload(
        facts.size, facts.batch_size, facts.mixed_precision, facts.sampled, is_guided=args.guidance_scale > 1
    )

    @cache
    def account_for(settings: MemorySettings) -> MemoryAccount:
        return account(model, settings, workload)

    return account_for
