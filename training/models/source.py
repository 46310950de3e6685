"""Load a model's components from a folder or the hub, one at a time, and encode text and video with them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from common.errors import UserError, first_line
from models.configs import CPU, ModelConfigs, _with_defaults
from models.fingerprints import weight_files
from models.quantization import compute_frozen, quantize_text_encoder, quantize_transformer


NoiseScheduler = CogVideoXDDIMScheduler | CogVideoXDPMScheduler


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


def _device_map(device: torch.device) -> dict[str, torch.device] | None:
    """`from_pretrained`'s way to say that all goes to one device; it sets no hooks for one."""
    return None if device.type == "cpu" else {"": device}
