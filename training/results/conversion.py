"""Convert adapters layer by layer: memory holds one layer of a model, and the LoRA that is written."""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import replace_folder
from common.logs import start_logging
from common.run_folder import TRANSFORMER_FOLDER
from common.units import in_bytes
from flags.conversion import BaseModelFlags, ReductionFlags
from flags.settings import ConversionSettings
from methods.lora_factors import Factors, concatenate, decompose, reduce_rank
from methods.lora_formats import AdapterFile, open_adapters, write_lora
from models.configs import DTYPES
from models.fingerprints import weight_files
from models.source import ModelSource


logger = logging.getLogger(__name__)

Reduced = tuple[str, Factors, float, float]  # layer, factors, squared norm of what they keep and of all


def convert(settings: ConversionSettings) -> None:
    """Write what the flags ask for; raise a UserError for files that do not fit together or cannot be written."""
    start_logging()
    try:
        _convert(settings)
    except (OSError, SafetensorError) as error:
        raise UserError(f"nothing was written: {first_line(error)}; fix it and run again") from error


def _convert(settings: ConversionSettings) -> None:
    output, device = settings.output, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)  # of the SVD's first guess: the same command writes the same file
    files = [open_adapters(file) for file, _ in settings.loras]
    scales = [scale for _, scale in settings.loras]
    dtype = output.dtype and DTYPES[output.dtype]
    if output.output_dir is not None:
        _merge(files, scales, _base_folder(settings.model), Path(output.output_dir), dtype, device)
        return
    if settings.source.transformer is not None:
        base = _find_weights(_base_folder(settings.model), settings.model.variant)
        tuned = _find_weights(Path(settings.source.transformer, TRANSFORMER_FOLDER))
        dtype = dtype or _read(tuned, next(iter(tuned))).dtype
        reduced = _extract(base, tuned, settings.reduction, device)
    else:
        _refuse_dora(files)
        dtype = dtype or max((file.dtype for file in files), key=lambda dtype: dtype.itemsize)
        reduced = _combine(files, scales, settings.reduction, device)
    layers, kept, total = {}, 0.0, 0.0
    for layer, factors, energy, all_energy in reduced:
        layers[layer] = replace(factors, up=factors.up.to(dtype).cpu(), down=factors.down.to(dtype).cpu())
        kept, total = kept + energy, total + all_energy
    layers = {layer: factors for layer, factors in layers.items() if factors.rank}
    if not layers:
        raise UserError("--transformer: its linear layers are those of the base model; there is nothing to extract")
    file = Path(output.output_file)
    write_lora(file, layers, output.format)
    logger.info("%s", _summary(file, layers.values(), kept / total if total else 1.0))


def _summary(file: Path, layers: Iterable[Factors], share: float) -> str:
    ranks = sorted(factors.rank for factors in layers)
    rank = f"{ranks[0]} to {ranks[-1]}" if ranks[0] < ranks[-1] else ranks[0]
    size = in_bytes(file.stat().st_size)
    return f"wrote {file}: {len(ranks)} layers of rank {rank}, {size}; it keeps {100 * share:.4g}% of the change"


def _refuse_dora(files: Sequence[AdapterFile]) -> None:
    for file in files:
        if file.has_dora:
            raise UserError(
                f"--lora: {file.file} was trained with --use_dora, which is more than a LoRA; merge it into the base "
                "model with --pretrained_model_name_or_path and --output_dir"
            )


def _combine(
    files: Sequence[AdapterFile], scales: Sequence[float], reduction: ReductionFlags, device: torch.device
) -> Iterator[Reduced]:
    """Yield the layers of the sum of the adapters."""
    is_reduced = reduction.rank or reduction.energy or any(file.kind != "lora" for file in files)
    for layer in tqdm(list(dict.fromkeys(layer for file in files for layer in file.names)), "layers", disable=None):
        parts = [
            replace(part, strength=part.strength * scale)
            for file, scale in zip(files, scales, strict=True)
            if layer in file.names
            for part in [file.read(layer, device)]
        ]
        if len({(part.up.shape[0], part.down.shape[1:]) for part in parts}) > 1:
            raise UserError(f"--lora: the LoRAs are of different models: {layer} has other sizes; omit one of them")
        factors = concatenate(parts)
        if is_reduced:
            yield layer, *reduce_rank(factors, reduction.rank, reduction.energy)
        else:
            yield layer, factors, 1.0, 1.0


