"""Read a file of adapters, LoRA, LoKr or LoHa, and check that it fits the model and the flags."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from huggingface_hub import is_offline_mode
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError

from common.errors import UserError, first_line
from common.run_folder import LORA_FILE
from flags.training import LOKR_FACTOR
from methods.lora_factors import Factors, exact_factors
from parallel.fsdp import shard_like


PATCHES = "patch_embed.proj"  # the layer whose inputs a control widens
_PREFIX = "transformer."  # of the names in a diffusers file
PART = re.compile(r"\.(?=lora_|lokr_|hada_)")  # between the name of a layer and that of a weight of its adapter
KINDS = {"lora": "lora", "lokr": "lokr", "hada": "loha"}  # the beginning of the weights' names -> the adapter


@dataclass(frozen=True)
class LoraFile:
    """The adapters of a LoRA file in the diffusers format."""

    path: Path | str  # or a hub id
    weights: dict[str, torch.Tensor]  # by their names in the transformer, such as "proj_out.lora_A.weight"
    config: dict[str, Any]  # peft's, from the metadata; empty if the file has none

    @property
    def kind(self) -> str:
        """The adapter: lora, lokr or loha."""
        return KINDS[PART.split(next(iter(self.weights)))[1][:4]]

    @property
    def alpha(self) -> float | None:
        """The alpha of its training; None if the file does not say it."""
        return self.config.get("lora_alpha" if self.kind == "lora" else "alpha")

    @property
    def strength(self) -> float | None:
        """The strength of its training, alpha / rank, which diffusers applies; None if the file does not say it."""
        if "r" not in self.config:
            return None
        return self.alpha / self._divisor(self.config["r"])

    def _divisor(self, rank: int) -> float:
        return rank ** (0.5 if self.config.get("use_rslora") else 1)

    def factors(self, scale: float = 1.0) -> Iterator[tuple[str, Factors]]:
        """Yield the layers and their exact factors, with a multiple of the strength of the training."""
        layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, weight in self.weights.items():
            layer, part = PART.split(name)
            layers[layer][part] = weight
        for layer, weights in layers.items():
            rank, alpha = (self.config.get(f"{name}_pattern", {}).get(layer) for name in ("rank", "alpha"))
            own = self.strength if rank is None else (alpha or self.alpha) / self._divisor(rank)
            yield layer, exact_factors(self.kind, weights, scale * own)


def location(reference: Path | str, cache_dir: str | None = None) -> dict[str, Any]:
    """Return a LoRA's location, a file or a hub id, as arguments of diffusers' loading functions; never unpickle."""
    path = Path(reference)
    if isinstance(reference, Path) or path.is_file():
        reference, where = path.parent, {"weight_name": path.name, "local_files_only": True}
    else:  # diffusers asks the hub for the name of a repository's file
        where = {"weight_name": LORA_FILE if is_offline_mode() else None, "cache_dir": cache_dir}
    return {"pretrained_model_name_or_path_or_dict": reference, "use_safetensors": True, **where}


def read_lora(path: Path | str, cache_dir: str | None = None) -> LoraFile:
    """Read a LoRA, a file or a hub id, without unpickling.

    Raises OSError if there is none, SafetensorError if it is damaged, ValueError if it is not of a transformer.
    """
    weights, config = CogVideoXPipeline.lora_state_dict(**location(path, cache_dir), return_lora_metadata=True)
    foreign = [name for name in weights if not name.startswith(_PREFIX) or not PART.search(name)]
    if foreign or not weights:
        found = f"it holds {foreign[0]}" if foreign else "it is empty"
        raise ValueError(f"{path} is not a LoRA of a transformer in the diffusers format: {found}")
    if not isinstance(config, dict | None):
        raise ValueError(f"{path} has metadata that is not an object")
    config = {name.removeprefix(_PREFIX): value for name, value in (config or {}).items()}
    file = LoraFile(path, {name.removeprefix(_PREFIX): weight for name, weight in weights.items()}, config)
    if (config or file.kind != "lora") and not isinstance(file.alpha, int | float):
        raise ValueError(f"{path} has metadata without {'lora_alpha' if file.kind == 'lora' else 'alpha'}")
    if file.kind != "lora" and not isinstance(config.get("r"), int):
        raise ValueError(f"{path} has metadata without r")
    return file


def load_lora(transformer: CogVideoXTransformer3DModel, file: LoraFile) -> None:
    """Copy the file's values into the transformer's adapters, whatever the dtypes; raise a ValueError for others."""
    expected = get_peft_model_state_dict(transformer)
    if _shapes(file.weights) != _shapes(expected):
        raise ValueError(f"{file.path} holds adapters of another rank or of other modules")
    weights = {name: shard_like(weight, expected[name]) for name, weight in file.weights.items()}
    set_peft_model_state_dict(transformer, weights)


def complete_inputs(file: LoraFile, transformer: CogVideoXTransformer3DModel) -> LoraFile:
    """Return a LoRA to start from with the transformer's own adapter of a control's inputs, if the file has none."""
    own = transformer.peft_config["default"]
    if PATCHES not in own.rank_pattern or PATCHES in _modules(file.weights):
        return file
    adapters = get_peft_model_state_dict(transformer).items()
    weights = {name: weight for name, weight in adapters if PART.split(name)[0] == PATCHES}
    config = file.config
    for pattern in ("rank_pattern", "alpha_pattern") if config else ():
        config = config | {pattern: {**(config.get(pattern) or {}), PATCHES: getattr(own, pattern)[PATCHES]}}
    return replace(file, weights=file.weights | weights, config=config)


def check_starting_lora(path: Path, transformer: CogVideoXTransformer3DModel) -> None:
    """Check that a LoRA to start from fits a transformer, with the flags' adapters and maybe on the meta device."""
    file = read_fitting_lora(path, transformer, "--lora_weights")
    _check_kind_for_control(file, transformer)
    file = complete_inputs(file, transformer)
    if needed := _flags_needed(file, transformer):
        raise UserError(f"--lora_weights: '{path}' was trained with other flags; pass {', '.join(needed)}")
    expected = get_peft_model_state_dict(transformer)
    differing = sorted(set(_shapes(file.weights).items()) ^ set(_shapes(expected).items()))
    if differing:
        raise UserError(
            f"--lora_weights: '{path}' holds adapters that no flags describe ({differing[0][0]}); omit the flag"
        )


