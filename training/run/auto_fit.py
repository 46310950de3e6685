"""Change a recipe so that the run fits into memory: by calculation, by trial, or as its checkpoint was trained."""

import logging

import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import free_memory

from common.errors import UserError
from common.logs import start_logging
from run.dry_run import trial_spec, try_out
from run.memory_fit import choose_by_budget, choose_by_card, chosen_before, is_left_to_card, step_down
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
    return fit_by_trial(recipe) if flags.auto_fit and chosen is None else recipe


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
