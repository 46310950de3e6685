"""Change a run's flags so that it fits into memory: by calculation, by trial, or as it was when it is resumed."""

import logging

import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import free_memory

from common.errors import UserError
from common.logs import start_logging
from data.plan import TrainingData
from flags.settings import TrainingSettings
from run.dry_run import trial_spec, try_out
from run.memory_fit import choose_by_budget, chosen_before, step_down, with_settings
from run.spec import Method, Task


logger = logging.getLogger(__name__)


def fit_into_memory(
    settings: TrainingSettings,
    data: TrainingData,
    task: Task,
    method: Method,
) -> tuple[TrainingSettings, Method]:
    """Flags and method with the settings of memory to train with; as they are without one of the two flags on that.

    Raises:
        UserError: nothing fits.
    """
    start_logging()
    chosen = chosen_before(settings)
    if chosen is not None:
        logger.info("settings of memory are those that were chosen when the run began")
        return with_settings(settings, method, chosen)
    if settings.memory.memory_budget_gb:
        settings, method = with_settings(settings, method, choose_by_budget(settings, data, method))
    if settings.memory.auto_fit:
        settings, method = fit_by_trial(settings, data, task, method)
    return settings, method


def fit_by_trial(
    settings: TrainingSettings,
    data: TrainingData,
    task: Task,
    method: Method,
) -> tuple[TrainingSettings, Method]:
    """Go on to stronger savings until two steps of the largest batch, saving and sampling do not run out of memory.

    Raises:
        UserError: they do with all there are.
    """
    while runs_out_of_memory(settings, data, task, method):
        free_memory()  # of what the trial left in cycles
        memory = step_down(settings, data, method)
        if memory is None:
            raise UserError(
                "--auto_fit: the largest batch runs out of memory with all the savings there are; give a smaller "
                "--train_batch_size, --max_num_frames or smaller buckets"
            )
        settings, method = with_settings(settings, method, memory)
    free_memory()
    return settings, method


def runs_out_of_memory(
    settings: TrainingSettings,
    data: TrainingData,
    task: Task,
    method: Method,
) -> bool:
    """Try a run out. Nothing of it is held on to when this returns, but by cycles: not by the error, nor the
    accelerator."""
    try:
        with trial_spec(settings, data, task, method, samples=False) as spec:
            _, failures = try_out(spec)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        return True
    return any(torch.OutOfMemoryError.__name__ in failure for failure in failures)
