"""Checks of the flags of compare_runs.py."""

import os
from dataclasses import replace
from pathlib import Path

from checks.files import check_writable
from common.errors import UserError
from common.run_folder import FACTS_FILE, METRICS_FILE, REPORT_FILE
from flags.settings import ComparisonSettings


COMPARISON_FILE = "comparison.html"


def settle_comparison(settings: ComparisonSettings) -> ComparisonSettings:
    """Return the settings with folders of runs, each once, and the page that is written."""
    runs = list(dict.fromkeys(map(os.path.normpath, settings.comparison.runs)))
    for run in runs:
        if not any(os.path.isfile(os.path.join(run, name)) for name in (METRICS_FILE, FACTS_FILE)):
            raise UserError(f"RUN: {run} has no {METRICS_FILE}; pass the --output_dir of a run")
    file = settings.comparison.output_file
    if file is None:
        file = os.path.join(runs[0], REPORT_FILE) if len(runs) == 1 else _beside(runs)
    if Path(file).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output_file: {file} must end in .html")
    check_writable(os.path.dirname(file) or ".", "--output_file")
    return replace(settings, comparison=replace(settings.comparison, runs=tuple(runs), output_file=file))


def _beside(runs: list[str]) -> str:
    """Return the page in the folder that all runs are in."""
    file = os.path.join(os.path.commonpath([os.path.dirname(os.path.abspath(run)) for run in runs]), COMPARISON_FILE)
    return min(os.path.relpath(file), file, key=len)
