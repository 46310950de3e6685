"""What a video is made from besides its prompt: the choice on the page, and the flags of each script that it means."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import slug
from flags.generation import AS_IT_IS
from results.run_record import RunRecord, read_run
from studio.places import inside
from video.condition_frames import ENDS
from video.controls import KINDS


TEXT, IMAGE, BOTH, BEGINNING = "text only", "first frame", "first and last frame", "first K frames"
CONTROL = "control video"
FILES = {  # what sampling asks for, by the choice
    IMAGE: "First frames: an image for each prompt",
    BOTH: "First and last frames: two images for each prompt",
    BEGINNING: "Videos to continue, one for each prompt",
    CONTROL: "Videos to follow, one for each prompt",
}
CHOICES = (TEXT, *FILES)
OWN = "own clips"
CONTROLS = (*KINDS, OWN)


@dataclass(frozen=True)
class Given:
    """A choice with its details."""

    kind: str = TEXT  # of CHOICES
    latents: int = 3  # BEGINNING: the latent frames that the first frames fill
    control: str = OWN  # CONTROL: computed from the clips, or OWN

    @property
    def task(self) -> str:
        """The task that is trained."""
        return {TEXT: "text-to-video", CONTROL: "control-to-video"}.get(self.kind, "image-to-video")

    @property
    def detail(self) -> list[str]:
        """The flag of the frames that are not only the first, or of the control that is computed."""
        frames = {BOTH: ENDS, BEGINNING: f"first:{self.latents}"}
        if self.kind in frames:
            return ["--condition_frames", frames[self.kind]]
        return ["--compute_control", self.control] if self.kind == CONTROL and self.control != OWN else []

    @property
    def prepared(self) -> list[str]:
        """The flags of what is prepared."""
        what = {TEXT: [], CONTROL: ["--save_control_latents"]}.get(self.kind, ["--save_image_latents"])
        return [*what, *self.detail]

    @property
    def name(self) -> str:
        """The end of the name of prepared data."""
        plain = {TEXT: "", CONTROL: "-controls"}.get(self.kind, "-images")
        return f"-{slug(self.detail[1])}" if self.detail else plain

    def sampled(self, files: Sequence[str]) -> list[str]:
        """Return the flags that sample from files; a UserError if there are none but some are needed."""
        if self.kind == TEXT:
            return []
        if not files:
            raise UserError(f"{FILES[self.kind]}: choose or type them")
        files = [f"./{file}" if file.startswith("-") else file for file in files]  # otherwise it would be a flag
        if self.kind == BOTH:
            return ["--image", *files[::2], *(["--last_image", *files[1::2]] if files[1:] else [])]
        if self.kind == CONTROL:
            return ["--control", *files, *(self.detail or ["--compute_control", AS_IT_IS])]
        return ["--video" if self.kind == BEGINNING else "--image", *files, *self.detail]


def find_run(root: Path, lora: str | None) -> RunRecord | None:
    """Return the run in whose folder a LoRA is; None for one of the hub or from elsewhere."""
    with suppress(UserError):
        folder = inside(root, lora or root)
        for place in (folder, *folder.parents)[: len(folder.relative_to(root).parts)]:
            with suppress(UserError):
                return read_run(place)
    return None


def given_of(run: RunRecord) -> Given:
    """Return what a run was trained with."""
    task, control = run.facts.get("task"), run.flags.get("compute_control")
    if task != "image-to-video":
        kind = CONTROL if task == "control-to-video" else TEXT
        return Given(kind, control=control if control in CONTROLS else OWN)
    frames = str(run.flags.get("condition_frames"))
    context = re.fullmatch(r"first:(\d+)", frames)
    return Given(BEGINNING, int(context[1])) if context else Given(BOTH if frames == ENDS else IMAGE)
