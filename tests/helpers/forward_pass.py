"""A transformer's forward pass on noise, and the sizes of a published one."""

import torch
from diffusers import CogVideoXTransformer3DModel

from diffusion.positions import rotary_embeddings


CPU = torch.device("cpu")

COGVIDEOX_5B = {"num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 42, "patch_size": 2}
COGVIDEOX_5B |= {"patch_size_t": None, "max_text_seq_length": 226}


def load(folder) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")


def predict(transformer, frames: int = 5, device=CPU, dtype=torch.float32) -> torch.Tensor:
    """Two samples of 64x96 pixels, noise for everything."""
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    frames += frames % (config.patch_size_t or 1)
    latents = torch.randn(2, frames, config.in_channels, 8, 12, generator=generator).to(device)
    embeds = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=generator).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return transformer(
            latents,
            embeds,
            torch.tensor([100, 900], device=device),
            ofs=None if config.ofs_embed_dim is None else torch.full((1,), 2.0, device=device),
            image_rotary_emb=rotary_embeddings(transformer, frames, 64, 96, device),
            return_dict=False,
        )[0]


def gradients(transformer, **options) -> dict[str, torch.Tensor]:
    transformer.zero_grad()
    predict(transformer, **options).float().square().mean().backward()
    return {name: weight.grad for name, weight in transformer.named_parameters() if weight.grad is not None}
