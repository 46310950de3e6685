"""Facts of a model and of a step for the accounting of memory; no weights are loaded."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from data.buckets import Bucket, count_tokens
from methods.full import FullFinetune
from methods.lora import Lora
from models.configs import DTYPES, ModelConfigs
from models.quantization import MODULATION


@dataclass(frozen=True)
class ParameterFacts:
    """Facts of a parameter."""

    shape: tuple[int, ...]
    is_trainable: bool
    block: int | None  # number of its transformer block
    is_linear_weight: bool  # of a layer of the base model
    is_modulation: bool  # a layer that sees one vector a sample

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class AdapterFacts:
    """Facts of the adapter on a linear layer."""

    rank: int
    inputs: int  # of the layer
    outputs: int


@dataclass(frozen=True)
class ModelFacts:
    """A model with the trainable parameters of a method."""

    configs: ModelConfigs
    method: Lora | FullFinetune
    parameters: tuple[ParameterFacts, ...]
    vae_numel: int
    decoder_numel: int  # of the VAE's decoder
    num_blocks: int
    dim: int
    heads: int
    adapters: dict[str, AdapterFacts]  # linear layer of a block, by the end of its name -> its adapter

    @cached_property
    def trainable(self) -> list[ParameterFacts]:
        """The trainable parameters."""
        return [parameter for parameter in self.parameters if parameter.is_trainable]

    @cached_property
    def linear_weights(self) -> list[int]:
        """The numbers of elements of one block's linear weights in the base model."""
        return [one.numel for one in self.parameters if one.block == 0 and one.is_linear_weight]

    def count_tokens(self, size: Bucket) -> int:
        """Return the number of tokens, text and video, of a sample."""
        return count_tokens(self.configs.transformer, size)


@dataclass(frozen=True)
class Workload:
    """The input of a step."""

    size: Bucket  # of the clips
    batch_size: float  # of such clips; a fraction where batches mix sizes
    mixed_precision: str = "bf16"  # no, fp16, bf16
    sampled: Bucket | None = None  # size of the validation videos; None for no validation
    is_guided: bool = True  # validation computes with and without the prompt
    sampling_cache: str = "none"  # of validation
    is_replicated: bool = False  # DistributedDataParallel keeps all gradients in the buckets that it exchanges
    is_raw: bool = False  # clips are encoded in each step, by a VAE that stays loaded
    slicing: bool = False  # of that encoding
    tiling: bool = False  # of that encoding
    given_frames: int = 1  # of each clip, for image-to-video
    has_masks: bool = False

    @property
    def compute_bytes(self) -> int:
        """The bytes of one number in the networks."""
        return DTYPES[self.mixed_precision].itemsize


def model_facts(configs: ModelConfigs, method: Lora | FullFinetune) -> ModelFacts:
    """Count a model's parameters after the method has prepared it on the meta device, where it takes no memory."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(configs.transformer)
        vae = AutoencoderKLCogVideoX.from_config(configs.vae)
        (replace(method, start_from=None) if isinstance(method, Lora) else method).attach(transformer)
    config = transformer.config
    return ModelFacts(
        configs=configs,
        method=method,
        parameters=tuple(_parameter_facts(transformer)),
        vae_numel=sum(parameter.numel() for parameter in vae.parameters()),
        decoder_numel=sum(parameter.numel() for parameter in vae.decoder.parameters()),
        num_blocks=config.num_layers,
        dim=config.num_attention_heads * config.attention_head_dim,
        heads=config.num_attention_heads,
        adapters={
            name: AdapterFacts(layer.r["default"], base.in_features, base.out_features)
            for name, layer in transformer.transformer_blocks[0].named_modules()
            if isinstance(layer, BaseTunerLayer) and (base := layer.get_base_layer())
        },
    )


def _parameter_facts(transformer: CogVideoXTransformer3DModel) -> Iterator[ParameterFacts]:
    linear = {
        id(layer.weight)
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    }
    for name, parameter in transformer.named_parameters():
        parts = name.split(".")
        block = int(parts[1]) if parts[0] == "transformer_blocks" else None
        is_modulation = not MODULATION.isdisjoint(parts)
        yield ParameterFacts(
            tuple(parameter.shape), parameter.requires_grad, block, id(parameter) in linear, is_modulation
        )
