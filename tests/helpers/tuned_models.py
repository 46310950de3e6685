"""Tiny transformers as training leaves them, and what plain diffusers samples with them."""

import shutil
from pathlib import Path

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel

from diffusion.control_to_video import ControlToVideo
from forward_pass import load, predict
from methods.full import FullFinetune
from methods.lora import Lora
from models.source import ModelSource


PIPELINES = {"2b": CogVideoXPipeline, "5b-i2v": CogVideoXImageToVideoPipeline}


def make_lora(**options) -> Lora:
    return Lora(**({"rank": 4, "alpha": 8} | options))


def randomize(transformer: CogVideoXTransformer3DModel) -> None:
    """Change all trainable weights, as training would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)


def write_lora(model: Path, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """Write a LoRA of random weights; with `new_inputs`, one of a control on the widened model."""
    transformer, lora = load(model), make_lora(**options)
    if lora.new_inputs:
        ControlToVideo().prepare_model(transformer)
    lora.attach(transformer)
    randomize(transformer)
    return lora.save(transformer, folder, dtype)


@torch.no_grad()
def output(transformer: CogVideoXTransformer3DModel, **options) -> torch.Tensor:
    """Return the transformer's output for constant inputs."""
    return predict(transformer.eval(), **options)


def sampled_with(model: Path, lora: Path, kind: str = "2b") -> CogVideoXTransformer3DModel:
    pipeline = PIPELINES[kind].from_pretrained(model, vae=None, text_encoder=None, tokenizer=None, dtype=torch.float32)
    pipeline.load_lora_weights(lora)
    return pipeline.transformer


def only_configs(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def check_model(method: Lora | FullFinetune, model: Path) -> None:
    source = ModelSource(str(model))
    method.check_model(source.configs(), source)
