"""The flags of convert_lora.py."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import AnyPath, FilePath, FiniteFloat, FolderPath, ModelPath, PositiveInt, Share
from common.run_folder import LORA_FILE
from flags.model import DownloadFlags


DIFFUSERS = "diffusers"
FORMATS = (DIFFUSERS, "comfyui", "videox-fun")


@dataclass(frozen=True)
class ConvertedFlags:
    """What is converted."""

    lora: tuple[AnyPath, ...] = flag(
        (),
        f"LoRA, LoKr or LoHa: .safetensors file of any --format, or folder with {LORA_FILE}. Several become one.",
    )
    lora_scale: tuple[FiniteFloat, ...] | None = flag(None, "Multiply the strength of each --lora.", shown="1")
    transformer: AnyPath | None = flag(
        None, "Instead of --lora, extract one from full fine-tuning: folder with transformer/ (run, checkpoint-N)."
    )


@dataclass(frozen=True)
class BaseModelFlags(DownloadFlags):
    """The base model of an extracted or merged LoRA."""

    pretrained_model_name_or_path: ModelPath | None = flag(
        None,
        "Base model, hub id or diffusers folder: the one that --transformer was tuned from, or that --output_dir "
        "merges --lora into.",
        alias="model_path",
    )


@dataclass(frozen=True)
class ReductionFlags:
    """How much of a change is kept."""

    rank: PositiveInt | None = flag(
        None,
        "Reduce each layer to this rank, by SVD; only the patch embedding keeps all that it learned of a control.",
        shown="the exact rank",
    )
    energy: Share | None = flag(
        None, "Keep the lowest rank of each layer that has this share of the change (squared singular values): 0.9."
    )


@dataclass(frozen=True)
class ConvertedOutputFlags:
    """What is written."""

    format: str = flag(
        DIFFUSERS,
        "Names of the weights: diffusers, also for this toolkit and the CogVideoX wrapper of ComfyUI; comfyui for its "
        "own nodes; videox-fun for VideoX-Fun (CogVideoX-Fun) and its nodes.",
        choices=FORMATS,
    )
    dtype: str | None = flag(
        None, "Precision of the file.", choices=("fp32", "fp16", "bf16"), shown="that of the input"
    )
    output_file: FilePath | None = flag(None, "LoRA to write, a new .safetensors file.")
    output_dir: FolderPath | None = flag(
        None, "Instead, merge --lora into the base model: a new folder, for generate.py --transformer."
    )
