"""Choose memory settings: those that fit a card or `--memory_budget_gb`, or the next smaller for `--auto_fit`."""

import logging
import os
from collections.abc import Collection
from dataclasses import asdict, replace
from functools import cache, cached_property, partial
from math import prod
from pathlib import Path

import torch

from checkpoints.resume import newest_checkpoint
from checkpoints.state import read_state
from cli.schema import replace_flags
from common.errors import UserError
from common.ranks import is_set, launch_size, local_rank, local_size, uses_deepspeed, uses_fsdp
from common.units import in_bytes
from flags.settings import TrainingSettings
from memory.accounting import account
from memory.facts import Workload
from memory.ladder import (
    CHECKPOINT_FLAGS,
    LASTING,
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
    with_offloading,
)
from memory.settings import GB, NAMES, MemorySettings, describe_change, memory_settings_of
from methods.lora import Lora
from parallel.coordinator import Coordinator
from planning.samples import PreparedData
from run.launch import start_accelerator
from run.recipe import Recipe
from video.condition_frames import given_frames


logger = logging.getLogger(__name__)

_MOST_HOST = 0.7  # of the host's memory, for settings that nobody asked for


class RunMemory:
    """The GPU memory that a run takes with its memory settings and with others; raises UserError without a config."""

    def __init__(self, recipe: Recipe, kept: Collection[str] = ()):
        settings = recipe.settings
        self.current, self.given = memory_settings_of(settings), settings.given.union(kept)
        self.facts, workload = run_facts(recipe), workload_of(recipe)
        plain = Workload(*(getattr(workload, name) for name in ("size", "batch_size", "mixed_precision", "sampled")))
        self.measured = read_measured() if workload == replace(plain, is_guided=workload.is_guided) else []
        self.account = cache(partial(account, recipe.model_facts, workload=workload))
        self.is_usable = usable_filter(settings, mixed_precision=recipe.precision, has_gpu=torch.cuda.is_available())

    @cached_property
    def rungs(self) -> list[MemorySettings]:
        """The current settings and the stronger savings after them."""
        return ladder(self.current, self.given, self.is_usable)

    @cached_property
    def rungs_of_run(self) -> list[MemorySettings]:
        """The rungs, also with the transformer off the device while videos are decoded, if there are any."""
        return with_offloading(self.rungs, self.given, self.is_usable) if self.facts.sampled else self.rungs

    def needed(self, memory: MemorySettings) -> Choice:
        """Return what the run takes of one card that shares nothing with others, measured or calculated."""
        return measure_or_calculate(memory, self.facts, lambda memory: self.account(memory).peak, self.measured)


def workload_of(recipe: Recipe) -> Workload:
    """Return the input of a run's largest step, and what it samples."""
    facts, settings = run_facts(recipe), recipe.settings
    training, guidance = settings.training, settings.guidance
    return Workload(
        facts.size,
        facts.batch_size,
        facts.mixed_precision,
        facts.sampled,
        is_guided=guidance.guidance_scale > 1,
        sampling_cache=guidance.sampling_cache,
        is_replicated=launch_size() > 1 and not (uses_deepspeed() or uses_fsdp()),
        is_raw=not isinstance(recipe.data, PreparedData),
        slicing=training.enable_slicing,
        tiling=training.enable_tiling,
        given_frames=len(given_frames(settings.image.condition_frames, facts.size.num_frames)),
        has_masks=settings.masks.use_masks,
    )


def run_facts(recipe: Recipe) -> RunFacts:
    """Return the facts that memory depends on besides the memory settings."""
    method, configs = recipe.method, recipe.configs
    is_lora, largest = isinstance(method, Lora), max(recipe.data.buckets.counts, key=prod)
    adapters = adapter_key(method.rank, method.target_modules, use_dora=method.use_dora) if is_lora else ""
    if is_lora and method.adapter != "lora":
        adapters = f"{method.adapter} {adapters}"
    if is_lora and method.dropout:
        adapters += " dropout"
    return RunFacts(
        model=f"{model_key(configs.transformer)}{' control' if configs.is_control else ''}",
        method=recipe.settings.method,
        size=largest,
        batch_size=recipe.batch_limit.worth_of(largest),
        adapters=adapters,
        sampled=recipe.sampled_size,
        mixed_precision=recipe.precision,
    )


def has_card() -> bool:
    """Return whether the run is on a GPU."""
    return torch.cuda.is_available() and not is_set("ACCELERATE_USE_CPU")


def is_left_to_card(settings: TrainingSettings) -> bool:
    """Return whether the card decides on the memory settings: there is one, and no flag says what to compute again."""
    return has_card() and not settings.given & CHECKPOINT_FLAGS


def is_chosen(settings: TrainingSettings) -> bool:
    """Return whether memory settings are chosen for the run."""
    return bool(settings.memory.memory_budget_gb or settings.memory.auto_fit or is_left_to_card(settings))


def typed_memory(settings: TrainingSettings) -> MemorySettings:
    """Return the memory settings of the flags that were typed, without those that were chosen."""
    typed = settings.given.union(("optimizer", "use_ema")).intersection(NAMES)
    values = asdict(memory_settings_of(settings))
    return MemorySettings(settings.method, **{name: values[name] for name in typed})


def chosen_before(settings: TrainingSettings) -> MemorySettings | None:
    """Return the settings chosen for the run that is resumed, because other ones could not read its checkpoint.

    None if nothing is resumed, or if the flags set the memory settings now or did so then.
    """
    checkpoint = _resumed(settings)
    if checkpoint is None or not is_chosen(settings):
        return None
    chosen = read_state(checkpoint).memory
    return MemorySettings(**chosen) if chosen else None


