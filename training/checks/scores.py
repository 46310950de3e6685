"""Checks of the flags of score_clips.py."""

from pathlib import Path

from common.errors import UserError
from flags.settings import ScoringSettings


def check_scoring(settings: ScoringSettings) -> None:
    """Check that the table has a place and a suffix that the scripts read."""
    sources, file = settings.sources, settings.scores.output_file
    if file is not None and Path(file).suffix.lower() != ".csv":
        raise UserError(f"--output_file: {file} must end in .csv")
    if file is None and sources.data_root is None and sources.dataset_file is None:
        raise UserError("--output_file: required with --dataset_name but no --data_root")
