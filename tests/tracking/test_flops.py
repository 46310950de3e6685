"""The FLOPs of a step equal figures worked out by hand and torch's count of a tiny model's step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.buckets import Bucket, count_tokens
from forward_pass import COGVIDEOX_5B, load, predict
from memory.activations import checkpoint_activations, omits_last_layer
from methods.lora import Lora
from models.attention import set_attention
from tracking.flops import count_flops, peak_tflops


# Of the 5b model at its native size: a forward pass of the linear layers and of attention.
LINEAR, ATTENTION = 169.1e12, 163.1e12


@pytest.mark.parametrize(
    ("settings", "linear", "attention"),
    [
        ({"trains_all": False}, 2, 3.5),
        ({"trains_all": True}, 3, 3.5),
        ({"trains_all": False, "checkpoint_scope": "block"}, 3, 4.5),
        ({"trains_all": False, "checkpoint_scope": "block", "checkpoint_every": 4}, 2 + 11 / 42, 3.5),
        ({"trains_all": False, "checkpoint_scope": "segment", "checkpoint_every": 4}, 3, 4.5),
        ({"trains_all": False, "checkpoint_scope": "feed-forward"}, 2 + 1 / 3, 3.5),
        ({"trains_all": False, "checkpoint_scope": "all-but-attention"}, 3, 3.5),
        ({"trains_all": False, "checkpoint_scope": "block", "recomputes_last": False}, 3 - 1 / 3, 4.5),
    ],
)
def test_a_step_of_cogvideox_5b(settings, linear, attention):
    tokens = count_tokens(COGVIDEOX_5B, Bucket(49, 480, 720))
    assert tokens == 226 + 13 * 30 * 45 == 17_776
    expected = linear * LINEAR + attention * ATTENTION
    assert count_flops(COGVIDEOX_5B, tokens, **settings) == pytest.approx(expected, rel=1e-3)


SCOPES = [
    (None, 1),
    ("all-but-attention", 1),
    ("all-but-attention", 3),
    ("block", 1),
    ("block", 3),
    ("segment", 2),
    ("segment", 3),
]
SCOPES += [("feed-forward", 1), ("feed-forward", 3)]


@pytest.mark.parametrize("trains_all", [False, True])
@pytest.mark.parametrize(("scope", "every"), SCOPES)
def test_torch_counts_as_much_in_a_step(tiny_models, trains_all, scope, every):
    transformer = load(tiny_models("5b")).train()
    if not trains_all:
        Lora(rank=1, alpha=1).attach(transformer)
    set_attention(transformer)
    if scope is not None:
        checkpoint_activations(transformer, scope, every)
    tokens = count_tokens(transformer.config, Bucket(17, 64, 96))
    settings = {"trains_all": trains_all, "checkpoint_scope": scope, "checkpoint_every": every}
    settings["recomputes_last"] = not omits_last_layer(transformer)
    with FlopCounterMode(display=False) as counter:
        predict(transformer).sum().backward()
    expected = 2 * count_flops(transformer.config, tokens, **settings)  # two samples
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", ["5b", "1.5-5b"])
def test_the_number_of_tokens_is_that_of_the_blocks(tiny_models, kind):
    transformer = load(tiny_models(kind))
    seen = []
    transformer.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        predict(transformer)
    assert seen[0].shape[1] == count_tokens(transformer.config, Bucket(17, 64, 96))


PEAKS = {"NVIDIA H200": 989.4, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.0, "Quadro P400": None}
PEAKS |= {"NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0, "NVIDIA RTX A6000": 154.8}
PEAKS |= {"NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA L40S": 362.0}
PEAKS |= {"NVIDIA GeForce RTX 3090": 71.0, "NVIDIA L40": 181.0, "NVIDIA A10": 125.0, "NVIDIA A10G": None}


@pytest.mark.parametrize(("name", "peak"), PEAKS.items())
def test_the_peak_belongs_to_exactly_this_card(name, peak):
    assert peak_tflops(name) == peak
