"""The flags on experiment trackers and the hub, and those of compare_runs.py."""

from dataclasses import dataclass
from typing import Annotated

from cli.schema import flag
from cli.types import FileName, FilePath, FolderPath, PositiveInt, Value
from common.hub_token import HubToken


# What each tracker needs: one of these packages.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "comet_ml": ("comet_ml",),
}


@dataclass(frozen=True)
class TrackingFlags:
    """Experiment trackers."""

    report_to: str = flag(
        "tensorboard",
        "Tracker of losses and validation videos; all uses every installed one. A tracker that fails is a warning and "
        "never ends a run. A resumed run continues the tracker's run.",
        choices=(*TRACKERS, "all", "none"),
    )
    tracker_name: FileName = flag("cogvideox-lora", "Project name in the tracker.")
    logging_dir: FolderPath = flag("logs", "Folder of the tracker's files, inside --output_dir.")
    logging_steps: PositiveInt = flag(
        10, "Fetch and log the losses of all steps every N optimizer steps; 1 makes the device wait."
    )


@dataclass(frozen=True)
class HubFlags:
    """Upload of the result."""

    push_to_hub: bool = flag(
        False, "Upload the result to the hub after training; the token's permission is checked before."
    )
    hub_token: Annotated[HubToken, Value(HubToken, "TOKEN")] | None = flag(
        None,
        "Token for --push_to_hub. It is not saved, but shells keep it in their history and launchers show it if a run "
        "fails. Better log in with `hf auth login`, or set HF_TOKEN.",
        shown="these",
    )
    hub_model_id: str | None = flag(None, "Repository to push to.", metavar="ORG/NAME", shown="name of --output_dir")


@dataclass(frozen=True)
class ComparisonFlags:
    """The runs to compare, and the page."""

    runs: tuple[FolderPath, ...] = flag(
        (), "Output folders of runs; of one run, its own page is made again.", metavar="RUN", is_positional=True
    )
    output_file: FilePath | None = flag(
        None, "Page to write.", shown="comparison.html in the folder of the runs; for one run, its report.html"
    )
