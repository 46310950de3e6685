"""The flags on what is validated, and how videos are sampled."""

from dataclasses import dataclass

from flags.schema import flag
from flags.types import denoising_steps, non_negative_float, positive_int, prose, table_file


@dataclass(frozen=True)
class ValidationFlags:
    """What is validated, and when."""

    validation_prompt: str | None = flag(
        None,
        "Prompts to make videos from during and after training, several joined by --validation_prompt_separator. "
        "Without it nothing is validated.",
        type=prose,
        metavar="TEXT",
    )
    validation_images: str | None = flag(
        None,
        "Image-to-video: first frames, one path or http(s) URL per prompt, joined by the same separator.",
        metavar="PATHS",
    )
    validation_prompt_separator: str = flag(
        ":::", "What stands between two prompts or two images; change it when a prompt contains it.", metavar="TEXT"
    )
    num_validation_videos: int = flag(
        1,
        "Videos per prompt; more show how much the seed matters, each costs a full sampling.",
        type=positive_int,
        metavar="N",
    )
    validation_steps: int | None = flag(
        None,
        "Validate every N optimizer steps.",
        type=positive_int,
        metavar="N",
        shown="only once, when training ends",
    )
    validation_epochs: int | None = flag(
        None,
        "Validate every N epochs; handy when the dataset is small.",
        type=positive_int,
        metavar="N",
        shown="only once, when training ends",
    )
    validate_first: bool | None = flag(
        None,
        "Validate once before the first step: what would fail after hours fails now, and the videos of the "
        "untrained model stand beside all later ones. --no-validate_first saves the time.",
        shown="on whenever anything is validated",
    )
    enable_model_cpu_offload: bool = flag(
        False, "In validation keep each network on the CPU except while it works: slower, but needs less GPU memory."
    )
    validation_dataset_file: str | None = flag(
        None,
        "Table of clips held out from training, as --dataset_file takes it; their loss at nine fixed noise "
        "levels is logged at each validation: when it rises while the training loss falls, the model overfits. "
        "Paths in it always start from the table's own folder, whatever --data_root is. Columns, --id_token, "
        "sizes and frames are those of the training clips, with --load_tensors as these were prepared; the clips "
        "are encoded when training starts.",
        type=table_file,
        metavar="FILE",
        shown="none",
    )
    prompts: tuple[str, ...] = ()  # those of --validation_prompt, one by one
    images: tuple[str, ...] = ()  # those of --validation_images, one by one


@dataclass(frozen=True)
class GuidanceFlags:
    """How a video is sampled; the same values make the same video in validation and in generate.py."""

    num_inference_steps: int = flag(
        50, "Denoising steps; fewer are faster but coarser.", type=denoising_steps, metavar="N"
    )
    guidance_scale: float = flag(
        6.0,
        "Strength of classifier-free guidance; higher follows the prompt more closely, 1 and below switch it off.",
        type=non_negative_float,
        metavar="X",
    )
    use_dynamic_cfg: bool = flag(
        False, "Let the guidance grow over the denoising steps instead of keeping it constant."
    )
