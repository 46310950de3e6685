"""`--auto_fit`: try out the largest batch before training, with ever stronger savings of memory until it fits."""

import argparse
from collections.abc import Callable

import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import free_memory

from errors import UserError
from memory_fit import step_down
from memory_settings import apply_settings, read_settings
from plan import TrainingData
from recipe import Method, Recipe, Task
from run_setup import Run
from trial_run import trial_recipe, try_out


def fit_by_trial(
    args: argparse.Namespace,
    data: TrainingData,
    task: Task,
    method: Method,
    train: Callable[[argparse.Namespace, Run], None],
) -> tuple[argparse.Namespace, Method]:
    """Find the settings under which two steps of the largest batch, saving and sampling do not run out of memory.

    Args:
        train: the loop.

    Returns:
        Flags and method with the first settings that fit, beginning with those given.

    Raises:
        UserError: none do.
    """
    while True:
        with trial_recipe(args, data, task, method) as recipe:
            is_too_large = runs_out_of_memory(recipe, train)
            fitting = step_down(recipe, args.given) if is_too_large else recipe
        if fitting is None:
            raise UserError(
                "--auto_fit: the largest batch runs out of memory with all the savings there are; give a smaller "
                "--train_batch_size, --max_num_frames or smaller buckets"
            )
        args, method = apply_settings(args, read_settings(fitting.args, args.method)), fitting.method
        if not is_too_large:
            return args, method


def runs_out_of_memory(recipe: Recipe, train: Callable[[argparse.Namespace, Run], None]) -> bool:
    """Try a recipe out, and let go of all that it held."""
    try:
        _, failures = try_out(recipe, train)
        is_too_large = any(torch.OutOfMemoryError.__name__ in failure for failure in failures)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        is_too_large = True
    # Not in the handler: until it ends, the error holds on to what was on the device.
    recipe.accelerator.free_memory()
    free_memory()
    return is_too_large
