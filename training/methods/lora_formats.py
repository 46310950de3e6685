"""The names that tools give to the weights of a LoRA: read any, write one of them.

| format | a weight | alpha |
|---|---|---|
| diffusers | transformer.transformer_blocks.0.attn1.to_q.lora_A.weight | in the metadata, as peft's config |
| comfyui | diffusion_model.blocks.0.q.lora_A.weight | a tensor of each layer |
| videox-fun | lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight | a tensor of each layer |
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import UserError, first_line
from common.files import atomic_write
from flags.conversion import DIFFUSERS
from methods.lora_factors import Factors, exact_factors
from methods.lora_file import KINDS, PART


_BLOCK_LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
_BLOCK_LAYERS += ("norm1.linear", "norm2.linear")
_OTHER_LAYERS = ("patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out")
_OTHER_LAYERS += tuple(f"{kind}_embedding.linear_{number}" for kind in ("time", "ofs") for number in (1, 2))
_MOST_BLOCKS = 64  # the largest published model has 42
# What differs between the names of diffusers and those of comfy/ldm/cogvideo/model.py.
_OF_COMFYUI = {
    "transformer_blocks.": "blocks.",
    "attn1.to_out.0": "attn_out",
    "attn1.to_": "",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
    "_embedding.linear_": "_embedding_linear_",
}
_PARTS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}  # videox-fun's -> peft's


def layer_name(layer: str, format: str) -> str:
    """Return the name of a layer of the transformer in a format."""
    if format == "comfyui":
        for old, new in _OF_COMFYUI.items():
            layer = layer.replace(old, new)
        return f"diffusion_model.{layer}"
    if format == "videox-fun":
        return f"lora_unet__{layer.replace('.', '_')}"
    return f"transformer.{layer}"


def _foreign_layers() -> dict[str, str]:
    """Return the names in other formats than diffusers' -> the layers."""
    blocks = [f"transformer_blocks.{number}.{name}" for number in range(_MOST_BLOCKS) for name in _BLOCK_LAYERS]
    layers = [*blocks, *_OTHER_LAYERS]
    return {layer_name(layer, format): layer for format in ("comfyui", "videox-fun") for layer in layers}


@dataclass(frozen=True)
class AdapterFile:
    """A file with adapters in any format; weights are read layer by layer."""

    file: Path
    kind: str  # lora, lokr, loha
    dtype: torch.dtype
    names: dict[str, dict[str, str]]  # layer of the transformer -> end of peft's name -> name in the file
    strengths: dict[str, float]  # alpha / rank, by layer

    @property
    def has_dora(self) -> bool:
        """Whether it learned the magnitudes of weights too."""
        return any("lora_magnitude_vector" in parts for parts in self.names.values())

    def read(self, layer: str, device: torch.device) -> Factors:
        """Return the exact factors of a layer; raise a UserError if they are not finite."""
        with safe_open(self.file, "pt", device=str(device)) as opened:
            weights = {part: opened.get_tensor(name) for part, name in self.names[layer].items()}
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise UserError(f"--lora: {self.file} has NaN or infinite weights; pass an earlier checkpoint")
        return exact_factors(self.kind, weights, self.strengths[layer])


def open_adapters(file: str) -> AdapterFile:
    """Open a file of adapters; raise a UserError if it is damaged or incomplete, or does not say its alpha."""
    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            alphas = {name: opened.get_tensor(name).item() for name in shapes if name.endswith(".alpha")}
            weights = [name for name in shapes if name not in alphas]
            dtype = opened.get_tensor(weights[0]).dtype
            config = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        config = {name.removeprefix("transformer."): value for name, value in config.items()}
        names = _sort_names(weights)
        (kind,) = {KINDS[part[:4]] for parts in names.values() for part in parts}
        on_meta = {name: torch.empty(shapes[name], device="meta") for name in weights}
        for parts in names.values():
            exact_factors(kind, {part: on_meta[name] for part, name in parts.items()}, 1.0)
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"--lora: '{file}' cannot be used ({first_line(error)}); pass a LoRA of a CogVideoX transformer"
        ) from error
    strengths = {layer: _strength(kind, parts, shapes, alphas, config) for layer, parts in names.items()}
    if None in strengths.values():
        raise UserError(f"--lora: '{file}' has no metadata on its alpha; pass a LoRA that this toolkit wrote")
    return AdapterFile(Path(file), kind, dtype, names, strengths)


def _sort_names(names: list[str]) -> dict[str, dict[str, str]]:
    """Return layer -> end of peft's name -> name in the file; raise a ValueError for a name of no known format."""
    foreign, sorted_names = _foreign_layers(), defaultdict(dict)
    for name in names:
        stem, *parts = PART.split(name)
        # Some tools write one underscore after the prefix.
        stem = re.sub(r"^lora_unet_(?!_)", "lora_unet__", stem)
        layer = foreign.get(stem) or (stem.removeprefix("transformer.") if stem.startswith("transformer.") else None)
        if len(parts) != 1 or layer is None:
            raise ValueError(f"it holds {name}")
        sorted_names[layer][_PARTS.get(*parts, *parts)] = name
    return dict(sorted_names)


def _strength(
    kind: str, parts: Mapping[str, str], shapes: Mapping[str, list[int]], alphas: Mapping[str, float], config: Mapping
) -> float | None:
    """Return the strength of a layer, from its alpha in the file or from peft's config; None if neither says it."""
    name = next(iter(parts.values()))
    layer = PART.split(name)[0]
    alpha = alphas.get(f"{layer}.alpha")
    if alpha is None:
        alpha = _of_layer(config, "alpha_pattern", layer, config.get("lora_alpha", config.get("alpha")))
    rank = shapes[parts["lora_A.weight"]][0] if kind == "lora" else config.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int):
        return None
    return alpha / rank ** (0.5 if config.get("use_rslora") else 1)


def _of_layer(config: Mapping, pattern: str, layer: str, default: float | None) -> float | None:
    values = config.get(pattern) or {}
    return values.get(get_pattern_key(values, layer), default)


def write_lora(file: Path, layers: Mapping[str, Factors], format: str) -> None:
    """Write a LoRA, complete or not at all, with the alpha of each layer where tools of the format read it."""
    down_part, up_part = ("lora_down.weight", "lora_up.weight") if format == "videox-fun" else _PARTS.values()
    weights = {}
    for layer, factors in layers.items():
        name = layer_name(layer, format)
        weights |= {f"{name}.{down_part}": factors.down, f"{name}.{up_part}": factors.up}
        if format != DIFFUSERS:
            weights[f"{name}.alpha"] = torch.tensor(factors.strength * factors.rank)
    weights = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    with atomic_write(file) as path:
        if format != DIFFUSERS:
            save_file(weights, path)
            return
        config = _config({layer: factors.rank for layer, factors in layers.items()}, layers)
        weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        CogVideoXPipeline.save_lora_weights(
            path.parent, weights, weight_name=path.name, transformer_lora_adapter_metadata=config.to_dict()
        )


def _config(ranks: Mapping[str, int], layers: Mapping[str, Factors]) -> LoraConfig:
    """Return peft's config: the most frequent rank and alpha, and those of the other layers."""
    alphas = {layer: factors.strength * factors.rank for layer, factors in layers.items()}
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(layers),
        rank_pattern={layer: value for layer, value in ranks.items() if value != rank},
        alpha_pattern={layer: value for layer, value in alphas.items() if value != alpha},
    )
