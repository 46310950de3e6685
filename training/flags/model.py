"""Which pretrained model, and from where."""

from dataclasses import dataclass

from flags.schema import flag
from flags.types import path


@dataclass(frozen=True)
class DownloadFlags:
    """Which files of a model, and where downloads are kept."""

    revision: str | None = flag(
        None,
        "Branch, tag or commit of the model on the hub. Give a commit to make a run repeatable.",
        shown="the main branch",
    )
    variant: str | None = flag(
        None,
        "Variant of the weight files, such as fp16 for files named *.fp16.safetensors. Only for models that are "
        "stored in several.",
        shown="the plain files",
    )
    cache_dir: str | None = flag(
        None,
        "Where downloaded models are kept. Use it when your home disk is small.",
        type=path,
        metavar="FOLDER",
        shown="the hub's own cache",
    )


@dataclass(frozen=True)
class ModelFlags(DownloadFlags):
    """The model to fine-tune."""

    pretrained_model_name_or_path: str | None = flag(
        None,
        "Required. Model to start from: a hub id such as THUDM/CogVideoX-5b, or a local folder in the diffusers "
        "layout (with model_index.json).",
        type=path,
        metavar="MODEL",
    )


@dataclass(frozen=True)
class EncoderFlags(DownloadFlags):
    """The model whose VAE and text encoder prepare the data."""

    model_id: str = flag(
        "THUDM/CogVideoX-2b",
        "Model whose VAE and text encoder are used: a hub id or a local folder in the diffusers layout. Give the "
        "model that you are going to train.",
        type=path,
        metavar="MODEL",
        also=("--pretrained_model_name_or_path",),
    )
    dtype: str = flag(
        "fp32",
        "Precision of the VAE, the text encoder and what they write. bf16 halves memory and disk space.",
        choices=("fp32", "fp16", "bf16"),
    )


@dataclass(frozen=True)
class SampledModelFlags(DownloadFlags):
    """The model to sample from."""

    pretrained_model_name_or_path: str | None = flag(
        None,
        "Required. Base model: a hub id such as THUDM/CogVideoX-5b, or a local folder in the diffusers layout, "
        "pipeline/ of --save_pipeline too. Its config says whether it makes videos from text or from images.",
        type=path,
        metavar="MODEL",
        also=("--model_path",),
    )
