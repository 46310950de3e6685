"""The flags on experiment trackers."""

import argparse
from importlib.util import find_spec

from common.errors import UserError
from flags.types import choice, path


# What each tracker needs: one of these packages.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "comet_ml": ("comet_ml",),
}


def add_tracking_flags(group: argparse._ArgumentGroup, method: str) -> None:
    group.add_argument(
        "--report_to",
        **choice((*TRACKERS, "all", "none")),
        default="tensorboard",
        help="Where losses and validation videos are logged; all means every tracker that is installed. One that "
        "fails is a warning and never ends a run; a resumed run goes on in the trackers' runs of before. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--tracker_name",
        metavar="NAME",
        default=f"cogvideox-{method}",
        help="Project name in the tracker. (default: %(default)s)",
    )
    group.add_argument(
        "--logging_dir",
        metavar="FOLDER",
        type=path,
        default="logs",
        help="Folder of the tracker's files, inside --output_dir. (default: %(default)s)",
    )


def check_tracker(report_to: str) -> None:
    """A tracker that is asked for by name is installed.

    Raises:
        UserError: it is not.
    """
    if report_to in TRACKERS and not any(map(find_spec, TRACKERS[report_to])):
        raise UserError(
            f"--report_to {report_to}: it is not installed; pip install {report_to}, or give --report_to none"
        )
