"""The flags on experiment trackers and the hub."""

from dataclasses import dataclass

from common.hub_token import HubToken
from flags.schema import flag
from flags.types import path, positive_int


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
        "Where losses and validation videos are logged; all means every tracker that is installed. One that "
        "fails is a warning and never ends a run; a resumed run goes on in the trackers' runs of before.",
        choices=(*TRACKERS, "all", "none"),
    )
    tracker_name: str = flag("cogvideox-lora", "Project name in the tracker.", metavar="NAME")
    logging_dir: str = flag("logs", "Folder of the tracker's files, inside --output_dir.", type=path, metavar="FOLDER")
    logging_steps: int = flag(
        10,
        "Fetch loss values from the device and write them to the trackers every N optimizer steps. Every step's "
        "value is logged, in batches; 1 shows them at once but makes the device wait.",
        type=positive_int,
        metavar="N",
    )


@dataclass(frozen=True)
class HubFlags:
    """Upload of the result."""

    push_to_hub: bool = flag(
        False,
        "Upload the result to the Hugging Face hub when training ends; whether the token may do so is looked at "
        "before it starts.",
    )
    hub_token: HubToken | None = flag(
        None,
        "Token for --push_to_hub. It is written nowhere here, but shells keep it in their history and launchers "
        "show it when a run fails: better log in once with `hf auth login`, or set HF_TOKEN.",
        type=HubToken,
        metavar="TOKEN",
        shown="these",
    )
    hub_model_id: str | None = flag(
        None, "Repository that --push_to_hub writes to.", metavar="ORG/NAME", shown="the name of --output_dir"
    )
