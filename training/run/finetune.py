"""The training run, for every task and method: set up, the loop, the result."""

import argparse
import logging
from pathlib import Path

from common.failures import explained_failures
from common.ranks import launch_rank
from common.signals import STOPPED_EXIT_CODE
from data.plan import TrainingData
from results.publish import check_access, push_to_hub
from run.auto_fit import fit_into_memory
from run.config import card_facts, write_config
from run.dry_run import dry_run
from run.loop import train
from run.memory_fit import training_memory_advice
from run.setup import Run, set_up
from run.spec import Method, Task, check_spec
from tracking.traces import PROFILE_FOLDER, profiled


logger = logging.getLogger(__name__)


def finetune(args: argparse.Namespace, data: TrainingData, task: Task, method: Method) -> None:
    """Fine-tune a model on `data` and write the result to `args.output_dir`; called on every rank.

    Raises:
        UserError: model, data and flags do not go together, or the result must not be uploaded as asked; raised before
            any weights are loaded. Or memory ran out, or a data worker died.
    """
    if args.push_to_hub and launch_rank() == 0:
        check_access(Path(args.output_dir), args.hub_model_id, args.hub_token)
    with explained_failures(lambda: training_memory_advice(args, data, method)):
        args, method = fit_into_memory(args, data, task, method, train)
        if args.dry_run:
            dry_run(args, data, task, method, train)
        else:
            run_spec(args, data, task, method)


def run_spec(args: argparse.Namespace, data: TrainingData, task: Task, method: Method) -> None:
    """Set up, train, save, validate and upload."""
    spec = check_spec(args, data, task, method)
    spec.coordinator.from_main(lambda: write_config(spec))
    run = set_up(spec)
    if args.validate_first and run.state.step == 0:
        run.validate(0)
    with run.signals:
        with profiled(profile_folder(args, run), run.state.step) as next_step:
            done = train(args, run, next_step)
        if done < run.total_steps:
            leave(run, done)
        # The result is safe before the last validation, which can fail or take long.
        if run.state.step < run.total_steps:
            run.save_checkpoint(run.total_steps)
        logger.info("saved %s; to use it:\n\n%s\n", run.save_result(), run.usage)
        run.validate(run.total_steps)
    run.accelerator.end_training()  # the loss curve is drawn to its end
    if args.push_to_hub and run.accelerator.is_main_process:
        push_to_hub(run.output_dir, args.hub_model_id, args.hub_token, card_facts(spec, run.total_steps))


def leave(run: Run, step: int) -> None:
    """End a run that was told to stop, when it is saved.

    Raises:
        SystemExit: always, with a code of its own.
    """
    run.accelerator.end_training()
    logger.info("stopped after step %d of %d; go on with --resume_from_checkpoint latest", step, run.total_steps)
    raise SystemExit(STOPPED_EXIT_CODE)


def profile_folder(args: argparse.Namespace, run: Run) -> Path | None:
    """Where the main process records what steps do, if that was asked for."""
    return run.output_dir / PROFILE_FOLDER if args.profile and run.accelerator.is_main_process else None
