"""Load the components of a model from a folder or the hub, one at a time."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from socket import gaierror
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
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from common.errors import UserError, first_line
from models.configs import CPU, ModelConfigs, with_defaults
from models.fingerprints import weight_files
from models.quantization import compute_frozen, quantize_remaining, quantize_text_encoder, quantize_transformer


NoiseScheduler = CogVideoXDDIMScheduler | CogVideoXDPMScheduler


@dataclass(frozen=True)
class ModelSource:
    """The location of a CogVideoX model: a local folder in the diffusers layout, or a hub id."""

    path: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None

    @property
    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision, "cache_dir": self.cache_dir}

    def _weights(self, dtype: torch.dtype, device: torch.device = CPU) -> dict[str, Any]:
        # A device map of one device, for which `from_pretrained` sets no hooks.
        device_map = None if device.type == "cpu" else {"": device}
        return {"dtype": dtype, "variant": self.variant, "device_map": device_map, **self._where}

    def configs(self) -> ModelConfigs:
        """Read the three configs, no weights; raises a UserError if they are not CogVideoX's or cannot be read."""
        networks = {"transformer": CogVideoXTransformer3DModel, "vae": AutoencoderKLCogVideoX}
        try:
            configs = {
                component: component_class.load_config(self.path, subfolder=component, **self._where)
                for component, component_class in {**networks, "scheduler": CogVideoXDPMScheduler}.items()
            }
        except OSError as error:
            reason = self._why(error)
            raise UserError(
                f"--pretrained_model_name_or_path: cannot read the model '{self.path}': {reason}"
            ) from error
        for component, network in networks.items():
            name = configs[component].get("_class_name")
            if name != network.__name__:
                raise UserError(
                    f"--pretrained_model_name_or_path: '{self.path}' is not a CogVideoX model: it holds a {name} "
                    f"where a {network.__name__} is needed"
                )
            configs[component] = with_defaults(network, configs[component])
        found = ModelConfigs(**configs)
        return replace(found, pipeline=self._pipeline_class()) if found.takes_condition else found

    def _pipeline_class(self) -> str:
        """Return the name of the pipeline's class, or "" if the model has no model_index.json."""
        try:
            return CogVideoXPipeline.load_config(self.path, **self._where)["_class_name"]
        except (OSError, KeyError):
            return ""

    def load_scheduler(self, kind: str = "model") -> NoiseScheduler:
        """Load the noise scheduler: "ddim", "dpm", or for "model" of the class that the model's config names."""
        if kind == "model":
            name = CogVideoXDPMScheduler.load_config(self.path, subfolder="scheduler", **self._where)["_class_name"]
            kind = "ddim" if name == "CogVideoXDDIMScheduler" else "dpm"
        scheduler_class = CogVideoXDDIMScheduler if kind == "ddim" else CogVideoXDPMScheduler
        return scheduler_class.from_pretrained(self.path, subfolder="scheduler", **self._where)

    def load_transformer(
        self, dtype: torch.dtype, *, device: torch.device = CPU, quantize: str = "none"
    ) -> CogVideoXTransformer3DModel:
        """Load the transformer weight by weight to the device, directly in its final precision.

        Args:
            dtype: of the weights that are not quantized; the quantized ones compute in it.
            device: to load to. On the CPU, files that are stored in `dtype` are mapped, not read.
            quantize: "none", or "int8", "fp8" or "nf4" for the linear layers of the blocks, which are then frozen.
        """
        weights = self._weights(dtype, device)
        weights["quantization_config"] = quantize_transformer(quantize, dtype, device)
        with self._load_errors("transformer"):
            transformer = CogVideoXTransformer3DModel.from_pretrained(self.path, subfolder="transformer", **weights)
        quantize_remaining(transformer, quantize, dtype)
        compute_frozen(transformer)
        return transformer

    def native_dtype(self) -> torch.dtype:
        """Return the dtype that the transformer's weights are stored in; needs safetensors files."""
        dtype = self.stored_dtype("transformer")
        if dtype is None:
            raise UserError(f"the transformer of the model '{self.path}' has no safetensors files")
        return dtype

    def stored_dtype(self, component: str) -> torch.dtype | None:
        """Return the dtype of a component's stored weights; None if it has no safetensors files here."""
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
        """Load the frozen VAE directly in `dtype` and to `device`.

        Args:
            slicing: encode and decode the samples of a batch one after another.
            tiling: encode and decode a frame in overlapping tiles.
            decoder_only: drop the encoder, before its weights reach the device.
        """
        weights = self._weights(dtype, CPU if decoder_only else device)
        with self._load_errors("VAE"):
            vae = AutoencoderKLCogVideoX.from_pretrained(self.path, subfolder="vae", **weights)
        if decoder_only:
            vae.encoder = None
            vae.to(device)
        vae.use_slicing, vae.use_tiling = slicing, tiling
        return vae.requires_grad_(False).eval()

    def load_text_pipeline(
        self, dtype: torch.dtype, *, device: torch.device = CPU, in_8bit: bool = False
    ) -> CogVideoXPipeline:
        """Load a pipeline with only tokenizer and text encoder, weight by weight, for its `encode_prompt`.

        Args:
            dtype: that the text encoder computes in.
            in_8bit: quantize its linear layers to int8; see `quantize_text_encoder`.
        """
        weights = self._weights(dtype, device)
        if in_8bit:
            weights["quantization_config"] = quantize_text_encoder()
        with self._load_errors("text encoder"):
            text_encoder = T5EncoderModel.from_pretrained(self.path, subfolder="text_encoder", **weights)
            pipeline = CogVideoXPipeline.from_pretrained(
                self.path,
                text_encoder=text_encoder,
                **dict.fromkeys(("transformer", "vae", "scheduler")),
                **self._weights(dtype),
            )
        self._check_vocabulary(pipeline.tokenizer)
        compute_frozen(text_encoder)
        text_encoder.requires_grad_(False)
        return pipeline

    def find_long_captions(self, captions: Iterable[str], most_tokens: int) -> set[str]:
        """Return the captions with more tokens than the model reads, with the model's tokenizer."""
        # A token has at least one character, except the end token and a leading space.
        long = [caption for caption in captions if len(caption) + 2 > most_tokens]
        if not long:
            return set()
        tokens = self._load_tokenizer()(long, verbose=False)["input_ids"]
        return {caption for caption, ids in zip(long, tokens, strict=True) if len(ids) > most_tokens}

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the number of tokens of each caption, with the one that ends it, with the model's tokenizer."""
        return list(map(len, self._load_tokenizer()(list(captions), verbose=False)["input_ids"])) if captions else []

    def find_unknown_captions(self, captions: Iterable[str]) -> set[str]:
        """Return the captions of which more than half of the characters are unknown to the model's tokenizer."""
        foreign = {caption for caption in captions if not caption.isascii()}
        characters = sorted(character for character in set().union(*foreign) if not character.isascii())
        if not characters:
            return set()
        # One by one, because a tokenizer makes one unknown token of a row of unknown characters.
        tokenizer = self._load_tokenizer()
        tokens = tokenizer(characters, add_special_tokens=False)["input_ids"]
        unknown = {one for one, ids in zip(characters, tokens, strict=True) if tokenizer.unk_token_id in ids}
        return {
            caption
            for caption in foreign
            if 2 * sum(one in unknown for one in caption) > sum(not one.isspace() for one in caption)
        }

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        with self._load_errors("tokenizer"):
            # By default transformers asks the user whether to run a model's own code.
            options = {"subfolder": "tokenizer", "trust_remote_code": False, **self._where}
            tokenizer = AutoTokenizer.from_pretrained(self.path, **options)
        self._check_vocabulary(tokenizer)
        return tokenizer

    def _check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise a UserError for a tokenizer without vocabulary, which transformers makes if files are missing."""
        if tokenizer.unk_token_id in tokenizer("a")["input_ids"]:
            raise UserError(
                f"the tokenizer of the model '{self.path}' knows no words: its spiece.model or tokenizer.json is "
                "missing in tokenizer/; download the model again"
            )

    @contextmanager
    def _load_errors(self, part: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # missing or broken weight files, an unknown variant
            raise UserError(f"the {part} of the model '{self.path}' cannot be loaded: {self._why(error)}") from error
        except UnpicklingError as error:  # torch's message advises to load it anyway
            raise UserError(
                f"the {part} of the model '{self.path}' cannot be loaded: its weights are not safetensors files, and "
                "hold something other than tensors, which may be code; get the model from a source that you trust"
            ) from error

    def _why(self, error: Exception) -> str:
        """Return why files of the model cannot be read; the libraries' words hide that the hub was not reached."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LocalEntryNotFoundError | ConnectionError | gaierror):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            return first_line(error)
        offline = "this is offline (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else "the hub cannot be reached"
        return (
            f"{offline}, and its files are not all in {self.cache_dir or HF_HUB_CACHE}; run `hf download {self.path}` "
            "where there is a connection, or pass the path of a folder with the model"
        )

    def download(self, *components: str) -> None:
        """Fetch components of a model on the hub, by the names of their folders, so that `local_folder` has them."""
        if not Path(self.path).is_dir():
            others = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}.difference(components)
            with self._load_errors(" or ".join(components)):
                CogVideoXPipeline.download(self.path, variant=self.variant, **dict.fromkeys(others), **self._where)

    def local_folder(self) -> Path | None:
        """Return the folder with the model's files; None for a hub model that was never downloaded."""
        if Path(self.path).is_dir():
            return Path(self.path)
        config = try_to_load_from_cache(self.path, "vae/config.json", **self._where)
        return Path(config).parent.parent if isinstance(config, str) else None

    def fingerprint(self) -> str:
        """Return a key of the model for caches: the absolute folder, or the hub id and its revision."""
        folder = Path(self.path).expanduser()
        return str(folder.resolve()) if folder.exists() else f"{self.path}@{self.revision or 'main'}"
