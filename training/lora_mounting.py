"""Put trained LoRAs onto a pipeline as plain diffusers does, after a look at whether they will have an effect."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError

from errors import UserError, first_line
from lora_file import LoraFile, check_layers, location, read_lora
from models import ModelConfigs
from sampling import Pipeline


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


def _read(reference: str, cache_dir: str | None) -> LoraFile:
    try:
        return read_lora(reference, cache_dir)
    except (OSError, SafetensorError, ValueError, IndexError) as error:
        reason = first_line(error)
        where = "" if Path(reference).exists() else "is no file or folder here, and "
        raise UserError(f"--lora: '{reference}' {where}cannot be used ({reason})") from error
