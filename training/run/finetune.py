"""A training run from its settings to its result, for every task and method."""

import logging
from pathlib import Path

from common.failures import explained_failures
from common.ranks import launch_rank
from common.signals import STOPPED_EXIT_CODE
from data.plan import TrainingData
from flags.settings import TrainingSettings
from results.publish import check_access, push_to_hub
from run.auto_fit import fit_into_memory
from run.config import card_facts, write_config
from run.dry_run import dry_run
from run.loop import train
from run.memory_fit import training_memory_advice
from run.setup import Run, set_up
from run.spec import Method, Task, check_spec


logger = logging.getLogger(__name__)


def finetune(settings: TrainingSettings, data: TrainingData, task: Task, method: Method) -> None:
    """Fine-tune a model on `data` and write the result to `--output_dir`; called on every rank.

    Raises:
        UserError: model, data and flags do not go together, or the result must not be uploaded as asked; raised before
            any weights are loaded. Or memory ran out, or a data worker died.
    """
    if settings.hub.push_to_hub and launch_rank() == 0:
        check_access(Path(settings.training.output_dir), settings.hub.hub_model_id, settings.hub.hub_token)
    with explained_failures(lambda: training_memory_advice(settings, data, method)):
        settings, method = fit_into_memory(settings, data, task, method)
        if settings.training.dry_run:
            dry_run(settings, data, task, method)
        else:
            train_and_save(settings, data, task, method)


def train_and_save(settings: TrainingSettings, data: TrainingData, task: Task, method: Method) -> None:
    """Set up, train, save, validate and upload."""
    spec = check_spec(settings, data, task, method)
    spec.coordinator.from_main(lambda: write_config(spec))
    run = set_up(spec)
    if settings.validation.validate_first and run.state.step == 0:
        run.validate(0)
    with run.signals:
        done = train(run)
        if done < run.total_steps:
            stop(run, done)
        # The result is safe before the last validation, which can fail or take long.
        if run.state.step < run.total_steps:
            run.save_checkpoint(run.total_steps)
        logger.info("saved %s; to use it:\n\n%s\n", run.save_result(), run.usage)
        run.validate(run.total_steps)
    run.accelerator.end_training()  # the loss curve is drawn to its end
    if settings.hub.push_to_hub and run.accelerator.is_main_process:
        push_to_hub(
            run.output_dir, settings.hub.hub_model_id, settings.hub.hub_token, card_facts(spec, run.total_steps)
        )


def stop(run: Run, step: int) -> None:
    """End a run that was told to stop, after its state is saved.

    Raises:
        SystemExit: always, with a code of its own.
    """
    run.accelerator.end_training()
    logger.info("stopped after step %d of %d; continue with --resume_from_checkpoint latest", step, run.total_steps)
    raise SystemExit(STOPPED_EXIT_CODE)