def _check_kind_for_control(file: LoraFile, transformer: CogVideoXTransformer3DModel) -> None:
    if PATCHES not in transformer.peft_config["default"].rank_pattern:
        return
    rule = "a control starts only from a plain LoRA"
    if file.kind != "lora":
        raise UserError(
            f"--lora_weights: '{file.path}' is a {file.kind}, and {rule}; make one of it with convert_lora.py --rank"
        )
    if _has_dora(file):
        raise UserError(
            f"--lora_weights: '{file.path}' was trained with --use_dora, and {rule}; merge it with convert_lora.py "
            "--output_dir, and make one of the result with convert_lora.py --transformer"
        )


def _has_dora(file: LoraFile) -> bool:
    return any(".lora_magnitude_vector" in name for name in file.weights)


def read_passed_lora(reference: Path | str, flag: str, cache_dir: str | None = None) -> LoraFile:
    """Read a LoRA that `flag` set; raise a UserError for one that cannot be read."""
    try:
        return read_lora(reference, cache_dir)
    except (OSError, SafetensorError, ValueError, IndexError) as error:
        where = "" if Path(reference).exists() else "is not a file or folder here, and "
        raise UserError(
            f"{flag}: '{reference}' {where}cannot be used ({first_line(error)}); pass a LoRA that diffusers wrote"
        ) from error


def read_fitting_lora(
    reference: Path | str, transformer: CogVideoXTransformer3DModel, flag: str, cache_dir: str | None = None
) -> LoraFile:
    """Read a LoRA that `flag` set, and check that the model, maybe on the meta device, has its layers in its sizes."""
    file = read_passed_lora(reference, flag, cache_dir)
    # Of a linear layer [out, in], of a convolution [out, in, height, width].
    layers = ((name, getattr(layer, "weight", None)) for name, layer in transformer.named_modules())
    shapes = {name: weight.shape for name, weight in layers if weight is not None}
    if file.kind != "lora":
        _check_products(file, shapes, flag)
        return file
    for name, weight in file.weights.items():
        shape = shapes.get(name.split(".lora_")[0])
        side = slice(1, 2) if ".lora_A." in name else slice(1)  # lora_B is [out, rank], a magnitude of DoRA [out]
        if f"{PATCHES}.lora_A." in name and _lacks_control(weight, transformer):
            raise UserError(
                f"{flag}: '{file.path}' changes the patch embedding, but not for the control that this model takes; "
                "join it with the LoRA of the control, or merge it into the model, by convert_lora.py, or omit it"
            )
        if shape is None or weight.shape[side] != shape[side]:
            raise UserError(
                f"{flag}: '{file.path}' was trained on another model than --pretrained_model_name_or_path: "
                f"its {name} {list(weight.shape)} fits no layer; pass that model, or a LoRA of this one"
            )
    return file


