"""Convert adapters layer by layer: memory holds one layer of a model, and the LoRA that is written."""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from diffusion.control_to_video import ControlToVideo, widen
from diffusion.task import pipeline_index
from flags.conversion import DIFFUSERS, BaseModelFlags, ReductionFlags
from flags.settings import ConversionSettings
from methods.lora_factors import Factors, concatenate, decompose, reduce_rank
from methods.lora_file import PATCHES
from methods.lora_formats import AdapterFile, open_adapters, write_lora
from methods.pipeline_folder import copy_components, find_components
from models.configs import CPU, DTYPES
from models.fingerprints import weight_files
from models.source import ModelSource
from results.trained_conditions import (
    TrainedConditions,
    find_trained_conditions,
    note_trained_conditions,
    takes_control,
)
from video.condition_frames import FIRST


logger = logging.getLogger(__name__)

_PATCH_WEIGHT = f"{PATCHES}.weight"
Reduced = tuple[str, Factors, float, float]  # layer, factors, squared norm of what they keep and of all


@dataclass(frozen=True)
class BaseModel:
    """The transformer of a base model, which a control's results change as their training has widened it."""

    source: ModelSource
    weights: dict[str, Path]  # name -> file
    takes_control: bool  # as its results do
    is_widened: bool  # with zero weights for a control that its files take none of

    @property
    def folder(self) -> Path:
        """The folder of the transformer."""
        return self.source.local_folder() / TRANSFORMER_FOLDER

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """Return a weight, on the device."""
        weight = _read(self.weights, name, device)
        return widen(weight) if self.is_widened and name == _PATCH_WEIGHT else weight

    def config(self) -> dict[str, object]:
        """Return the transformer's config."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if self.is_widened:
            config["in_channels"] = 2 * self.source.configs().transformer["in_channels"]
        return config


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
    results = [*(file for file, _ in settings.loras), settings.source.transformer]
    trained, _ = find_trained_conditions(results, settings.model.pretrained_model_name_or_path)
    if output.output_dir is not None:
        base = _open_base(settings.model, {str(file.file): _patch_inputs(file) for file in files})
        _merge(files, scales, base, Path(output.output_dir), dtype, device, trained)
        return
    if settings.source.transformer is not None:
        tuned = _find_weights(Path(settings.source.transformer, TRANSFORMER_FOLDER))
        inputs = _read(tuned, _PATCH_WEIGHT)[0].flatten().shape if _PATCH_WEIGHT in tuned else torch.Size()
        base = _open_base(settings.model, {settings.source.transformer: inputs})
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
    if PATCHES in layers and output.format != DIFFUSERS:
        logger.warning(
            "warning: %s changes the patch embedding: if for a control, ComfyUI and VideoX-Fun do not add its inputs "
            "to a base model; merge the LoRA with --output_dir",
            file,
        )
    if trained and trained.frames != FIRST:
        logger.info("sample it with generate.py --condition_frames %s, as it was trained", trained.frames)
    if trained and trained.control:
        logger.info("sample it with generate.py --compute_control %s, as it was trained", trained.control)


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
        if layer == PATCHES:
            inputs = max(part.down.shape[1] for part in parts)
            parts = [_with_control(part, inputs) for part in parts]
        if len({(part.up.shape[0], part.down.shape[1:]) for part in parts}) > 1:
            raise UserError(f"--lora: the LoRAs are of different models: {layer} has other sizes; omit one of them")
        factors = concatenate(parts)
        if is_reduced:
            # The weights of a control have as many ranks as it has inputs, which are few and all that it acts by.
            rank = None if layer == PATCHES else reduction.rank
            yield layer, *reduce_rank(factors, rank, reduction.energy)
        else:
            yield layer, factors, 1.0, 1.0


def _extract(
    base: BaseModel, tuned: dict[str, Path], reduction: ReductionFlags, device: torch.device
) -> Iterator[Reduced]:
    """Yield the layers of the difference of two models; one without linear weights counts only as lost energy."""
    if further := sorted(tuned.keys() - base.weights.keys()):
        raise UserError(f"--transformer: it was tuned from another model, with {further[0]}; pass its base model")
    for name in tqdm(list(base.weights), "layers", disable=None):
        if name not in tuned:
            if name.endswith("pos_embedding"):  # of --ignore_learned_positional_embeddings
                continue
            raise UserError(f"--transformer: it was tuned from another model: it has no {name}; pass its base model")
        before, after = base.read(name, device), _read(tuned, name, device)
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
        is_of_control = base.is_widened and name == _PATCH_WEIGHT
        if layer != name and (change.ndim == 2 or is_of_control):
            yield layer, *decompose(change, None if is_of_control else reduction.rank, reduction.energy)
        else:
            nothing = Factors(change.new_empty(0, 0), change.new_empty(0, 0))
            yield layer, nothing, 0.0, change.square().sum().item()


def _merge(
    files: Sequence[AdapterFile],
    scales: Sequence[float],
    base: BaseModel,
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    trained: TrainedConditions | None,
) -> None:
    """Write the base model's transformer with the adapters in its weights, one block after another.

    If it did not take a control before, write the complete pipeline, whose index tells it from an image-to-video one.
    """
    components = find_components(base.source, "--output_dir") if base.is_widened else {}
    for file in files:
        for layer in file.names:
            if f"{layer}.weight" not in base.weights:
                raise UserError(f"--lora: {file.file} was trained on another model, with a layer {layer}; pass that")
    partial, shards = folder.with_name(f".partial.{folder.name}"), defaultdict(list)
    for name in base.weights:
        shards[name.split(".")[1] if name.startswith("transformer_blocks.") else ""].append(name)
    shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
    try:
        size = _write_merged(partial / TRANSFORMER_FOLDER, base, shards, files, scales, dtype, device)
        copy_components(components, base.source.variant, partial, pipeline_index(ControlToVideo()))
        # Of a LoRA without a control, the run does not say that the base takes one.
        noted = replace(trained or TrainedConditions(), takes_control=base.takes_control)
        if noted != TrainedConditions():
            note_trained_conditions(partial, noted)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("wrote %s, %s", folder / TRANSFORMER_FOLDER, in_bytes(size))
    if components:
        logger.info("%s is a complete %s", folder, ControlToVideo.pipeline_class.__name__)


def _write_merged(
    transformer: Path,
    base: BaseModel,
    shards: Mapping[str, Sequence[str]],
    files: Sequence[AdapterFile],
    scales: Sequence[float],
    dtype: torch.dtype | None,
    device: torch.device,
) -> int:
    """Write the shards of the merged transformer and their index; return the bytes of the weights."""
    transformer.mkdir(parents=True)
    (transformer / "config.json").write_text(json.dumps(base.config(), indent=2) + "\n", encoding="utf-8")
    places, size = {}, 0
    for number, names in enumerate(tqdm(shards.values(), "blocks", disable=None), start=1):
        changed = {name: _changed(base, name, files, scales, device) for name in names}
        changed = {name: weight.to("cpu", dtype or weight.dtype).contiguous() for name, weight in changed.items()}
        shard = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(changed, transformer / shard, {"format": "pt"})
        places |= dict.fromkeys(names, shard)
        size += sum(weight.nbytes for weight in changed.values())
    index = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2)
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(f"{index}\n", encoding="utf-8")
    return size


def _changed(
    base: BaseModel, name: str, files: Sequence[AdapterFile], scales: Sequence[float], device: torch.device
) -> torch.Tensor:
    """Return a weight with the changes of all adapters, one after another."""
    weight, layer = base.read(name, device), name.removesuffix(".weight")
    for file, scale in zip(files, scales, strict=True):
        if layer != name and layer in file.names:
            factors = file.read(layer, device)
            if layer == PATCHES and base.takes_control:
                factors = _with_control(factors, weight.shape[1])
            try:
                weight = replace(factors, strength=factors.strength * scale).added_to(weight)
            except RuntimeError as error:
                raise UserError(
                    f"--lora: {file.file} was trained on another model: its {layer} does not fit {list(weight.shape)}"
                ) from error
    return weight


def _with_control(factors: Factors, inputs: int) -> Factors:
    """Return factors for a patch embedding with so many inputs, half of which are of a control that others lack."""
    return replace(factors, down=widen(factors.down)) if 2 * factors.down.shape[1] == inputs else factors


def _patch_inputs(file: AdapterFile) -> torch.Size:
    """Return the shape of the inputs of the patch embedding that adapters change; an empty one if they change none."""
    return file.read(PATCHES, CPU).down.shape[1:] if PATCHES in file.names else torch.Size()


def _open_base(model: BaseModelFlags, results: Mapping[str, torch.Size]) -> BaseModel:
    """Open the base model, which is downloaded from the hub, for results and the inputs of their patch embeddings.

    Raises a UserError for a result with a control that was trained on a model of another task.
    """
    source = ModelSource(model.pretrained_model_name_or_path, model.revision, model.variant, model.cache_dir)
    configs = source.configs()
    of_control = {result: takes_control(result) for result in results}
    for result, inputs in results.items():
        # --lora_target_modules takes no convolutions.
        if configs.is_image_to_video and (of_control[result] or len(inputs) > 1):
            raise UserError(
                f"--pretrained_model_name_or_path: this is an image-to-video model, and '{result}' was trained with "
                "controls; pass the text-to-video model that it was trained on"
            )
    source.download(TRANSFORMER_FOLDER)
    weights = _find_weights(source.local_folder() / TRANSFORMER_FOLDER, model.variant)
    # Image-to-video models have as many inputs.
    widening = [result for result, inputs in results.items() if inputs.numel() == 2 * configs.patch_inputs]
    is_widened = not configs.takes_condition and any(of_control[result] is not False for result in widening)
    for result, inputs in results.items():
        if of_control[result] and not (inputs or is_widened or configs.takes_condition):
            raise UserError(
                f"--pretrained_model_name_or_path: '{result}' was trained on a control model; pass that model"
            )
    return BaseModel(source, weights, is_widened or configs.is_control, is_widened)


def _find_weights(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Return the names of a transformer's weights -> their files."""
    files = [file for file in weight_files(folder, variant) if file.suffix == ".safetensors"]
    if not files:
        raise UserError(f"{folder} has no safetensors files; pass a model that has, or its --variant")
    weights = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            weights |= dict.fromkeys(opened.keys(), file)
    return weights


def _read(weights: dict[str, Path], name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    with safe_open(weights[name], "pt", device=str(device)) as opened:
        return opened.get_tensor(name)