def _extract(
    base: dict[str, Path], tuned: dict[str, Path], reduction: ReductionFlags, device: torch.device
) -> Iterator[Reduced]:
    """Yield the layers of the difference of two models; one without linear weights counts only as lost energy."""
    for name in tqdm(list(base), "layers", disable=None):
        if name not in tuned:
            if name.endswith("pos_embedding"):  # of --ignore_learned_positional_embeddings
                continue
            raise UserError(f"--transformer: it was tuned from another model: it has no {name}; pass its base model")
        before, after = _read(base, name, device), _read(tuned, name, device)
        if before.shape != after.shape:
            raise UserError(
                f"--transformer: it was tuned from another model: {name} is {list(after.shape)}, not "
                f"{list(before.shape)}; pass its base model"
            )
        if torch.equal(before, after):
            continue
        change, layer = after.float() - before.float(), name.removesuffix(".weight")
        if not change.isfinite().all():
            raise UserError(f"--transformer: {name} has NaN or infinite weights; pass an earlier checkpoint")
        if change.ndim == 2 and layer != name:
            yield layer, *decompose(change, reduction.rank, reduction.energy)
        else:
            nothing = Factors(change.new_empty(0, 0), change.new_empty(0, 0))
            yield layer, nothing, 0.0, change.square().sum().item()


def _merge(
    files: Sequence[AdapterFile],
    scales: Sequence[float],
    base: Path,
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Write the base model's transformer with the adapters in its weights, one block after another."""
    weights = _find_weights(base)
    for file in files:
        for layer in file.names:
            if f"{layer}.weight" not in weights:
                raise UserError(f"--lora: {file.file} was trained on another model, with a layer {layer}; pass that")
    partial, shards = folder.with_name(f".partial.{folder.name}"), defaultdict(list)
    for name in weights:
        shards[name.split(".")[1] if name.startswith("transformer_blocks.") else ""].append(name)
    shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
    try:
        size = _write_merged(partial / TRANSFORMER_FOLDER, weights, shards, files, scales, base, dtype, device)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("wrote %s, %s", folder / TRANSFORMER_FOLDER, in_bytes(size))


def _write_merged(
    transformer: Path,
    weights: Mapping[str, Path],
    shards: Mapping[str, Sequence[str]],
    files: Sequence[AdapterFile],
    scales: Sequence[float],
    base: Path,
    dtype: torch.dtype | None,
    device: torch.device,
) -> int:
    """Write the shards of the merged transformer and their index; return the bytes of the weights."""
    transformer.mkdir(parents=True)
    shutil.copyfile(base / "config.json", transformer / "config.json")
    places, size = {}, 0
    for number, names in enumerate(tqdm(shards.values(), "blocks", disable=None), start=1):
        changed = {name: _changed(_read(weights, name, device), name, files, scales, device) for name in names}
        changed = {name: weight.to("cpu", dtype or weight.dtype).contiguous() for name, weight in changed.items()}
        shard = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(changed, transformer / shard, {"format": "pt"})
        places |= dict.fromkeys(names, shard)
        size += sum(weight.nbytes for weight in changed.values())
    index = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2)
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(f"{index}\n", encoding="utf-8")
    return size


def _changed(
    weight: torch.Tensor, name: str, files: Sequence[AdapterFile], scales: Sequence[float], device: torch.device
) -> torch.Tensor:
    """Return a weight with the changes of all adapters, one after another."""
    layer = name.removesuffix(".weight")
    for file, scale in zip(files, scales, strict=True):
        if layer != name and layer in file.names:
            factors = file.read(layer, device)
            try:
                weight = replace(factors, strength=factors.strength * scale).added_to(weight)
            except RuntimeError as error:
                raise UserError(
                    f"--lora: {file.file} was trained on another model: its {layer} does not fit {list(weight.shape)}"
                ) from error
    return weight


def _base_folder(model: BaseModelFlags) -> Path:
    """Return the folder of the base model's transformer; download it from the hub."""
    source = ModelSource(model.pretrained_model_name_or_path, model.revision, model.variant, model.cache_dir)
    source.configs()
    source.download(TRANSFORMER_FOLDER)
    return source.local_folder() / TRANSFORMER_FOLDER


def _find_weights(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Return the names of a transformer's weights -> their files."""
    files = [file for file in weight_files(folder, variant) if file.suffix == ".safetensors"]
    if not files:
        raise UserError(f"{folder} has no safetensors files; pass a model that has")
    weights = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            weights |= dict.fromkeys(opened.keys(), file)
    return weights


def _read(weights: dict[str, Path], name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    with safe_open(weights[name], "pt", device=str(device)) as opened:
        return opened.get_tensor(name)
