"""The FLOPs of a step equal figures worked out by hand and torch's count of a tiny model's step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.buckets import Bucket, count_tokens
from forward_pass import COGVIDEOX_5B, load, predict
from methods.lora import Lora
from tracking.flops import count_flops, peak_tflops


def test_a_step_of_cogvideox_5b():
    tokens = count_tokens(COGVIDEOX_5B, Bucket(49, 480, 720))
    assert tokens == 226 + 13 * 30 * 45 == 17_776
    step = count_flops(COGVIDEOX_5B, tokens, trains_all=False, checkpoint_scope="block")
    assert step.forward / 1e12 == pytest.approx(332, abs=0.5)  # 169 in linear layers, 163 in attention
    assert step.attention_backward / 1e12 == pytest.approx(408, abs=0.5)
    assert step.linear_backward / 1e12 == pytest.approx(169, abs=0.5)
    assert step.recompute == step.forward
    assert step.total / 1e12 == pytest.approx(1241, abs=1)


def test_full_fine_tuning_doubles_the_backward_pass_of_linear_layers():
    lora, full = (count_flops(COGVIDEOX_5B, 17_776, trains_all=trains_all) for trains_all in (False, True))
    assert full.linear_backward == 2 * lora.linear_backward
    assert full.attention_backward == lora.attention_backward


def test_checkpointed_parts_are_computed_again():
    def recompute(scope: str | None, every: int = 1) -> float:
        settings = {"checkpoint_scope": scope, "checkpoint_every": every}
        return count_flops(COGVIDEOX_5B, 17_776, trains_all=False, **settings).recompute

    assert recompute(None) == 0
    assert recompute("feed-forward") == pytest.approx(169.1e12 * 2 / 3, rel=1e-3)
    assert recompute("block", every=4) == recompute("block") * 11 / 42  # blocks 0, 4, ... 40
    assert recompute("segment", every=4) == recompute("block")


@pytest.mark.parametrize("trains_all", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_torch_counts_as_much_in_a_step(tiny_models, trains_all, checkpointing):
    transformer = load(tiny_models("5b")).train()
    if not trains_all:
        Lora(rank=1, alpha=1).attach(transformer)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    tokens = count_tokens(transformer.config, Bucket(17, 64, 96))
    scope = "block" if checkpointing else None
    expected = 2 * count_flops(transformer.config, tokens, trains_all=trains_all, checkpoint_scope=scope).total
    with FlopCounterMode(display=False) as counter:
        predict(transformer).sum().backward()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("kind", ["5b", "1.5-5b"])
def test_the_number_of_tokens_is_that_of_the_blocks(tiny_models, kind):
    transformer = load(tiny_models(kind))
    seen = []
    transformer.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        predict(transformer)
    assert seen[0].shape[1] == count_tokens(transformer.config, Bucket(17, 64, 96))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("Quadro P400", None),
    ],
)
def test_the_peak_belongs_to_exactly_this_card(name, peak):
    assert peak_tflops(name) == peak
