"""Mount trained LoRAs on a pipeline with diffusers, after a check that they have an effect."""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import get_peft_model_state_dict

from common.errors import UserError, one_line
from common.files import path_of_script
from methods.lora_file import LoraFile, location, read_fitting_lora, read_lora
from models.configs import ModelConfigs
from models.sampling import Pipeline


logger = logging.getLogger(__name__)

_ZERO_BEFORE_TRAINING = {"lora": "lora_B", "lokr": "lokr_w1", "loha": "hada_w2_b"}


def check_loras(
    loras: Sequence[tuple[str, float]],
    configs: ModelConfigs,
    cache_dir: str | None = None,
    quantize_base: str = "none",
) -> None:
    """Check that LoRAs (file or hub id, scale) fit the model and were trained; warn if their strength is unknown."""
    if not loras:
        return
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(configs.transformer)
    for reference, scale in loras:
        file = read_fitting_lora(reference, transformer, "--lora", cache_dir)
        untrained = _ZERO_BEFORE_TRAINING[file.kind]
        if not any(weight.any() for name, weight in file.weights.items() if f".{untrained}" in name):
            raise UserError(
                f"--lora: '{reference}' has no effect: all its {untrained} weights are 0, as before training"
            )
        if not all(weight.isfinite().all() for weight in file.weights.values()):
            raise UserError(
                f"--lora: '{reference}' has NaN or infinite weights, which would make every video black; pass an "
                "earlier checkpoint"
            )
        if file.kind == "lora":
            _rehearse(transformer, reference, file, cache_dir)
        elif quantize_base != "none":
            raise UserError(
                f"--quantize_base {quantize_base}: not with '{reference}', a {file.kind}, which is added to the "
                f"weights; omit it, or make a LoRA of it with {path_of_script('convert_lora.py')}"
            )
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
    """Load LoRAs with `load_lora_weights` and set their scales with `set_adapters`; add LoKrs and LoHas, which
    diffusers does not load, to the weights."""
    files = [read_lora(reference, cache_dir) for reference, _ in loras]
    for file, (_, scale) in zip(files, loras, strict=True):
        if file.kind != "lora":
            _add_to_weights(pipeline.transformer, file, scale)
    loras = [lora for lora, file in zip(loras, files, strict=True) if file.kind == "lora"]
    names = [f"lora_{number}" for number in range(len(loras))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are wanted
        for name, (reference, _) in zip(names, loras, strict=True):
            pipeline.load_lora_weights(**location(reference, cache_dir), adapter_name=name)
    if loras:
        pipeline.set_adapters(names, [scale for _, scale in loras])


@torch.no_grad()
def _add_to_weights(transformer: CogVideoXTransformer3DModel, file: LoraFile, scale: float) -> None:
    for layer, factors in file.factors(scale):
        weight = transformer.get_submodule(layer).weight
        factors = replace(factors, up=factors.up.to(weight.device), down=factors.down.to(weight.device))
        weight.copy_(factors.added_to(weight))


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
