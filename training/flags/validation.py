"""The flags on validation and sampling."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import DenoisingSteps, NonNegativeFloat, PositiveInt, TableFile, Text


@dataclass(frozen=True)
class ValidationFlags:
    """What is validated, and when."""

    validation_prompt: Text | None = flag(
        None,
        "Prompts to sample; divided by --validation_prompt_separator. Begin each with --id_token, if there is one.",
        shown="text-to-video: two captions of the training data, if another flag asks for validation and there is no "
        "--validation_dataset_file",
    )
    validation_images: str | None = flag(None, "Image-to-video: a first frame (path, URL) a prompt.", metavar="PATHS")
    validation_controls: str | None = flag(
        None,
        "Control-to-video: a control clip a prompt; with --compute_control, a clip that its control is computed from.",
        metavar="PATHS",
    )
    validation_prompt_separator: str = flag(":::", "Text between two prompts, images or controls.", metavar="TEXT")
    num_validation_videos: PositiveInt = flag(1, "Videos per prompt, of different noise; each costs a full sampling.")
    validation_steps: PositiveInt | None = flag(None, "Validate every N steps.", shown="only once, when training ends")
    validation_epochs: PositiveInt | None = flag(None, "Validate every N epochs.", shown="only when training ends")
    validate_first: bool | None = flag(
        None, "Also validate before the first step, to find errors early.", shown="on if anything is validated"
    )
    enable_model_cpu_offload: bool = flag(False, "In validation, keep networks on the CPU except while they run.")
    validation_dataset_file: TableFile | None = flag(
        None,
        "Table of held-out clips, as for --dataset_file. Their loss at nine fixed noise levels is logged at each "
        "validation; if it rises while the training loss falls, the model overfits. Paths start from the table's "
        "folder; columns, --id_token, sizes and frames are those of training (with --load_tensors, of the prepared "
        "data). The clips are encoded when training starts.",
    )
    prompts: tuple[str, ...] = ()  # those of --validation_prompt, one by one, or captions
    uses_captions: bool = False  # captions of the training data are the prompts
    images: tuple[str, ...] = ()  # those of --validation_images, one by one
    controls: tuple[str, ...] = ()  # those of --validation_controls, one by one

    @property
    def has_videos(self) -> bool:
        """Whether videos are sampled."""
        return bool(self.prompts) or self.uses_captions


@dataclass(frozen=True)
class GuidanceFlags:
    """How a video is sampled; the same values make the same video in validation and in generate.py."""

    num_inference_steps: DenoisingSteps = flag(50, "Denoising steps; fewer are faster but coarser.")
    guidance_scale: NonNegativeFloat = flag(
        6.0, "Strength of classifier-free guidance; higher follows the prompt more closely, 1 or less turns it off."
    )
    use_dynamic_cfg: bool = flag(False, "Increase the guidance over the denoising steps.")
