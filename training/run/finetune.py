"""A training run from its settings to its result, for every task and method."""

import logging
from contextlib import nullcontext
from typing import NoReturn

from common.failures import explained_failures
from common.folder_lock import locked_folder
from common.ranks import launch_rank
from common.signals import STOPPED_EXIT_CODE
from flags.settings import TrainingSettings
from planning.samples import TrainingData
from results.publish import check_access, push_to_hub
from run.auto_fit import fit_into_memory
from run.config import card_facts, write_config
from run.dry_run import dry_run
from run.loop import train
from run.memory_fit import training_memory_advice
from run.recipe import Recipe
from run.setup import Run, set_up
from run.spec import check_spec
from run.summary import describe_end
from validation.defaults import with_data_defaults


logger = logging.getLogger(__name__)


def finetune(settings: TrainingSettings, data: TrainingData) -> None:
    """Fine-tune a model on `data` and write the result to `--output_dir`; called on every rank.

    Raises UserError before any weights are loaded, if model, data and flags do not fit together, another process
    writes to the folder, or the result must not be uploaded as asked; later, if memory runs out or a data worker dies.
    """
    recipe, hub = Recipe(with_data_defaults(settings, data), data), settings.hub
    if hub.push_to_hub and launch_rank() == 0:
        check_access(recipe.output_dir, hub.hub_model_id, hub.hub_token)
    # The other ranks belong to the main one; a dry run changes nothing in the folder.
    is_locked = launch_rank() == 0 and not settings.training.dry_run
    lock = locked_folder(recipe.output_dir) if is_locked else nullcontext()
    with lock, explained_failures(lambda: training_memory_advice(recipe)):
        recipe = fit_into_memory(recipe)
        if settings.training.dry_run:
            dry_run(recipe)
        else:
            train_and_save(recipe)


def train_and_save(recipe: Recipe) -> None:
    """Set up and train, and have the run's page say how it ends."""
    spec = check_spec(recipe)
    run = set_up(spec)
    spec.coordinator.from_main(lambda: write_config(spec))
    with run.report:
        train_to_the_end(run)


def train_to_the_end(run: Run) -> None:
    """Train, save, validate and upload."""
    spec, settings = run.spec, run.spec.settings
    if run.state.step == 0 and (run.measures_loss(0) or run.samples(0)):
        run.validate(0)
    with run.signals:
        with run.memory.phase("training"):
            done = train(run)
        if done < run.total_steps:
            stop(run, done)
        if run.guard.skipped_since is not None and run.guard.skipped_since < done:
            end_after_skipped_steps(run, run.guard.skipped_since)
        # Saved before the last validation, which can fail or take long.
        if run.state.step < run.total_steps:
            run.save_checkpoint(run.total_steps)
        logger.info("saved %s; to use it:\n\n%s\n", run.save_result(), spec.usage(spec.output_dir))
        run.validate(run.total_steps)
        for line in describe_end(spec, run.curve):
            logger.info("%s", line)
    logger.info("%s", run.memory.describe())
    spec.accelerator.end_training()  # finishes the loss curve
    if settings.hub.push_to_hub and spec.accelerator.is_main_process:
        facts = card_facts(spec, run.total_steps)
        push_to_hub(spec.output_dir, settings.hub.hub_model_id, settings.hub.hub_token, facts)


def end_after_skipped_steps(run: Run, since: int) -> NoReturn:
    """End a run whose steps were all skipped from `since` on: save the weights before them, and raise a UserError.

    There is no checkpoint of the last step, so that a resumed run tries the skipped steps again, and the weights get a
    folder of their own, so that a launcher does not take the run for finished.
    """
    result = run.save_result(run.spec.output_dir / f"good-step-{since - 1}")
    run.spec.accelerator.end_training()
    raise run.guard.failure(
        f"all steps from step {since} to the last, {run.total_steps}, were skipped, as loss or gradient were not "
        f"finite: {result} has the weights of step {since - 1}"
    )


def stop(run: Run, step: int) -> NoReturn:
    """End a run that was told to stop, after its state is saved: raise SystemExit with `STOPPED_EXIT_CODE`."""
    run.spec.accelerator.end_training()
    logger.info("stopped after step %d of %d; continue with --resume_from_checkpoint latest", step, run.total_steps)
    raise SystemExit(STOPPED_EXIT_CODE)
