"""The benchmark of a control in the sequence: it computes what it says."""

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from in_context import SOURCE, WAYS, Way, put_in_sequence, relative_flop


HEADS, TOKENS = 32, 24  # channels of a head, tokens of a latent frame


def positions(times: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotary positions of the tokens of latent frames at these times."""
    cos, sin = get_3d_rotary_pos_embed(HEADS, ((0, 0), (4, 6)), (4, 6), max(times) + 1)
    return tuple(torch.cat([part[TOKENS * time :][:TOKENS] for time in times]) for part in (cos, sin))


@torch.no_grad()
@pytest.mark.parametrize(
    ("way", "times"),
    [(Way("before"), range(10)), (Way("shared", shares_positions=True), [*range(5), *range(5)])],
    ids=lambda value: value.name if isinstance(value, Way) else "",
)
def test_the_control_is_computed_as_clean_frames_in_front(way, times):
    scheduler = SOURCE.load_scheduler("ddim")
    transformer, changed = (SOURCE.load_transformer(torch.float32).eval() for _ in range(2))
    noisy, control = torch.randn(2, 1, 5, 16, 8, 12, generator=torch.Generator().manual_seed(0)).unbind(0)
    text, timestep = torch.full((1, 226, 64), 0.1), torch.tensor([600])
    put_in_sequence(changed, way, scheduler)
    velocity = changed(torch.cat([noisy, control], dim=2), timestep=timestep, encoder_hidden_states=text)[0]

    embedded = [transformer.patch_embed(text, part) for part in (control, noisy)]  # with the learned positions
    prompt, tokens = embedded[0][:, :226], torch.cat([part[:, 226:] for part in embedded], dim=1)
    time = transformer.time_embedding(transformer.time_proj(timestep))
    for block in transformer.transformer_blocks:
        tokens, prompt = block(tokens, prompt, time, positions(times))
    tokens = transformer.proj_out(transformer.norm_out(transformer.norm_final(tokens), temb=time))[:, -5 * TOKENS :]
    expected = tokens.reshape(1, 5, 4, 6, 16, 2, 2).permute(0, 1, 4, 2, 5, 3, 6).reshape(1, 5, 16, 8, 12)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)


def test_the_sequence_costs_more_than_its_length():
    assert relative_flop(WAYS[0]) == 1
    assert relative_flop(Way("before")) > 2  # of 27 latent frames and text; attention is quadratic
    assert relative_flop(WAYS[1]) > relative_flop(Way("before"))
