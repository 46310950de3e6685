"""Count what preparing a clip and its caption costs at full size: arithmetic, memory traffic, operators, peak memory.

    make preparation-cost      # the table of assets/docs/dataset.md

Neither a GPU nor a model is needed: as in `step_cost.py`, the encoders of CogVideoX-5b run on torch's fake tensors, in
bfloat16. The VAE encodes a clip of 49x480x720, the T5-XXL encoder a caption of 226 tokens.
"""

from contextlib import nullcontext

import torch
from diffusers import AutoencoderKLCogVideoX
from step_cost import CARDS, SIZE, Card, StepCost, StepCounter, fake_model, gpu_like
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

from make_full_size_model import TEXT_DIM, full_size_configs
from make_tiny_model import TEXT_LENGTH
from memory.settings import GB
from models.encoding import encode_videos


# The encoder of t5-v1_1-xxl, which all CogVideoX models have.
T5_XXL = {"vocab_size": 32128, "d_model": TEXT_DIM, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def count_video(*, tiling: bool) -> StepCost:
    """Count encoding a clip, with the VAE's weights in the peak."""
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(full_size_configs("5b").vae).requires_grad_(False).eval()
    vae.use_tiling = tiling
    frames, height, width = SIZE
    return count(vae, lambda: encode_videos(vae, torch.empty(1, frames, 3, height, width, dtype=torch.uint8)))


def count_caption() -> StepCost:
    """Count embedding a caption, with the text encoder's weights in the peak."""
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**T5_XXL, feed_forward_proj="gated-gelu")).requires_grad_(False).eval()
    encoder.encoder.embed_tokens = encoder.shared
    return count(encoder, lambda: encoder(torch.zeros(1, TEXT_LENGTH, dtype=torch.int64)), has_attention=True)


def count(network: torch.nn.Module, encode, *, has_attention: bool = False) -> StepCost:
    """Count the operators of `encode`, which uses the network."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), gpu_like() if has_attention else nullcontext():
        fake_model(network, torch.bfloat16)
        weights = list({id(one): one for one in (*network.parameters(), *network.buffers())}.values())
        with StepCounter(weights) as counter:
            encode()
    counter.cost.peak += sum(weight.nbytes for weight in weights)
    return counter.cost


def clips_a_minute(card: Card, *costs: StepCost) -> float:
    """Return the most clips that a card can prepare in a minute, if nothing else takes time."""
    return 60 / sum(cost.seconds(card) for cost in costs)


def table() -> list[str]:
    """Return the lines of the table in markdown."""
    full, tiles, caption = count_video(tiling=False), count_video(tiling=True), count_caption()
    head = ["", "TFLOP", "GB moved", "operators", "peak GB", *(f"{card}, s" for card in CARDS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, cost in (("a clip, VAE", full), ("a clip, VAE with tiles", tiles), ("a caption, T5", caption)):
        counts = [f"{cost.tflop('forward'):,.1f}", f"{cost.traffic / 1e9:,.0f}", f"{cost.operators:,.0f}"]
        seconds = [f"{cost.seconds(card):.3f}" for card in CARDS.values()]
        lines.append("| " + " | ".join([name, *counts, f"{cost.peak / GB:.1f}", *seconds]) + " |")
    for name, video in (("clips a minute", full), ("clips a minute with tiles", tiles)):
        most = [f"{clips_a_minute(card, video, caption):.0f}" for card in CARDS.values()]
        lines.append("| " + " | ".join([name, "", "", "", "", *most]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
