"""Settings that the flags leave open: memory that fits, by calculation, by trial, or as before; compiled blocks."""

import logging
from dataclasses import replace

import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import free_memory

from checkpoints.schedule import ScheduleStart, StepSchedule
from checks.speed import check_speed
from cli.schema import replace_flags
from common.errors import UserError
from common.logs import start_logging
from common.ranks import launch_size, uses_deepspeed, uses_fsdp
from data.sampler import BucketBatchSampler
from models.compilation import check_compiler, earns_compilation
from run.dry_run import trial_spec, try_out
from run.memory_fit import choose_by_budget, choose_by_card, chosen_before, has_card, is_left_to_card, step_down
from run.recipe import Recipe


logger = logging.getLogger(__name__)


def fit_into_memory(recipe: Recipe) -> Recipe:
    """Return the recipe with memory settings that fit, unless the flags set them; raise a UserError if none do.

    Called on every rank.
    """
    start_logging()
    flags, chosen = recipe.settings.memory, chosen_before(recipe.settings)
    if chosen is not None:
        logger.info("the memory settings are those that were chosen when the run began")
        recipe = recipe.with_memory(chosen)
    if chosen is None and flags.memory_budget_gb:
        recipe = recipe.with_memory(choose_by_budget(recipe))
    elif is_left_to_card(recipe.settings):
        recipe = recipe.with_memory(choose_by_card(recipe))
    if earns_to_compile(recipe):
        recipe = replace(recipe, settings=replace_flags(recipe.settings, compile=True))
    return fit_by_trial(recipe) if flags.auto_fit and chosen is None else recipe


def earns_to_compile(recipe: Recipe) -> bool:
    """Return whether blocks are compiled unasked: on a GPU, in a long run, where it works and is known to."""
    settings = recipe.settings
    is_divided = uses_deepspeed() or uses_fsdp() or settings.speed.context_parallel_size > 1
    is_package = "flash-attn" in (settings.speed.attention_backend or "")
    if "compile" in settings.given or not has_card() or is_divided or is_package:
        return False
    if settings.training.max_tokens_per_batch:  # every combination of sizes would be compiled
        return False
    try:
        check_speed(replace_flags(settings, compile=True))
        check_compiler(torch.device("cuda"))
    except UserError:
        return False
    return earns_compilation(count_steps(recipe), len(recipe.sizes))


def count_steps(recipe: Recipe) -> int:
    """Return the steps of a run from its beginning."""
    training, data = recipe.settings.training, recipe.data
    if training.max_train_steps:
        return training.max_train_steps
    limit, start = recipe.batch_limit, ScheduleStart(launch_size(), training.gradient_accumulation_steps)
    sampler = BucketBatchSampler.of(data, limit, seed=0, world_size=start.num_ranks)
    schedule = StepSchedule(start, sampler.batches_per_epoch, sampler.batches_in_first_epoch)
    return schedule.end_of_epochs(training.num_train_epochs)


def fit_by_trial(recipe: Recipe) -> Recipe:
    """Save more and more memory until two steps of the largest batch, saving and sampling do not run out of it.

    Raises UserError if they do with all savings.
    """
    while runs_out_of_memory(recipe):
        free_memory()  # reference cycles of the trial
        memory = step_down(recipe)
        if memory is None:
            raise UserError(
                "--auto_fit: the largest batch runs out of memory with all the savings there are; pass a smaller "
                "--train_batch_size, --max_num_frames or smaller buckets"
            )
        recipe = recipe.with_memory(memory)
    free_memory()
    return recipe


def runs_out_of_memory(recipe: Recipe) -> bool:
    """Return whether a trial run runs out of memory; afterwards, only reference cycles hold on to its tensors."""
    try:
        with trial_spec(recipe, samples=False) as spec:
            failures = try_out(spec).failures
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        return True
    return any(torch.OutOfMemoryError.__name__ in failure for failure in failures)
