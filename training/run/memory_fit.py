"""Which settings of memory a run takes: those that fit `--memory_budget_gb`, or the next ones for `--auto_fit`."""

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
from flags.schema import replace_flags
from flags.settings import TrainingSettings
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
from memory.settings import GB, MemorySettings, describe_change, memory_settings_of, with_memory
from methods.lora import Lora
from models.configs import ModelConfigs
from run.spec import Method, model_source, sampled_size


logger = logging.getLogger(__name__)


def chosen_before(settings: TrainingSettings) -> MemorySettings | None:
    """The settings that were chosen for the run that is resumed: another choice could not read its checkpoint.

    None where nothing is resumed, or where the flags say the settings now or said them then.

    Raises:
        UserError: the checkpoint is no complete one.
    """
    checkpoint = newest_checkpoint(settings.checkpoints.resume_from_checkpoint, Path(settings.training.output_dir))
    if checkpoint is None or not (settings.memory.memory_budget_gb or settings.memory.auto_fit):
        return None
    chosen = read_state(checkpoint).memory
    return MemorySettings(**chosen) if chosen else None


def choose_by_budget(settings: TrainingSettings, data: TrainingData, method: Method) -> MemorySettings:
    """The fastest settings that fit into `--memory_budget_gb`.

    Raises:
        UserError: nothing fits, or the model's configs cannot be read.
    """
    memory, is_usable = memory_settings_of(settings), _usable_here(settings)
    configs = model_source(settings.model).configs()
    account_for = _accounting(settings, data, method, configs)
    choice = choose(
        settings.memory.memory_budget_gb,
        ladder(memory, settings.given, is_usable),
        settings.given,
        run_facts(settings, data, method, configs),
        lambda rung: account_for(rung).peak,
        read_measured(),
        is_usable,
    )
    logger.info("%s", describe_settings(choice, memory, settings.memory.memory_budget_gb))
    return choice.settings


def step_down(settings: TrainingSettings, data: TrainingData, method: Method) -> MemorySettings | None:
    """The next stronger savings, for `--auto_fit` when these flags ran out of memory; None: there are none."""
    memory = memory_settings_of(settings)
    rungs = ladder(memory, settings.given, _usable_here(settings))
    account_for = _accounting(settings, data, method, model_source(settings.model).configs())
    # Training or validation, who knows which ran out: less for either is worth a try.
    rung = next_rung(rungs, memory, lambda rung: account_for(rung).training + account_for(rung).validation)
    if rung is not None:
        logger.warning("out of GPU memory; --auto_fit starts again with %s", describe_change(rung, memory))
    return rung


def training_memory_advice(settings: TrainingSettings, data: TrainingData, method: Method) -> list[str]:
    """What a run takes of the GPU's memory, and how much less it would take otherwise, for the user: a line each.

    The settings are those of the ladder, each with all that it needs beside the flags as they are, the fastest first.
    """
    memory, is_usable = memory_settings_of(settings), _usable_here(settings)
    taken = _memory_taken(settings, data, method)
    now = smallest = taken(memory)
    size = max(data.buckets, key=prod)
    lines = [f"now: {settings.training.train_batch_size} x {size} takes {now.needed / GB:.2f} GB ({now.how})"]
    if settings.training.train_batch_size > 1:
        alone = replace_flags(settings, train_batch_size=1)
        steps = settings.training.gradient_accumulation_steps * settings.training.train_batch_size
        flags = f"--train_batch_size 1 --gradient_accumulation_steps {steps} (the same steps)"
        lines.append(_saving(flags, _memory_taken(alone, data, method)(memory), now))
    rungs = ladder(memory, settings.given, is_usable)[1:]
    offloaded = replace(memory, enable_model_cpu_offload=True)
    if sampled_size(settings) is not None and is_usable(offloaded):
        rungs.insert(0, offloaded)
    for choice in map(taken, rungs):
        if choice.needed < smallest.needed:
            lines.append(_saving(describe_change(choice.settings, memory), choice, now))
            smallest = choice
    return [*lines, "smaller --height and --width, or fewer frames in --frame_buckets and --max_num_frames"]


def expected_memory(settings: TrainingSettings, data: TrainingData, method: Method) -> Choice:
    """What the run takes of one card that shares nothing with others, under its settings."""
    return _memory_taken(settings, data, method)(memory_settings_of(settings))


def _memory_taken(
    settings: TrainingSettings, data: TrainingData, method: Method
) -> Callable[[MemorySettings], Choice]:
    """What the run takes of a card under some settings, measured or calculated."""
    configs = model_source(settings.model).configs()
    facts, account_for = run_facts(settings, data, method, configs), _accounting(settings, data, method, configs)
    return lambda rung: measure_or_calculate(rung, facts, lambda some: account_for(some).peak, read_measured())


def _saving(flags: str, choice: Choice, now: Choice) -> str:
    less = (now.needed - choice.needed) / GB
    return f"{flags}: {choice.needed / GB:.2f} GB, {less:.2f} less ({choice.how})"


def with_settings(
    settings: TrainingSettings, method: Method, memory: MemorySettings
) -> tuple[TrainingSettings, Method]:
    """Return settings and method with other memory settings."""
    settings = with_memory(settings, memory)
    if isinstance(method, Lora):
        return settings, replace(method, quantize_base=memory.quantize_base)
    return settings, replace(method, weights_dtype=memory.weights_dtype)


def run_facts(settings: TrainingSettings, data: TrainingData, method: Method, configs: ModelConfigs) -> RunFacts:
    """What memory depends on beside the settings."""
    is_lora = isinstance(method, Lora)
    return RunFacts(
        model=model_key(configs.transformer),
        method=settings.method,
        size=max(data.buckets, key=prod),
        batch_size=settings.training.train_batch_size,
        adapters=adapter_key(method.rank, method.target_modules, use_dora=method.use_dora) if is_lora else "",
        sampled=sampled_size(settings),
        mixed_precision=precision_of(settings.training.mixed_precision),
    )


def _usable_here(settings: TrainingSettings) -> Callable[[MemorySettings], bool]:
    return usable_filter(
        settings, mixed_precision=precision_of(settings.training.mixed_precision), has_gpu=torch.cuda.is_available()
    )


def _accounting(
    settings: TrainingSettings, data: TrainingData, method: Method, configs: ModelConfigs
) -> Callable[[MemorySettings], MemoryAccount]:
    """What the run takes under some settings."""
    facts, model = run_facts(settings, data, method, configs), model_facts(configs, method)
    workload = Workload(
        facts.size,
        facts.batch_size,
        facts.mixed_precision,
        facts.sampled,
        is_guided=settings.guidance.guidance_scale > 1,
    )

    @cache
    def account_for(settings: MemorySettings) -> MemoryAccount:
        return account(model, settings, workload)

    return account_for