def _lacks_control(down: torch.Tensor, transformer: CogVideoXTransformer3DModel) -> bool:
    """Return whether the weights were trained on the text-to-video model that a control has widened."""
    weight, config = transformer.patch_embed.proj.weight, transformer.config
    is_control = config.in_channels > config.out_channels and config.ofs_embed_dim is None
    return is_control and 2 * down.shape[1] == weight.shape[1]


def _check_products(file: LoraFile, shapes: dict[str, torch.Size], flag: str) -> None:
    """Check that the changes of a LoKr or LoHa have the shapes of the model's layers."""
    on_meta = replace(file, weights={name: weight.to("meta") for name, weight in file.weights.items()})
    try:
        fits = all(shapes.get(layer) == (one.up.shape[0], one.down.shape[1]) for layer, one in on_meta.factors())
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"{flag}: '{file.path}' is damaged ({first_line(error)}); save or download it again"
        ) from error
    if not fits:
        raise UserError(
            f"{flag}: '{file.path}' was trained on another model than --pretrained_model_name_or_path; pass that model"
        )


def _flags_needed(file: LoraFile, transformer: CogVideoXTransformer3DModel) -> list[str]:
    """Return the flags that must change, as the user would type them."""
    ours = transformer.peft_config["default"]
    kind = ours.peft_type.value.lower()
    needed = [] if file.kind == kind else [f"--adapter {file.kind}"]
    own = ours.rank_pattern  # of layers whose ranks no flag sets
    weights = {
        name: one for name, one in file.weights.items() if ".lora_A." in name and PART.split(name)[0] not in own
    }
    ranks = sorted({weight.shape[0] for weight in weights.values()})
    ranks = ranks if file.kind == "lora" else [file.config["r"]]
    patterns = (file.config.get("rank_pattern") or {}, file.config.get("alpha_pattern") or {})
    if len(ranks) != 1 or (file.config and patterns != (own, ours.alpha_pattern)):
        raise UserError(f"--lora_weights: '{file.path}' has layers of different ranks or strengths; omit the flag")
    if ranks != [ours.r]:
        needed.append(f"--rank {ranks[0]}")
    # A file without metadata lacks these two.
    our_alpha = ours.lora_alpha if kind == "lora" else ours.alpha
    alpha = our_alpha if file.alpha is None else file.alpha
    our_switches = {name: getattr(ours, name, False) for name in ("use_rslora", "use_dora")}
    has_rslora = file.config.get("use_rslora", our_switches["use_rslora"] and file.kind == "lora")
    if alpha != our_alpha:
        needed.append(f"--lora_alpha {alpha:g}")
    for flag, theirs in (("use_rslora", has_rslora), ("use_dora", _has_dora(file))):
        if theirs != our_switches[flag]:
            needed.append(f"--{flag}" if theirs else f"no --{flag}")
    factor = file.config.get("decompose_factor", LOKR_FACTOR)
    if file.kind == "lokr" and factor != getattr(ours, "decompose_factor", LOKR_FACTOR):
        needed.append(f"--lokr_factor {factor}")
    modules = _modules(file.weights)
    if modules != _modules(get_peft_model_state_dict(transformer)):
        # The names inside a block if all blocks have them, the full names otherwise.
        blocks, count = Counter(map(inside_block, modules)), len(transformer.transformer_blocks)
        names = {short if blocks[short := inside_block(name)] == count else name for name in modules - own.keys()}
        needed.append(f"--lora_target_modules {' '.join(sorted(names))}")
    return needed


def _modules(names: Iterable[str]) -> set[str]:
    return {PART.split(name)[0] for name in names}


def inside_block(name: str) -> str:
    """Return a layer's name inside its block; a layer outside the blocks keeps its name."""
    return name.split(".", 2)[2] if name.startswith("transformer_blocks.") else name


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}
