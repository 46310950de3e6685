"""Put trained LoRAs onto a pipeline as plain diffusers does, after a look at whether they will have an effect."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import get_peft_model_state_dict
from safetensors import SafetensorError

from common.errors import UserError, first_line, one_line
from methods.lora_file import LoraFile, check_layers, location, read_lora
from models.configs import ModelConfigs
from models.sampling import Pipeline


logger = logging.getLogger(__name__)


def check_loras(loras: Sequence[tuple[str, float]], configs: ModelConfigs, cache_dir: str | None = None) -> None:
    """Refuse LoRAs that have no effect on a model; warn of those whose strength nobody knows.

    Args:
        loras: of each the file or hub id, and its scale.
        configs: the model's; no weights of it are needed.
        cache_dir: where files of the hub are kept.

    Raises:
        UserError: a LoRA cannot be read, is of another model, or was never trained.
    """
    if not loras:
        return
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(configs.transformer)
    for reference, _ in loras:
        file = _read(reference, cache_dir)
        check_layers(file, transformer, "--lora")
        if not any(weight.any() for name, weight in file.weights.items() if ".lora_B." in name):
            raise UserError(f"--lora: '{reference}' has no effect: all its lora_B weights are 0, as before training")
        if not all(weight.isfinite().all() for weight in file.weights.values()):
            raise UserError(
                f"--lora: '{reference}' has weights that are no numbers (NaN) or infinite, and would make every video "
                "black; give an earlier checkpoint"
            )
        _rehearse(transformer, reference, file, cache_dir)
        if not file.config:
            logger.warning(
                "warning: --lora: %s does not say what alpha it was trained with; alpha = rank is taken. If it was "
                "another one, give alpha / rank as its --lora_scale",
                reference,
            )


def mount_loras(pipeline: Pipeline, loras: Sequence[tuple[str, float]], cache_dir: str | None = None) -> None:
    """Load LoRAs by `load_lora_weights`, and give each its scale by `set_adapters`."""
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, (reference, _) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(**location(reference, cache_dir), adapter_name=name)
    if loras:
        pipeline.set_adapters(names, [scale for _, scale in loras])


def _rehearse(transformer: CogVideoXTransformer3DModel, reference: str, file: LoraFile, cache_dir: str | None) -> None:
    """Mount a LoRA on a transformer without weights, and take it off again.

    Raises:
        UserError: peft does not know what its metadata says, or it lacks one of two matrices that go together.
    """
    pipeline = CogVideoXPipeline(None, None, None, transformer, None)
    try:
        mount_loras(pipeline, [(reference, 1.0)], cache_dir)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = one_line(error.__cause__ or error, 300)
        raise UserError(f"--lora: '{reference}' cannot be mounted ({reason}); save it anew with diffusers") from error
    # diffusers leaves what a file lacks as it was made: unset memory.
    missing = sorted(get_peft_model_state_dict(transformer, adapter_name="lora_0").keys() - file.weights.keys())
    if missing:
        raise UserError(f"--lora: '{reference}' is not whole: it has no {missing[0]}; save or download it anew")
    pipeline.unload_lora_weights()


def _read(reference: str, cache_dir: str | None) -> LoraFile:
    try:
        return read_lora(reference, cache_dir)
    except (OSError, SafetensorError, ValueError, IndexError) as error:
        reason = first_line(error)
        where = "" if Path(reference).exists() else "is no file or folder here, and "
        raise UserError(f"--lora: '{reference}' {where}cannot be used ({reason})") from error
