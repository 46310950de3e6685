"""A training step without a trainer: a transformer with adapters, fixed inputs, a loss, gradients."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from diffusion.image_to_video import ImageToVideo
from diffusion.objective import Objective
from diffusion.positions import rotary_embeddings
from diffusion.text_to_video import TextToVideo
from methods.lora import Lora
from models.source import ModelSource


Result = tuple[torch.Tensor, dict[str, torch.Tensor]]  # the output, the gradients by name


def make_objective(
    source: ModelSource,
    transformer: CogVideoXTransformer3DModel | None = None,
    *,
    task: TextToVideo | ImageToVideo | None = None,
    model: torch.nn.Module | None = None,
) -> Objective:
    """Return the objective of a model in float32; `model` replaces or wraps the transformer in forward passes."""
    transformer = transformer or source.load_transformer(torch.float32)
    networks = {"model": model or transformer, "transformer": transformer, "vae": None}
    facts = {"scheduler": source.load_scheduler(), "configs": source.configs(), "dtype": torch.float32}
    return Objective(task=task or TextToVideo(), **networks, **facts)


def with_adapters(
    model: Path | str, *, dropout: float = 0.5, quantize: str = "none", **lora: Any
) -> CogVideoXTransformer3DModel:
    transformer = ModelSource(str(model)).load_transformer(torch.float32, quantize=quantize)
    add_adapters(transformer, dropout, **lora)
    return transformer


def add_adapters(transformer: CogVideoXTransformer3DModel, dropout: float, **lora: Any) -> None:
    """Add adapters that have an effect, always the same."""
    Lora(**{"rank": 4, "alpha": 4.0, "dropout": dropout, **lora}).attach(transformer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    transformer.train()


def inputs_of(transformer: CogVideoXTransformer3DModel, batch_size: int = 2, size: int = 8) -> dict[str, torch.Tensor]:
    """Random inputs, always the same, for 5 latent frames of `size` times `size + 4` and 16 tokens of text."""
    generator = torch.Generator().manual_seed(1)
    device, dtype = transformer.device, transformer.dtype
    latents = torch.randn(batch_size, 5, 16, size, size + 4, generator=generator)
    embeds = torch.randn(batch_size, 16, transformer.config.text_embed_dim, generator=generator)
    return {
        "hidden_states": latents.to(device, dtype),
        "encoder_hidden_states": embeds.to(device, dtype),
        "timestep": torch.arange(3, 3 + batch_size, device=device),
        "image_rotary_emb": rotary_embeddings(transformer, 5, 8 * size, 8 * size + 32, device),
    }


def train_step(
    transformer: CogVideoXTransformer3DModel, batch_size: int = 2, size: int = 8, model: torch.nn.Module | None = None
) -> Result:
    """Forward and backward pass, by `model` where the transformer is wrapped, under the same random numbers."""
    transformer.zero_grad()
    torch.manual_seed(7)
    output = (model or transformer)(**inputs_of(transformer, batch_size, size), return_dict=False)[0]
    output.float().square().mean().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in transformer.named_parameters() if parameter.requires_grad
    }
    return output.detach(), gradients


@torch.no_grad()
def sample_step(transformer: CogVideoXTransformer3DModel) -> torch.Tensor:
    torch.manual_seed(7)
    return transformer(**inputs_of(transformer), return_dict=False)[0]


def assert_same(result: Result, expected: Result) -> None:
    """Bit for bit."""
    assert torch.equal(result[0], expected[0])
    assert result[1].keys() == expected[1].keys()
    assert not [name for name, gradient in result[1].items() if not torch.equal(gradient, expected[1][name])]


def assert_close(result: Result, expected: Result, tolerance: float) -> None:
    """The norm of each difference is small beside the norm."""
    for name, tensor in {"output": result[0], **result[1]}.items():
        reference = expected[0] if name == "output" else expected[1][name]
        error = (tensor - reference).float().norm() / reference.float().norm()
        assert error < tolerance, f"{name}: {error}"


def wide_transformer() -> CogVideoXTransformer3DModel:
    """12 blocks of width 512 in bfloat16 with float32 adapters, on the CPU."""
    torch.manual_seed(0)
    config = {"num_attention_heads": 8, "num_layers": 12, "sample_width": 68, "sample_height": 64}
    config |= {"text_embed_dim": 64, "use_rotary_positional_embeddings": True}
    transformer = CogVideoXTransformer3DModel(**config).to(torch.bfloat16)
    add_adapters(transformer, dropout=0.0)
    return transformer


def peak_of_steps(transformer: CogVideoXTransformer3DModel, size: int) -> int:
    """Bytes of GPU memory at the peak of the second of two steps."""
    gc.collect()  # of transformers before; hooks and wrapped methods make cycles
    train_step(transformer, size=size)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    train_step(transformer, size=size)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def fail_once_each_way(transformer: CogVideoXTransformer3DModel, module: torch.nn.Module) -> Iterator[None]:
    """Have a module fail in a forward pass, then in the backward pass of another step; yield after each."""

    def fail(module: torch.nn.Module, inputs: tuple) -> None:
        raise MemoryError

    failing = module.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        train_step(transformer)
    failing.remove()
    yield
    output = transformer(**inputs_of(transformer), return_dict=False)[0]
    failing = module.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        output.mean().backward()
    failing.remove()
    yield
