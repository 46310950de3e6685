"""What the accounting of memory needs to know of a model and of a step; no weights are loaded for it."""

from dataclasses import dataclass, replace
from math import prod

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import nn

from data.buckets import Bucket
from methods.full import FullFinetune
from methods.lora import Lora
from models.configs import DTYPES, ModelConfigs


@dataclass(frozen=True)
class ParameterFacts:
    """What the accounting needs to know of a parameter."""

    shape: tuple[int, ...]
    is_trainable: bool
    block: int | None  # number of the transformer block it is in
    is_linear_weight: bool  # of a layer that is no adapter's

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)


@dataclass(frozen=True)
class ModelFacts:
    """A model with the trainable parameters that a method gives it."""

    parameters: tuple[ParameterFacts, ...]
    vae_numel: int  # of the VAE, or of its decoder where nothing is encoded in validation
    num_blocks: int
    dim: int
    heads: int
    has_rotary: bool
    text_tokens: int
    text_dim: int
    adapters: dict[str, int]  # linear layer of a block, by the end of its name -> rank of its adapter
    decoder_channels: int  # of the decoder's last layers but one, at full size
    latent_channels: int

    def block(self, number: int) -> list[ParameterFacts]:
        """The parameters of one transformer block."""
        return [parameter for parameter in self.parameters if parameter.block == number]


@dataclass(frozen=True)
class Workload:
    """What a step computes on."""

    size: Bucket  # of the clips
    batch_size: int
    mixed_precision: str = "bf16"  # no, fp16, bf16
    sampled: Bucket | None = None  # size of the validation videos; None: none are sampled
    is_guided: bool = True  # validation computes with and without the prompt

    @property
    def compute_bytes(self) -> int:
        """Of one number in the networks."""
        return DTYPES[self.mixed_precision].itemsize

    @property
    def norm_bytes(self) -> int:
        """Of one number that a norm takes and gives: autocast has them in float32."""
        return 4


def model_facts(configs: ModelConfigs, method: Lora | FullFinetune) -> ModelFacts:
    """Count a model's parameters, by building it on the meta device as the method wants it.

    Raises:
        UserError: the method does not fit the model.
    """
    # No memory is taken there, and nothing is initialised.
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(configs.transformer)
        vae = AutoencoderKLCogVideoX.from_config(configs.vae)
        (replace(method, start_from=None) if isinstance(method, Lora) else method).attach(transformer)
    config = transformer.config
    sampling_vae = vae if configs.is_image_to_video else vae.decoder  # what validation loads
    return ModelFacts(
        parameters=tuple(_parameter_facts(transformer)),
        vae_numel=sum(parameter.numel() for parameter in sampling_vae.parameters()),
        num_blocks=config.num_layers,
        dim=config.num_attention_heads * config.attention_head_dim,
        heads=config.num_attention_heads,
        has_rotary=config.use_rotary_positional_embeddings,
        text_tokens=config.max_text_seq_length,
        text_dim=config.text_embed_dim,
        adapters=_adapters(transformer),
        decoder_channels=vae.config.block_out_channels[1],
        latent_channels=vae.config.latent_channels,
    )


def _parameter_facts(transformer: CogVideoXTransformer3DModel) -> list[ParameterFacts]:
    linear = {
        id(layer.weight)
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    }
    facts = []
    for name, parameter in transformer.named_parameters():
        parts = name.split(".")
        block = int(parts[1]) if parts[0] == "transformer_blocks" else None
        facts.append(ParameterFacts(tuple(parameter.shape), parameter.requires_grad, block, id(parameter) in linear))
    return facts


def _adapters(transformer: CogVideoXTransformer3DModel) -> dict[str, int]:
    factors = {
        name.removeprefix("transformer_blocks.0.").split(".lora_A")[0]: weight.shape[0]
        for name, weight in transformer.named_parameters()
        if name.startswith("transformer_blocks.0.") and ".lora_A." in name
    }
    return factors
