"""Compare runs on one page: which learned, their curves over each other, the settings that differ, their last videos.

python training/compare_runs.py outputs/*
python training/compare_runs.py outputs/my-lora      # makes the page of one run again, from the files in its folder
"""

from collections.abc import Sequence
from pathlib import Path

from args import parse_compare_args
from common.errors import one_line, one_line_errors
from flags.settings import ComparisonSettings


def compare_runs(settings: ComparisonSettings) -> Path:
    """Write the page and return its file; a UserError if a folder is not that of a run."""
    from pages.page import write_page
    from results.run_comparison import render_comparison
    from results.run_page import render_run
    from results.run_record import read_run

    file = Path(settings.comparison.output_file)
    records = [read_run(Path(run)) for run in settings.comparison.runs]
    page = render_run(records[0], file.parent) if len(records) == 1 else render_comparison(records, file.parent)
    write_page(file, page)
    return file


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the flags of `argv`, or of the command line if it is None."""
    with one_line_errors("run the same command again"):
        print(f"wrote {one_line(compare_runs(parse_compare_args(argv)))}")


if __name__ == "__main__":
    main()
