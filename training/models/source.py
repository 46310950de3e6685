"""Load a model's components from a folder or the hub, one at a time, and encode text and video with them."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ModelMixin,
)
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from common.errors import UserError, first_line
from data.buckets import Bucket
from models.fingerprints import weight_files
from models.quantization import compute_frozen, quantize_text_encoder, quantize_transformer


NoiseScheduler = CogVideoXDDIMScheduler | CogVideoXDPMScheduler
CPU = torch.device("cpu")
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelConfigs:
    """The facts that tell the model kinds apart, as `from_pretrained` reads them; the path's name says nothing."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]

    @property
    def is_image_to_video(self) -> bool:
        """Whether the transformer takes an image's latents beside the video's."""
        return self.transformer["in_channels"] != self.vae["latent_channels"]

    @property
    def image_scaling_factor(self) -> float:
        """What the latents of the image to start from are multiplied by.

        Source: `CogVideoXImageToVideoPipeline.prepare_latents`; CogVideoX 1.5 was trained with the inverse.
        """
        factor = self.vae["scaling_factor"]
        return 1 / factor if self.vae["invert_scale_latents"] else factor

    @property
    def native_size(self) -> Bucket:
        """The size that the model was trained at."""
        sample = self.transformer
        height, width = 8 * sample["sample_height"], 8 * sample["sample_width"]
        if sample["patch_size_t"] is not None:
            # Published configs of CogVideoX 1.5 give the 300x300 latents that its positions reach to.
            height, width = min(height, 768), min(width, 1360)
        return Bucket(sample["sample_frames"], height, width)

    @property
    def native_fps(self) -> int:
        """The frame rate of the videos that the model was trained on: CogVideoX 1.5 has patches in time, and 16."""
        return 8 if self.transformer["patch_size_t"] is None else 16

    @property
    def kind(self) -> str:
        """A digest of the transformer's config, which tells model kinds apart wherever the model lies."""
        config = {name: value for name, value in self.transformer.items() if not name.startswith("_")}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ModelSource:
    """Where a CogVideoX model lies: a local folder in the diffusers layout, or a hub id."""

    path: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None

    @property
    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision, "cache_dir": self.cache_dir}

    def configs(self) -> ModelConfigs:
        """Read the three configs; loads no weights.

        Raises:
            UserError: the folder or hub repository is no CogVideoX model, or cannot be reached.
        """
        try:
            transformer = CogVideoXTransformer3DModel.load_config(self.path, subfolder="transformer", **self._where)
            vae = AutoencoderKLCogVideoX.load_config(self.path, subfolder="vae", **self._where)
            scheduler = CogVideoXDPMScheduler.load_config(self.path, subfolder="scheduler", **self._where)
        except OSError as error:
            reason = first_line(error)
            raise UserError(
                f"--pretrained_model_name_or_path: cannot read the model '{self.path}': {reason}"
            ) from error
        for config, expected in (
            (transformer, CogVideoXTransformer3DModel.__name__),
            (vae, AutoencoderKLCogVideoX.__name__),
        ):
            if config.get("_class_name") != expected:
                raise UserError(
                    f"--pretrained_model_name_or_path: '{self.path}' is no CogVideoX model: it holds a "
                    f"{config.get('_class_name')} where a {expected} is needed"
                )
        return ModelConfigs(
            _with_defaults(CogVideoXTransformer3DModel, transformer),
            _with_defaults(AutoencoderKLCogVideoX, vae),
            scheduler,
        )

    def load_scheduler(self) -> NoiseScheduler:
        """Load the noise scheduler of the class that the model's own config names."""
        name = CogVideoXDPMScheduler.load_config(self.path, subfolder="scheduler", **self._where)["_class_name"]
        scheduler_class = CogVideoXDDIMScheduler if name == "CogVideoXDDIMScheduler" else CogVideoXDPMScheduler
        return scheduler_class.from_pretrained(self.path, subfolder="scheduler", **self._where)

    def load_transformer(
        self, dtype: torch.dtype, *, device: torch.device = CPU, quantize: str = "none"
    ) -> CogVideoXTransformer3DModel:
        """Load the transformer weight by weight from its files to the device, in its final precision at once.

        Args:
            dtype: of the weights that are not quantized, and what the quantized ones compute in.
            device: to load to. On the CPU, files whose dtype is `dtype` already are mapped, not read.
            quantize: "none", or "int8", "fp8" or "nf4" for the linear layers of the blocks, which can then no longer
                be trained themselves.

        Raises:
            UserError: the weights cannot be read, or cannot be quantized here.
        """
        config = quantize_transformer(quantize, dtype)
        with self._load_errors("transformer"):
            transformer = CogVideoXTransformer3DModel.from_pretrained(
                self.path,
                subfolder="transformer",
                dtype=dtype,
                variant=self.variant,
                device_map=_device_map(device),
                quantization_config=config,
                **self._where,
            )
        if config is not None:
            compute_frozen(transformer)
        return transformer

    def native_dtype(self) -> torch.dtype:
        """The dtype that the transformer's weights are stored in.

        Raises:
            UserError: there are no weights in safetensors files.
        """
        dtype = self.stored_dtype("transformer")
        if dtype is None:
            raise UserError(f"the transformer of the model '{self.path}' has no safetensors files")
        return dtype

    def stored_dtype(self, component: str) -> torch.dtype | None:
        """The dtype that a component's weights are stored in; None where they are in no safetensors files here."""
        folder = self.local_folder()
        files = weight_files(folder / component, self.variant) if folder else []
        if not files or files[0].suffix != ".safetensors":
            return None
        with safe_open(files[0], "pt") as file:
            return file.get_tensor(next(iter(file.keys()))).dtype

    def load_vae(
        self,
        dtype: torch.dtype,
        *,
        slicing: bool,
        tiling: bool,
        device: torch.device = CPU,
        decoder_only: bool = False,
    ) -> AutoencoderKLCogVideoX:
        """Load the frozen VAE straight in `dtype` and to `device`.

        Args:
            slicing: encode and decode the samples of a batch one after another.
            tiling: encode and decode a frame in overlapping tiles.
            decoder_only: keep the half that decodes; `encoder` is None then, and its weights never reach the device.
        """
        with self._load_errors("VAE"):
            vae = AutoencoderKLCogVideoX.from_pretrained(
                self.path,
                subfolder="vae",
                dtype=dtype,
                variant=self.variant,
                device_map=None if decoder_only else _device_map(device),
                **self._where,
            )
        if decoder_only:
            vae.encoder = None
            vae.to(device)
        if slicing:
            vae.enable_slicing()
        if tiling:
            vae.enable_tiling()
        return vae.requires_grad_(False).eval()

    def load_text_pipeline(
        self, dtype: torch.dtype, *, device: torch.device = CPU, in_8bit: bool = False
    ) -> CogVideoXPipeline:
        """Load tokenizer and text encoder as a pipeline that has nothing else, for its own `encode_prompt`.

        Args:
            dtype: that the text encoder computes in.
            device: to load it to, weight by weight.
            in_8bit: keep the weights of its linear layers in int8; see `quantize_text_encoder`.

        Raises:
            UserError: the weights cannot be read, or cannot be quantized here.
        """
        config = quantize_text_encoder() if in_8bit else None
        with self._load_errors("text encoder"):
            text_encoder = T5EncoderModel.from_pretrained(
                self.path,
                subfolder="text_encoder",
                dtype=dtype,
                variant=self.variant,
                device_map=_device_map(device),
                quantization_config=config,
                **self._where,
            )
            pipeline = CogVideoXPipeline.from_pretrained(
                self.path,
                text_encoder=text_encoder,
                transformer=None,
                vae=None,
                scheduler=None,
                dtype=dtype,
                variant=self.variant,
                **self._where,
            )
        self._check_vocabulary(pipeline.tokenizer)
        if in_8bit:
            compute_frozen(text_encoder)
        text_encoder.requires_grad_(False)
        return pipeline

    def count_long_captions(self, captions: Sequence[str], most_tokens: int) -> int:
        """How many captions have more tokens than the model reads, by the model's own tokenizer."""
        # A token stands for one character at least, beside the end mark and a space in front.
        long = [caption for caption in captions if len(caption) + 2 > most_tokens]
        if not long:
            return 0
        with self._load_errors("tokenizer"):
            # Said outright: left open, a model with code of its own has the user asked whether to run it.
            tokenizer = AutoTokenizer.from_pretrained(
                self.path, subfolder="tokenizer", trust_remote_code=False, **self._where
            )
        self._check_vocabulary(tokenizer)
        return sum(len(tokens) > most_tokens for tokens in tokenizer(long, verbose=False)["input_ids"])

    def _check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Where its files are missing, transformers makes a tokenizer without a word, to which all texts are the same.

        Raises:
            UserError: it is such a one.
        """
        if tokenizer.unk_token_id in tokenizer("a")["input_ids"]:
            raise UserError(
                f"the tokenizer of the model '{self.path}' knows no words: its spiece.model or tokenizer.json is "
                "missing in tokenizer/; get the model anew"
            )

    @contextmanager
    def _load_errors(self, part: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # missing or broken weight files, an unknown variant
            reason = first_line(error)
            raise UserError(f"the {part} of the model '{self.path}' cannot be loaded: {reason}") from error
        except UnpicklingError as error:  # torch's own words advise to let it run
            raise UserError(
                f"the {part} of the model '{self.path}' cannot be loaded: its weights are no safetensors files, and "
                "hold something else than tensors, which may be code; get the model from a source that you trust"
            ) from error

    def download_encoders(self) -> None:
        """Fetch VAE, text encoder and tokenizer of a model on the hub, so that `local_folder` has them.

        Raises:
            UserError: they cannot be had.
        """
        self._download("VAE or text encoder", without=("transformer", "scheduler"))

    def download_transformer(self) -> None:
        """Fetch the transformer of a model on the hub, so that `native_dtype` finds it.

        Raises:
            UserError: it cannot be had.
        """
        self._download("transformer", without=("text_encoder", "tokenizer", "vae", "scheduler"))

    def _download(self, part: str, without: Sequence[str]) -> None:
        if not Path(self.path).is_dir():
            with self._load_errors(part):
                CogVideoXPipeline.download(self.path, variant=self.variant, **dict.fromkeys(without), **self._where)

    def local_folder(self) -> Path | None:
        """Where the model's files are on this machine; None for one on the hub that was never loaded."""
        if Path(self.path).is_dir():
            return Path(self.path)
        config = try_to_load_from_cache(self.path, "vae/config.json", **self._where)
        return Path(config).parent.parent if isinstance(config, str) else None

    def fingerprint(self) -> str:
        """What tells this model from another one in caches: the absolute folder, or the hub id and its revision."""
        folder = Path(self.path).expanduser()
        return str(folder.resolve()) if folder.exists() else f"{self.path}@{self.revision or 'main'}"


