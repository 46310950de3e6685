"""Change a run's flags so that it fits into memory: by calculation, by trial, or as it was when it is resumed."""

import argparse
import logging
from collections.abc import Callable

import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import free_memory

from common.errors import UserError
from common.logs import start_logging
from data.plan import TrainingData
from run.dry_run import trial_spec, try_out
from run.memory_fit import choose_by_budget, chosen_before, step_down, with_settings
from run.setup import Run
from run.spec import Method, Task


logger = logging.getLogger(__name__)


def fit_into_memory(
    args: argparse.Namespace,
    data: TrainingData,
    task: Task,
    method: Method,
    train: Callable[[argparse.Namespace, Run], None],
) -> tuple[argparse.Namespace, Method]:
    """Flags and method with the settings of memory to train with; as they are without one of the two flags on that.

    Args:
        train: the loop.

    Raises:
        UserError: nothing fits.
    """
    start_logging()
    chosen = chosen_before(args)
    if chosen is not None:
        logger.info("settings of memory are those that were chosen when the run began")
        return with_settings(args, method, chosen)
    if args.memory_budget_gb:
        args, method = with_settings(args, method, choose_by_budget(args, data, method))
    if args.auto_fit:
        args, method = fit_by_trial(args, data, task, method, train)
    return args, method


def fit_by_trial(
    args: argparse.Namespace,
    data: TrainingData,
    task: Task,
    method: Method,
    train: Callable[[argparse.Namespace, Run], None],
) -> tuple[argparse.Namespace, Method]:
    """Go on to stronger savings until two steps of the largest batch, saving and sampling do not run out of memory.

    Raises:
        UserError: they do with all there are.
    """
    while runs_out_of_memory(args, data, task, method, train):
        free_memory()  # of what the trial left in cycles
        settings = step_down(args, data, method)
        if settings is None:
            raise UserError(
                "--auto_fit: the largest batch runs out of memory with all the savings there are; give a smaller "
                "--train_batch_size, --max_num_frames or smaller buckets"
            )
        args, method = with_settings(args, method, settings)
    free_memory()
    return args, method


def runs_out_of_memory(
    args: argparse.Namespace,
    data: TrainingData,
    task: Task,
    method: Method,
    train: Callable[[argparse.Namespace, Run], None],
) -> bool:
    """Try a run out. Nothing of it is held on to when this returns, but by cycles: not by the error, nor the
    accelerator."""
    try:
        with trial_spec(args, data, task, method, samples=False) as spec:
            _, failures = try_out(spec, train)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        return True
    return any(torch.OutOfMemoryError.__name__ in failure for failure in failures)
