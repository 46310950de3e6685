"""Read a LoRA to start from, and see whether it fits the model and the flags."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from huggingface_hub import is_offline_mode
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError

from common.errors import UserError, first_line
from common.run_folder import LORA_FILE
from parallel.fsdp import shard_like


_PREFIX = "transformer."  # of the names in a file that diffusers wrote


@dataclass(frozen=True)
class LoraFile:
    """The adapters of a LoRA file in the diffusers format."""

    path: Path | str  # or a hub id
    weights: dict[str, torch.Tensor]  # by their names in the transformer, such as "proj_out.lora_A.weight"
    config: dict[str, Any]  # peft's, from the metadata; empty in a file without any

    @property
    def modules(self) -> set[str]:
        """The full names of the layers that have an adapter."""
        return {name.split(".lora_")[0] for name in self.weights}


def location(reference: Path | str, cache_dir: str | None = None) -> dict[str, Any]:
    """Where a LoRA is, as the arguments of diffusers' functions that load one; they will not unpickle.

    Args:
        reference: its file, or a hub id.
        cache_dir: where files of the hub are kept.
    """
    path = Path(reference)
    if isinstance(reference, Path) or path.is_file():
        where = {"weight_name": path.name, "local_files_only": True}
        return {"pretrained_model_name_or_path_or_dict": path.parent, "use_safetensors": True, **where}
    # Which file a repository has is asked of the hub.
    where = {"weight_name": LORA_FILE if is_offline_mode() else None, "cache_dir": cache_dir}
    return {"pretrained_model_name_or_path_or_dict": reference, "use_safetensors": True, **where}


def read_lora(path: Path | str, cache_dir: str | None = None) -> LoraFile:
    """Read a LoRA; never unpickles.

    Args:
        path: of the file, or a hub id.
        cache_dir: where files of the hub are kept.

    Raises:
        OSError: there is no such file.
        SafetensorError: it is damaged.
        ValueError: it holds something else than adapters of a transformer.
    """
    weights, config = CogVideoXPipeline.lora_state_dict(**location(path, cache_dir), return_lora_metadata=True)
    foreign = [name for name in weights if not name.startswith(_PREFIX) or ".lora_" not in name]
    if foreign or not weights:
        found = f"it holds {foreign[0]}" if foreign else "it is empty"
        raise ValueError(f"{path} is no LoRA of a transformer in the diffusers format: {found}")
    if not isinstance(config, dict | None):
        raise ValueError(f"{path} has metadata that is no object")
    config = {name.removeprefix(_PREFIX): value for name, value in (config or {}).items()}
    if config and not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(f"{path} has metadata, but no lora_alpha there")
    return LoraFile(path, {name.removeprefix(_PREFIX): weight for name, weight in weights.items()}, config)


def load_lora(transformer: CogVideoXTransformer3DModel, file: LoraFile) -> None:
    """Copy the file's values into the transformer's adapters, whatever the dtypes.

    Raises:
        ValueError: the transformer's adapters are not those of the file.
    """
    expected = get_peft_model_state_dict(transformer)
    if _shapes(file.weights) != _shapes(expected):
        raise ValueError(f"{file.path} holds adapters of another rank or of other modules")
    weights = {name: shard_like(weight, expected[name]) for name, weight in file.weights.items()}
    set_peft_model_state_dict(transformer, weights)


def check_starting_lora(path: Path, transformer: CogVideoXTransformer3DModel) -> None:
    """Refuse a LoRA to start from that is not of this model, or was trained with other flags.

    Args:
        path: of the file.
        transformer: with the adapters that the flags ask for; may be on the meta device.

    Raises:
        UserError: lists the flags to give.
    """
    try:
        file = read_lora(path)
    except (OSError, SafetensorError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"--lora_weights: '{path}' cannot be used ({reason}); give a LoRA that diffusers wrote"
        ) from error
    check_layers(file, transformer, "--lora_weights")
    needed = _flags_needed(file, transformer)
    if needed:
        raise UserError(f"--lora_weights: '{path}' was trained with other flags; give {', '.join(needed)}")
    expected = get_peft_model_state_dict(transformer)
    differing = sorted(set(_shapes(file.weights).items()) ^ set(_shapes(expected).items()))
    if differing:
        raise UserError(
            f"--lora_weights: '{path}' holds adapters that no flags describe ({differing[0][0]}); leave the flag out"
        )


def check_layers(file: LoraFile, transformer: CogVideoXTransformer3DModel, flag: str) -> None:
    """Refuse adapters for layers that the model does not have, or has in another size.

    Args:
        transformer: may be on the meta device, and have adapters.
        flag: which named the file, for messages.

    Raises:
        UserError: names the file and one of the adapters.
    """
    # Of a linear layer [out, in], of a convolution [out, in, height, width].
    layers = ((name, getattr(layer, "weight", None)) for name, layer in transformer.named_modules())
    shapes = {name: weight.shape for name, weight in layers if weight is not None}
    for name, weight in file.weights.items():
        shape = shapes.get(name.split(".lora_")[0])
        if shape is None:
            fits = False
        elif ".lora_A." in name:
            fits = weight.shape[1:2] == shape[1:2]
        else:  # lora_B [out, rank], the magnitudes of DoRA [out]
            fits = weight.shape[:1] == shape[:1]
        if not fits:
            raise UserError(
                f"{flag}: '{file.path}' was trained on another model than --pretrained_model_name_or_path: "
                f"its {name} {list(weight.shape)} fits no layer; give that model, or a LoRA of this one"
            )


def _flags_needed(file: LoraFile, transformer: CogVideoXTransformer3DModel) -> list[str]:
    """The flags that would have to be given otherwise, as the user would type them."""
    ours = transformer.peft_config["default"]
    needed = []
    ranks = sorted({weight.shape[0] for name, weight in file.weights.items() if ".lora_A." in name})
    if len(ranks) != 1 or file.config.get("rank_pattern") or file.config.get("alpha_pattern"):
        raise UserError(
            f"--lora_weights: '{file.path}' has layers of different ranks or strengths; leave the flag out"
        )
    if ranks != [ours.r]:
        needed.append(f"--rank {ranks[0]}")
    # A file without metadata does not tell these two.
    alpha = file.config.get("lora_alpha", ours.lora_alpha)
    has_rslora = file.config.get("use_rslora", ours.use_rslora)
    has_dora = any(".lora_magnitude_vector" in name for name in file.weights)
    if alpha != ours.lora_alpha:
        needed.append(f"--lora_alpha {alpha:g}")
    for flag, theirs in (("use_rslora", has_rslora), ("use_dora", has_dora)):
        if theirs != getattr(ours, flag):
            needed.append(f"--{flag}" if theirs else f"no --{flag}")
    modules = {name.split(".lora_")[0] for name in get_peft_model_state_dict(transformer)}
    if file.modules != modules:
        needed.append(
            f"--lora_target_modules {' '.join(_shortest_names(file.modules, len(transformer.transformer_blocks)))}"
        )
    return needed


def _shortest_names(modules: set[str], num_blocks: int) -> list[str]:
    """The names as they are inside a block where all blocks have them, the full ones otherwise."""
    blocks = Counter(_inside_block(name) for name in modules)
    return sorted({short if blocks[short := _inside_block(name)] == num_blocks else name for name in modules})


def _inside_block(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("transformer_blocks.") else name


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}
