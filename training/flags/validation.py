"""The flags on validation and sampling."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import DenoisingSteps, NonNegativeFloat, PositiveInt, Probability, TableFile, Text


@dataclass(frozen=True)
class ValidationFlags:
    """What is validated, and when."""

    validation_prompt: Text | None = flag(
        None,
        "Prompts to sample; divided by --validation_prompt_separator. Begin each with --id_token, if there is one.",
        shown="text-to-video: two captions of the training data, if another flag asks for validation and there is no "
        "--validation_dataset_file",
    )
    validation_images: str | None = flag(
        None,
        "Image-to-video: a first frame (path, URL) a prompt. With --condition_frames first,last: FIRST,LAST; with "
        "first:K: a video whose end is continued.",
        metavar="PATHS",
    )
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
    validation_fraction: Probability = flag(
        0.05,
        "Share of the clips (at least one, at most 8) that is not trained on. Their loss under fixed noise is logged "
        "before, during and after training, in at most 3% of its work; if it rises while the training loss falls, "
        "the model overfits. With fewer than 10 clips or about 100 samples in the run, none is held out unless this "
        "is set; 0 turns it off.",
    )
    validation_dataset_file: TableFile | None = flag(
        None,
        "Table of clips, as for --dataset_file, to hold out instead of a --validation_fraction; all are used. Paths "
        "start from the table's folder; columns, --id_token, sizes and frames are those of training (with "
        "--load_tensors, of the prepared data). The clips are encoded when training starts. Without a prompt, "
        "their loss is also measured at --validation_steps and --validation_epochs.",
    )
    prompts: tuple[str, ...] = ()  # those of --validation_prompt, one by one, or captions
    uses_captions: bool = False  # captions of the training data are the prompts
    images: tuple[str, ...] = ()  # those of --validation_images, one by one
    controls: tuple[str, ...] = ()  # those of --validation_controls, one by one

    @property
    def has_videos(self) -> bool:
        """Whether videos are sampled."""
        return bool(self.prompts) or self.uses_captions


SAMPLING_CACHES = ("none", "first-block", "pab", "faster")  # models/sampling.py has their settings
SCHEDULERS = ("model", "ddim", "dpm")


@dataclass(frozen=True)
class GuidanceFlags:
    """How a video is sampled; the same values make the same video in validation and in generate.py."""

    num_inference_steps: DenoisingSteps = flag(50, "Denoising steps; fewer are faster but coarser.")
    guidance_scale: NonNegativeFloat = flag(
        6.0, "Strength of classifier-free guidance; higher follows the prompt more closely, 1 or less turns it off."
    )
    use_dynamic_cfg: bool = flag(False, "Increase the guidance over the denoising steps.")
    sampling_scheduler: str = flag(
        "model",
        "Sampler: that of the model's files (the published ones name DDIM), ddim, or dpm, which the authors recommend "
        "for 5b and 1.5. ddim needs fewer steps for the same video; dpm draws noise at each step.",
        choices=SCHEDULERS,
    )
    sampling_cache: str = flag(
        "none",
        "Reuse results of earlier denoising steps: faster and less exact. pab (attention) changes least and saves "
        "least, faster most of both; both take a tensor of each block in memory and no compiled blocks. first-block "
        "skips the other blocks where the first one changes little.",
        choices=SAMPLING_CACHES,
    )
