"""The flags on validation and sampling."""

from dataclasses import dataclass

from flags.schema import flag
from flags.types import DenoisingSteps, NonNegativeFloat, PositiveInt, TableFile, Text


@dataclass(frozen=True)
class ValidationFlags:
    """What is validated, and when."""

    validation_prompt: Text | None = flag(
        None, "Sample videos from these prompts in and after training; --validation_prompt_separator divides them."
    )
    validation_images: str | None = flag(
        None, "Image-to-video: one first frame (path or http(s) URL) per prompt, joined likewise.", metavar="PATHS"
    )
    validation_prompt_separator: str = flag(
        ":::", "Text between two prompts or images; change it if a prompt contains it.", metavar="TEXT"
    )
    num_validation_videos: PositiveInt = flag(
        1, "Videos per prompt, from different noise; each costs a full sampling."
    )
    validation_steps: PositiveInt | None = flag(
        None, "Validate every N optimizer steps.", shown="only once, when training ends"
    )
    validation_epochs: PositiveInt | None = flag(
        None, "Validate every N epochs, for small datasets.", shown="only once, when training ends"
    )
    validate_first: bool | None = flag(
        None,
        "Also validate before the first step: finds errors early, and shows the untrained model.",
        shown="on if anything is validated",
    )
    enable_model_cpu_offload: bool = flag(
        False, "In validation, keep each network on the CPU except while it runs: slower, less GPU memory."
    )
    validation_dataset_file: TableFile | None = flag(
        None,
        "Table of held-out clips, as for --dataset_file. Their loss at nine fixed noise levels is logged at each "
        "validation; if it rises while the training loss falls, the model overfits. Paths start from the table's "
        "folder; columns, --id_token, sizes and frames are those of training (with --load_tensors, of the prepared "
        "data). The clips are encoded when training starts.",
    )
    prompts: tuple[str, ...] = ()  # those of --validation_prompt, one by one
    images: tuple[str, ...] = ()  # those of --validation_images, one by one


@dataclass(frozen=True)
class GuidanceFlags:
    """How a video is sampled; the same values make the same video in validation and in generate.py."""

    num_inference_steps: DenoisingSteps = flag(50, "Denoising steps; fewer are faster but coarser.")
    guidance_scale: NonNegativeFloat = flag(
        6.0, "Strength of classifier-free guidance; higher follows the prompt more closely, 1 or less turns it off."
    )
    use_dynamic_cfg: bool = flag(False, "Increase the guidance over the denoising steps.")
