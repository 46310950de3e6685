"""The flags of generate.py."""

from dataclasses import dataclass
from pathlib import Path

from common.run_folder import LORA_FILE
from flags.memory import QUANTIZATIONS, text_encoder_flag
from flags.schema import flag
from flags.types import finite_float, non_negative_int, path, positive_int, prose


DEFAULT_FOLDER = "generated"
BASE, COMPARED, SHEET = "-base.mp4", "-compare.mp4", "-compare.png"  # what --compare writes beside each video


@dataclass(frozen=True)
class PlannedVideo:
    """A video to be sampled."""

    number: int  # of its prompt
    prompt: str
    seed: int
    file: Path  # where it goes

    def beside(self, ending: str) -> Path:
        """The file of that ending which belongs to the video, such as "-base.mp4"."""
        return self.file.with_name(self.file.stem + ending)


@dataclass(frozen=True)
class ResultFlags:
    """The result of training to sample with."""

    lora: tuple[str, ...] = flag(
        (),
        f"LoRAs: .safetensors files, folders with {LORA_FILE} (of a run, or its checkpoint-N) or hub ids. Each is "
        "applied at the strength it was trained with.",
        type=path,
        metavar="PATH",
        shown="none",
    )
    lora_scale: tuple[float, ...] | None = flag(
        None,
        "A factor on the strength of each --lora: 0.5 is half of it, 0 is none.",
        type=finite_float,
        metavar="X",
        shown="1",
    )
    transformer: str | None = flag(
        None,
        "All weights, tuned: a folder with transformer/ (of a run, or its checkpoint-N) or a hub id; it takes "
        "the place of the base model's.",
        type=path,
        metavar="PATH",
        shown="the base model's",
    )
    ignore_learned_positional_embeddings: bool = flag(
        False, "Drop the learned positions of CogVideoX-5b-I2V. Give it with a LoRA that was trained so."
    )
    compare: bool = flag(
        False,
        f"Also sample the base model from the same noise, as *{BASE}, and show both: side by side in *{COMPARED} "
        f"(the base model is on the left), some frames in *{SHEET}.",
    )


@dataclass(frozen=True)
class ContentFlags:
    """What the videos show."""

    prompt: tuple[str, ...] | None = flag(
        None, "This or --prompts_file is required. One or several prompts.", type=prose, metavar="TEXT"
    )
    prompts_file: str | None = flag(None, "Text file with a prompt on each line.", type=path, metavar="FILE")
    negative_prompt: str = flag(
        "", "What guidance leads away from.", type=prose, metavar="TEXT", shown="the empty prompt, as in training"
    )
    image: tuple[str, ...] = flag(
        (),
        "Image-to-video: first frames, a path or http(s) URL for each prompt; they are cut to the video's aspect.",
        metavar="PATH",
    )


@dataclass(frozen=True)
class SamplingFlags:
    """Seeds and sizes of the videos."""

    seed: tuple[int, ...] = flag(
        (42,), "Seeds of the noise; each prompt is sampled with each of them.", type=non_negative_int, metavar="N"
    )
    num_videos: int = flag(
        1, "Videos per prompt: with the seed, the seed + 1 and so on.", type=positive_int, metavar="N"
    )
    height: int | None = flag(None, "In pixels.", type=positive_int, metavar="H", shown="the model's own")
    width: int | None = flag(None, "In pixels.", type=positive_int, metavar="W", shown="the model's own")
    num_frames: int | None = flag(None, "4k or 4k+1.", type=positive_int, metavar="N", shown="the model's own")


@dataclass(frozen=True)
class SamplingMemoryFlags:
    """Precision and memory of sampling."""

    dtype: str = flag(
        "auto",
        "What the networks compute in. auto: what the model's own files are stored in, and fp32 without a GPU.",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    enable_model_cpu_offload: bool = flag(False, "Keep each network on the CPU except while it works.")
    enable_sequential_cpu_offload: bool = flag(
        False, "Keep each layer on the CPU except while it works: least memory, very slow."
    )
    quantize_base: str = flag(
        "none",
        "Store the transformer's linear layers in 8 bits (int8, fp8: by torchao) or 4 (nf4: by bitsandbytes, "
        "needs a GPU); LoRAs stay as they are.",
        choices=QUANTIZATIONS,
    )
    text_encoder_8bit: bool = text_encoder_flag()
    enable_tiling: bool = flag(
        True,
        "Let the VAE work on overlapping tiles of a frame, as validation does; whole, frames of 480x720 take 18 GB.",
    )


@dataclass(frozen=True)
class OutputFlags:
    """Files that are written."""

    output_dir: str | None = flag(
        None,
        "Where the videos go, named by number and beginning of their prompt and by their seed.",
        type=path,
        metavar="FOLDER",
        shown=f"{DEFAULT_FOLDER}",
    )
    output_file: str | None = flag(None, "In its place, the name of the only video.", type=path, metavar="FILE")
    overwrite: bool = flag(
        False, "Write over files that are there.", shown="they are an error, before anything is sampled"
    )
    fps: int | None = flag(
        None,
        "Frame rate of the written files.",
        type=positive_int,
        metavar="N",
        shown="the model's own, 8, or 16 for CogVideoX 1.5",
    )
