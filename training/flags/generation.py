"""The flags of generate.py."""

from dataclasses import dataclass
from pathlib import Path

from cli.schema import flag
from cli.types import AnyPath, ConditionFrames, FilePath, FiniteFloat, FolderPath, NonNegativeInt, PositiveInt, Text
from common.run_folder import LORA_FILE
from flags.memory import QUANTIZATIONS, text_encoder_flag
from video.controls import KINDS


DEFAULT_FOLDER = "generated"
AS_IT_IS = "none"  # of --compute_control
BASE, COMPARED, SHEET = "-base.mp4", "-compare.mp4", "-compare.png"  # what --compare writes next to each video


@dataclass(frozen=True)
class PlannedVideo:
    """A video to sample."""

    number: int  # of its prompt
    prompt: str
    seed: int
    file: Path

    def beside(self, ending: str) -> Path:
        """Return the file next to the video that has this ending, such as "-base.mp4"."""
        return self.file.with_name(self.file.stem + ending)


@dataclass(frozen=True)
class ResultFlags:
    """The result of training to sample with."""

    lora: tuple[AnyPath, ...] = flag(
        (),
        f"LoRAs: .safetensors files, folders with {LORA_FILE} (of a run, or its checkpoint-N) or hub ids. Each is "
        "applied at the strength it was trained with.",
    )
    lora_scale: tuple[FiniteFloat, ...] | None = flag(
        None, "Multiply the strength of each --lora: 0.5 halves it, 0 turns it off.", shown="1"
    )
    transformer: AnyPath | None = flag(
        None, "Fully fine-tuned: folder with transformer/ (run, checkpoint-N) or hub id.", shown="the base model's"
    )
    ignore_learned_positional_embeddings: bool = flag(
        False, "Drop the learned positional embeddings of CogVideoX-5b-I2V, for a LoRA that was trained without them."
    )
    compare: bool = flag(
        False,
        f"Also sample the base model from the same noise, as *{BASE}, and show both side by side in *{COMPARED} (base "
        f"model on the left), with some frames in *{SHEET}.",
    )


@dataclass(frozen=True)
class ContentFlags:
    """Prompts and first frames of the videos."""

    prompt: tuple[Text, ...] | None = flag(None, "One or more prompts; this or --prompts_file is required.")
    prompts_file: AnyPath | None = flag(
        None,
        "Text file with one prompt per line; or a folder of clips or a table (column caption or text), whose captions "
        "are the prompts, each once.",
    )
    negative_prompt: Text = flag("", "What the videos should not show.", shown="the empty prompt, as in training")
    image: tuple[str, ...] = flag(
        (), "Image-to-video: a first frame per prompt, path or http(s) URL; cropped to its aspect.", metavar="PATH"
    )
    last_image: tuple[str, ...] = flag(
        (), "Also a last frame per prompt, for a model trained with --condition_frames first,last.", metavar="PATH"
    )
    video: tuple[FilePath, ...] = flag(
        (), "Instead a video per prompt, whose end is continued, for a model trained with --condition_frames first:K."
    )
    condition_frames: ConditionFrames | None = flag(
        None,
        "The given frames, as in training.",
        shown="those of training, if the result is in its run's folder; else first, or first,last with --last_image",
    )
    control: tuple[FilePath, ...] = flag(
        (),
        "Control-to-video: a control clip per prompt; frames are taken evenly, and cropped to the video's aspect.",
    )
    compute_control: str | None = flag(
        None,
        "Compute the control from the clips of --control, as the model was trained; inpaint takes a.mask.mp4 or "
        "a.mask.png beside a.mp4. none: the clips are controls already.",
        choices=(*KINDS, AS_IT_IS),
        shown="that of training, if the result is in its run's folder; else none",
    )


@dataclass(frozen=True)
class SamplingFlags:
    """Seeds and sizes of the videos."""

    seed: tuple[NonNegativeInt, ...] = flag((42,), "Seeds of the noise; each prompt is sampled with each seed.")
    num_videos: PositiveInt = flag(1, "Videos per prompt, with the seeds seed, seed + 1 and so on.")
    height: PositiveInt | None = flag(None, "In pixels, a multiple of 16.", metavar="H", shown="the model's own")
    width: PositiveInt | None = flag(None, "In pixels, a multiple of 16.", metavar="W", shown="the model's own")
    num_frames: PositiveInt | None = flag(None, "4k or 4k+1.", shown="the model's own")


@dataclass(frozen=True)
class SamplingMemoryFlags:
    """Precision and memory of sampling."""

    dtype: str = flag(
        "auto",
        "Precision of the networks; auto is that of the model's files on a GPU, fp32 without one.",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    enable_model_cpu_offload: bool = flag(False, "Keep each network on the CPU except while it runs.")
    enable_sequential_cpu_offload: bool = flag(False, "Keep each layer on the CPU except while it runs; very slow.")
    quantize_base: str = flag(
        "none",
        "Store the transformer's linear layers in 8 bits (int8, fp8: torchao) or 4 (nf4: bitsandbytes). fp8 is "
        "faster on GPUs that multiply it. LoRAs are not quantized.",
        choices=QUANTIZATIONS,
    )
    text_encoder_8bit: bool = text_encoder_flag()
    enable_tiling: bool = flag(True, "Let the VAE decode overlapping tiles; without, 480x720 frames take 18 GB.")


@dataclass(frozen=True)
class OutputFlags:
    """Files that are written."""

    output_dir: FolderPath | None = flag(
        None, "Folder of the videos, named by number and beginning of the prompt, and seed.", shown=DEFAULT_FOLDER
    )
    output_file: FilePath | None = flag(None, "File of the only video, instead of --output_dir.")
    overwrite: bool = flag(False, "Overwrite existing files.", shown="an error before anything is sampled")
    as_dataset: bool = flag(
        False,
        "Write each prompt into a .txt file beside its video: the folder is then a data set, such as one for "
        "--regularization_data_root. Existing videos are kept, so that a stopped command can be repeated.",
    )
    fps: PositiveInt | None = flag(None, "Frame rate of files.", shown="the model's own: 8, or 16 for CogVideoX 1.5")