def autocast_forward(transformer: CogVideoXTransformer3DModel, device: torch.device, dtype: torch.dtype) -> None:
    """Run the forward pass under autocast and return float32, as accelerate does where weights are not divided."""
    if dtype != torch.float32:
        autocast = torch.autocast(device.type, dtype, cache_enabled=False)
        transformer.forward = convert_outputs_to_fp32(autocast(transformer.forward))


def _device_map(device: torch.device) -> dict[str, torch.device] | None:
    """`from_pretrained`'s way to say that all goes to one device; it sets no hooks for one."""
    return None if device.type == "cpu" else {"": device}


def _with_defaults(model_class: type[ModelMixin], config: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a config lacks, as `from_pretrained` does.

    The published folders of CogVideoX-2b and 5b are older than patches in time and learned positions.
    """
    parameters = inspect.signature(model_class.__init__).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}
    return {**defaults, **config}


def precision_warning(
    compute_dtype: torch.dtype, native_dtype: torch.dtype | None, flag: str = "--mixed_precision"
) -> str | None:
    """What to tell a user who computes in a precision that the model's weights were not made for, if anything.

    Args:
        compute_dtype: of the forward pass.
        native_dtype: that the weights are stored in; None if that is not known.
        flag: which says what to compute in, for the message.
    """
    if (compute_dtype, native_dtype) != (torch.float16, torch.bfloat16):
        return None
    return (
        f"{flag} fp16: this model was trained in bfloat16, whose numbers go up to 3e38; fp16 ends at 65504, "
        f"so that activations overflow, which shows as NaN losses and black videos; use {flag} bf16"
    )


@torch.no_grad()
def encode_prompts(pipeline: CogVideoXPipeline, prompts: list[str], max_sequence_length: int = 226) -> torch.Tensor:
    """Embed prompts exactly as sampling does.

    Args:
        pipeline: with tokenizer and text encoder, on the device to use.
        prompts: B of them; longer ones than `max_sequence_length` tokens are cut.

    Returns:
        `[B, max_sequence_length, D]`, in the text encoder's dtype and on its device.
    """
    prompt_embeds, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
        device=pipeline.text_encoder.device,
        dtype=pipeline.text_encoder.dtype,
    )
    return prompt_embeds


@torch.no_grad()
def encode_videos(vae: AutoencoderKLCogVideoX, videos: torch.Tensor) -> torch.Tensor:
    """Encode videos to the moments of the VAE's posterior.

    Args:
        vae: on the device to use.
        videos: `[B, F, 3, H, W]`, uint8 on any device; F = 4k or 4k + 1.

    Returns:
        `[B, 2C, F', H / 8, W / 8]`: mean and log-variance on the channel axis, unscaled, in the VAE's dtype.
    """
    pixels = videos.to(vae.device).permute(0, 2, 1, 3, 4).to(torch.float32)
    return _encode_pixels(vae, pixels.div_(127.5).sub_(1.0))


@torch.no_grad()
def encode_noised_image(
    vae: AutoencoderKLCogVideoX, image: torch.Tensor, scales: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Encode an image under noise of several strengths to the moments of the VAE's posterior.

    Args:
        vae: on the device to use.
        image: `[3, H, W]`, uint8 on any device.
        scales: `[K]`, the noise's standard deviations, for pixels in [-1, 1].
        generator: of the noise; one on the CPU draws the same for every device.

    Returns:
        `[K, 2C, 1, H / 8, W / 8]`, as `encode_videos` gives them.
    """
    pixels = image.to(generator.device, torch.float32).div(127.5).sub(1.0)
    noise = torch.randn(len(scales), *image.shape, generator=generator, device=generator.device)
    noised = pixels + scales.view(-1, 1, 1, 1) * noise
    moments = [_encode_pixels(vae, one[None, :, None].to(vae.device)) for one in noised]
    return torch.cat(moments)


def _encode_pixels(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> torch.Tensor:
    """`[B, 3, F, H, W]` in [-1, 1] -> moments."""
    height, width = pixels.shape[-2:]
    if vae.use_tiling and (height > vae.tile_sample_min_height or width > vae.tile_sample_min_width):
        _check_tiles(vae)
    # In this layout the CPU's 3D convolutions are several times as fast.
    layout = torch.channels_last_3d if vae.device.type == "cpu" else torch.contiguous_format
    return vae.encode(pixels.to(vae.dtype, memory_format=layout)).latent_dist.parameters


def _check_tiles(vae: AutoencoderKLCogVideoX) -> None:
    """diffusers steps from tile to tile in pixels; a step that is no whole number of latents displaces them."""
    steps = (
        int(vae.tile_sample_min_height * (1 - vae.tile_overlap_factor_height)),
        int(vae.tile_sample_min_width * (1 - vae.tile_overlap_factor_width)),
    )
    if any(step % 8 for step in steps):
        raise UserError(
            f"--use_tiling, --enable_tiling: the tiles of this model's VAE are {steps[0]}x{steps[1]} pixels apart, "
            "which does not divide by 8; leave the flag out"
        )
