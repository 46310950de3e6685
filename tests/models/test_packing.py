"""Packed samples of different sizes are predicted and trained as each on its own."""

import pytest
import torch

from diffusion.positions import rotary_embeddings
from forward_pass import load
from memory.activations import checkpoint_activations
from models.attention import set_attention
from tiny_steps import with_adapters


pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
SIZES = ((3, 8, 12), (1, 8, 8), (5, 6, 4))  # latent frames, height, width
CPU = torch.device("cpu")


def samples_of(transformer) -> list[dict]:
    """The inputs of a forward pass for each sample."""
    config, generator, samples = transformer.config, torch.Generator().manual_seed(0), []
    for number, (frames, height, width) in enumerate(SIZES):
        if config.use_learned_positional_embeddings:  # fit one size
            frames, height, width = 3, 8, 12
        frames += frames % (config.patch_size_t or 1)
        latents = torch.randn(1, frames, config.in_channels, height, width, generator=generator)
        embeds = torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator)
        sample = {"hidden_states": latents, "encoder_hidden_states": embeds, "timestep": torch.tensor([300 * number])}
        sample["image_rotary_emb"] = rotary_embeddings(transformer, frames, height * 8, width * 8, CPU)
        samples.append(sample)
    return samples


def one_by_one(transformer, samples: list[dict], ofs) -> list[torch.Tensor]:
    return [transformer(**sample, ofs=ofs, return_dict=False)[0] for sample in samples]


def packed(transformer, samples: list[dict], ofs) -> list[torch.Tensor]:
    return transformer(
        hidden_states=[sample["hidden_states"] for sample in samples],
        encoder_hidden_states=torch.cat([sample["encoder_hidden_states"] for sample in samples]),
        timestep=torch.cat([sample["timestep"] for sample in samples]),
        image_rotary_emb=[sample["image_rotary_emb"] for sample in samples],
        ofs=ofs,
    )


def train(compute, transformer) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    transformer.zero_grad()
    ofs = None if transformer.config.ofs_embed_dim is None else torch.full((1,), 2.0)
    outputs = compute(transformer, samples_of(transformer), ofs)
    sum(output.square().mean() for output in outputs).backward()
    gradients = {name: weight.grad for name, weight in transformer.named_parameters() if weight.grad is not None}
    return [output.detach() for output in outputs], gradients


def assert_close(got, wanted) -> None:
    for output, expected in zip(got[0], wanted[0], strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert got[1].keys() == wanted[1].keys()
    largest = max(gradient.norm() for gradient in wanted[1].values())
    for name, expected in wanted[1].items():
        assert (got[1][name] - expected).norm() < 1e-5 * largest, name


@pytest.mark.parametrize("kind", KINDS)
def test_packed_samples_are_computed_as_the_library_computes_each(tiny_models, kind):
    transformer = load(tiny_models(kind))
    expected = train(one_by_one, transformer)
    set_attention(transformer)
    assert_close(train(packed, transformer), expected)


@pytest.mark.parametrize(
    ("scope", "every"), [("block", 1), ("all-but-attention", 1), ("segment", 2), ("feed-forward", 1)]
)
def test_packed_samples_can_be_checkpointed(tiny_models, scope, every):
    transformer = with_adapters(tiny_models("5b"), dropout=0.0)
    expected = train(one_by_one, transformer)
    set_attention(transformer)
    checkpoint_activations(transformer, scope, every)
    assert_close(train(packed, transformer), expected)


def test_a_sample_does_not_see_the_others(tiny_models):
    transformer = load(tiny_models("5b"))
    set_attention(transformer)
    samples = samples_of(transformer)
    before = packed(transformer, samples, None)
    samples[1]["hidden_states"] += 1
    samples[1]["encoder_hidden_states"] += 1
    after = packed(transformer, samples, None)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])
