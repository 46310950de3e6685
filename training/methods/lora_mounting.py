"""Mount trained LoRAs on a pipeline with diffusers, after a check that they have an effect."""

import logging
import math
from collections.abc import Sequence

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import get_peft_model_state_dict

from common.errors import UserError, one_line
from methods.lora_file import LoraFile, location, read_fitting_lora
from models.configs import ModelConfigs
from models.sampling import Pipeline


logger = logging.getLogger(__name__)


def check_loras(loras: Sequence[tuple[str, float]], configs: ModelConfigs, cache_dir: str | None = None) -> None:
    """Check that LoRAs (file or hub id, scale) fit the model and were trained; warn if their strength is unknown."""
    if not loras:
        return
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(configs.transformer)
    for reference, scale in loras:
        file = read_fitting_lora(reference, transformer, "--lora", cache_dir)
        if not any(weight.any() for name, weight in file.weights.items() if ".lora_B." in name):
            raise UserError(f"--lora: '{reference}' has no effect: all its lora_B weights are 0, as before training")
        if not all(weight.isfinite().all() for weight in file.weights.values()):
            raise UserError(
                f"--lora: '{reference}' has NaN or infinite weights, which would make every video black; pass an "
                "earlier checkpoint"
            )
        _rehearse(transformer, reference, file, cache_dir)
        if not file.config:
            logger.warning(
                "warning: --lora: %s has no metadata on its alpha; alpha = rank is used. If it was trained with "
                "another one, pass alpha / rank as its --lora_scale",
                reference,
            )
        elif file.strength not in (None, 1) and math.isclose(scale, file.strength, rel_tol=0.01):
            logger.warning(
                "warning: --lora_scale %g: the file of %s has its alpha / rank, %g, which is applied already; for the "
                "strength of the training omit the scale",
                scale,
                reference,
                file.strength,
            )


def mount_loras(pipeline: Pipeline, loras: Sequence[tuple[str, float]], cache_dir: str | None = None) -> None:
    """Load LoRAs with `load_lora_weights` and set their scales with `set_adapters`."""
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, (reference, _) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(**location(reference, cache_dir), adapter_name=name)
    if loras:
        pipeline.set_adapters(names, [scale for _, scale in loras])


def _rehearse(transformer: CogVideoXTransformer3DModel, reference: str, file: LoraFile, cache_dir: str | None) -> None:
    """Mount a LoRA on a transformer without weights and remove it again, to see that peft accepts it."""
    pipeline = CogVideoXPipeline(None, None, None, transformer, None)
    try:
        mount_loras(pipeline, [(reference, 1.0)], cache_dir)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = one_line(error.__cause__ or error, 300)
        raise UserError(f"--lora: '{reference}' cannot be mounted ({reason}); save it again with diffusers") from error
    # diffusers leaves weights that a file lacks as uninitialized memory.
    missing = sorted(get_peft_model_state_dict(transformer, adapter_name="lora_0").keys() - file.weights.keys())
    if missing:
        raise UserError(f"--lora: '{reference}' is incomplete: it has no {missing[0]}; save or download it again")
    pipeline.unload_lora_weights()