def _resumed(settings: TrainingSettings) -> Path | None:
    return newest_checkpoint(settings.checkpoints.resume_from_checkpoint, Path(settings.training.output_dir))


def choose_by_card(recipe: Recipe) -> MemorySettings:
    """Return the fastest settings that fit into the free memory of the card, or the smallest ones; for every rank.

    A resumed run keeps its precisions and states, and gradients are clipped as the flags say.
    """
    settings = recipe.settings
    is_divided = uses_deepspeed() or uses_fsdp() or settings.speed.context_parallel_size > 1
    if is_divided:  # what a rank takes is not calculated
        return replace(memory_settings_of(settings), gradient_checkpointing=True)
    run = RunMemory(recipe, LASTING if _resumed(settings) else ())
    free, host = usable_memory(settings)
    rungs = [rung for rung in run.rungs_of_run if rung.step_in_backward == run.current.step_in_backward]
    choice = choose(free, [rung for rung in rungs if run.account(rung).host <= host] or rungs, run.needed)
    if choice.needed > free:
        logger.warning(
            "warning: nothing fits into the %s of GPU memory that are free; the smallest settings take %s (%s)",
            *(in_bytes(free, 1024), in_bytes(choice.needed, 1024), choice.how),
        )
    return choice.settings


def usable_memory(settings: TrainingSettings) -> tuple[int, int]:
    """Return the bytes that a rank may use on its card and on the host, the smallest of all ranks."""
    free, _ = torch.cuda.mem_get_info(local_rank())
    host = int(_MOST_HOST * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local_size())
    if launch_size() > 1:
        start_accelerator(settings.training, settings.tracking, allow_tf32=settings.speed.allow_tf32)
        free, host = map(min, zip(*Coordinator().gather((free, host)), strict=True))
    return free, host


def choose_by_budget(recipe: Recipe) -> MemorySettings:
    """Return the fastest settings that fit into `--memory_budget_gb`; raise a UserError if none does."""
    run, budget_gb = RunMemory(recipe), recipe.settings.memory.memory_budget_gb
    choice = choose(budget_gb * GB, run.rungs_of_run, run.needed)
    if choice.needed > budget_gb * GB:
        flags = describe_change(choice.settings, run.current) or "what the flags say"
        tiles = ", encode raw clips with --enable_tiling" if _can_tile(recipe) else ""
        raise UserError(
            f"--memory_budget_gb {budget_gb:g}: nothing fits; the smallest is {flags}, which takes "
            f"{in_bytes(choice.needed, 1024)} ({choice.how}); train at a smaller --height, --width or "
            f"--max_num_frames{tiles}, or omit flags that cost memory"
        )
    logger.info("%s", describe_settings(choice, run.current, budget_gb))
    return choice.settings


def step_down(recipe: Recipe) -> MemorySettings | None:
    """Return the next stronger savings for `--auto_fit` after the recipe ran out of memory; None if there are none."""
    run = RunMemory(recipe)

    def taken(memory: MemorySettings) -> int:
        # What ran out is unknown: less for a step or a validation is worth a try. None takes less for encoding clips.
        result = run.account(memory)
        return replace(result, encoding=0).training + result.validation

    rung = next_rung(run.rungs, run.current, taken)
    if rung is not None:
        logger.warning("out of GPU memory; --auto_fit starts again with %s", describe_change(rung, run.current))
    return rung


def training_memory_advice(recipe: Recipe) -> list[str]:
    """Return the GPU memory that the run takes, and how much less it takes with other settings, a line each.

    The other settings are those of the ladder, the fastest first; each line names all flags to add.
    """
    run, training = RunMemory(recipe), recipe.settings.training
    now = smallest = run.needed(run.current)
    lines = [f"now: {run.facts.batch_size:g} x {run.facts.size} takes {in_bytes(now.needed, 1024)} ({now.how})"]
    if training.train_batch_size > 1:
        alone = replace(recipe, settings=replace_flags(recipe.settings, train_batch_size=1))
        steps = training.gradient_accumulation_steps * training.train_batch_size
        flags = f"--train_batch_size 1 --gradient_accumulation_steps {steps} (the same steps)"
        lines.append(_saving(flags, RunMemory(alone).needed(run.current), now))
    if _can_tile(recipe):
        by_tiles = replace(recipe, settings=replace_flags(recipe.settings, enable_slicing=True, enable_tiling=True))
        tiled = RunMemory(by_tiles).needed(run.current)
        if tiled.needed < now.needed:
            lines.append(_saving("--enable_slicing --enable_tiling", tiled, now))
    rungs = run.rungs[1:]
    offloaded = replace(run.current, enable_model_cpu_offload=True)
    if recipe.sampled_size is not None and run.is_usable(offloaded):
        rungs.insert(0, offloaded)
    for choice in map(run.needed, rungs):
        if choice.needed < smallest.needed:
            lines.append(_saving(describe_change(choice.settings, typed_memory(recipe.settings)), choice, now))
            smallest = choice
    return [*lines, "smaller --height and --width, or fewer frames in --frame_buckets and --max_num_frames"]


def _can_tile(recipe: Recipe) -> bool:
    """Return whether tiles would make the encoding of clips in the training smaller."""
    return not (isinstance(recipe.data, PreparedData) or recipe.settings.training.enable_tiling)


def _saving(flags: str, choice: Choice, now: Choice) -> str:
    less = in_bytes(now.needed - choice.needed, 1024)
    return f"{flags}: {in_bytes(choice.needed, 1024)}, {less} less ({choice.how})"
