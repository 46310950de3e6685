"""Which pretrained model, and from where."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import FileName, FolderPath, ModelPath


@dataclass(frozen=True)
class DownloadFlags:
    """Which files of a model, and where downloads are kept."""

    revision: str | None = flag(
        None, "Branch, tag or commit on the hub; a commit is repeatable.", shown="the main branch"
    )
    variant: FileName | None = flag(None, "Variant of weights, as fp16 of *.fp16.safetensors.", shown="plain files")
    cache_dir: FolderPath | None = flag(None, "Folder of downloaded models.", shown="the hub's own cache")


@dataclass(frozen=True)
class ModelFlags(DownloadFlags):
    """The model to fine-tune."""

    pretrained_model_name_or_path: ModelPath | None = flag(
        None,
        "Required. Model to start from: a hub id such as THUDM/CogVideoX-5b, or a local folder in the diffusers "
        "layout (with model_index.json).",
    )


@dataclass(frozen=True)
class EncoderFlags(DownloadFlags):
    """The model whose VAE and text encoder prepare the data."""

    model_id: ModelPath = flag(
        "THUDM/CogVideoX-2b",
        "Model whose VAE and text encoder are used, best the one to train: a hub id or a diffusers folder.",
        alias="pretrained_model_name_or_path",
    )
    dtype: str = flag(
        "fp32",
        "Precision of the VAE, the text encoder and the prepared data; bf16 halves memory and disk space.",
        choices=("fp32", "fp16", "bf16"),
    )


@dataclass(frozen=True)
class SampledModelFlags(DownloadFlags):
    """The model to sample from."""

    pretrained_model_name_or_path: ModelPath | None = flag(
        None,
        "Required. Base model: a hub id such as THUDM/CogVideoX-5b, or a local folder in the diffusers layout, such "
        "as pipeline/ of --save_pipeline. Its config says whether it is text-to-video or image-to-video.",
        alias="model_path",
    )
