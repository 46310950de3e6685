"""The objective, latents and positions against independent float64 computations and the pipeline's own."""

import math

import pytest
import torch
from diffusers import CogVideoXPipeline

from data.sampler import Draw
from diffusion.latents import image_noise_scales, mask_weights, sample_latents, sample_uniform, velocity_losses
from diffusion.positions import rotary_embeddings
from diffusion.randomness import sample_generators, step_generator
from schedulers import alphas_cumprod, make_scheduler


@pytest.mark.parametrize("snr_shift_scale", [3.0, 1.0])
@pytest.mark.parametrize("timestep", [0, 1, 250, 500, 900, 998, 999])
def test_the_loss_is_the_published_weighted_one_computed_in_float64(snr_shift_scale, timestep):
    scheduler = make_scheduler(snr_shift_scale)
    generator = torch.Generator().manual_seed(timestep)
    latents, noise, prediction = (torch.randn(2, 3, 4, 5, 6, generator=generator) for _ in range(3))
    losses = velocity_losses(prediction, scheduler.get_velocity(latents, noise, torch.full((2,), timestep)))

    ac = alphas_cumprod(snr_shift_scale)[timestep]
    for sample, loss in enumerate(losses.tolist()):
        total = 0.0
        values = (tensor[sample].flatten().tolist() for tensor in (latents, noise, prediction))
        for z0, e, v in zip(*values, strict=True):
            zt = math.sqrt(ac) * z0 + math.sqrt(1 - ac) * e
            z0_hat = math.sqrt(ac) * zt - math.sqrt(1 - ac) * v
            total += (z0_hat - z0) ** 2 / (1 - ac)
        assert loss == pytest.approx(total / latents[sample].numel(), rel=1e-5)


def test_the_weights_of_a_mask_have_the_mean_one_and_those_of_a_white_mask_are_one():
    masks = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = mask_weights(masks.half(), 0.25)
    expected = [[0.25 + 0.75 * value for value in mask.flatten().tolist()] for mask in masks]
    for sample, values in enumerate(expected):
        mean = sum(values) / len(values)
        assert weights[sample].flatten().tolist() == pytest.approx([value / mean for value in values], rel=2e-3)
    assert weights.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1], rel=1e-6)
    for background in (0.0, 0.1, 0.3):
        assert torch.equal(mask_weights(torch.ones(2, 13, 60, 90).half(), background), torch.ones(2, 13, 60, 90))
    assert torch.equal(mask_weights(torch.zeros(1, 3, 4, 6), 0.0), torch.zeros(1, 3, 4, 6))  # and not NaN


def test_latents_decode_in_the_pipelines_own_scale_and_layout(tiny_models):
    """The pipeline passes to the VAE's decoder what the encoder returned."""
    pipeline = CogVideoXPipeline.from_pretrained(tiny_models("2b"))
    mean = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    moments = torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)  # e^-30: no noise to speak of
    latents = sample_latents(moments, pipeline.vae.config.scaling_factor, [torch.Generator()])
    torch.testing.assert_close(
        pipeline.decode_latents(latents), pipeline.vae.decode(mean).sample, atol=1e-4, rtol=1e-4
    )


SIZES = [(17, 64, 96), (9, 64, 96), (17, 32, 64)]  # the native one first, the largest of CogVideoX 1.5
LARGER = [(17, 96, 64), (25, 32, 128)]


@pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, size) for kind in ("2b", "5b", "1.5-5b") for size in SIZES + (LARGER if kind != "1.5-5b" else [])],
)
def test_positions_are_exactly_those_that_sampling_uses(tiny_models, kind, size):
    num_frames, height, width = size
    pipeline, seen = CogVideoXPipeline.from_pretrained(tiny_models(kind)), []
    pipeline.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    size_of_video = {"height": height, "width": width, "num_frames": num_frames}
    pipeline("a circle", **size_of_video, num_inference_steps=1, output_type="latent")
    num_latent_frames, sampled = seen[0]["hidden_states"].shape[1], seen[0]["image_rotary_emb"]
    trained = rotary_embeddings(pipeline.transformer, num_latent_frames, height, width, torch.device("cpu"))
    assert (trained is None) == (sampled is None) == (kind == "2b")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained or (), sampled or (), strict=True))


def test_the_noise_of_a_sample_does_not_depend_on_its_batch():
    draws = [Draw(3, 0), Draw(5, 0), Draw(3, 1), Draw(3, 0, copy=1)]

    def noise(*numbers: int) -> torch.Tensor:
        generators = sample_generators(torch.device("cpu"), 7, [draws[number] for number in numbers])
        uniform = sample_uniform(generators)
        return sample_latents(torch.zeros(len(numbers), 6, 2, 4, 4), 1.0, generators) + uniform.view(-1, 1, 1, 1, 1)

    together = noise(0, 1, 2, 3)
    assert torch.equal(torch.cat([noise(0), noise(1), noise(2), noise(3)]), together)
    assert torch.equal(noise(2, 0), together[[2, 0]])
    assert len({sample.sum().item() for sample in together}) == 4


def test_a_steps_noise_depends_only_on_its_place_in_the_run():
    def draw(*position: int) -> torch.Tensor:
        return torch.randn(4, generator=step_generator(torch.device("cpu"), *position))

    first = draw(42, 7, 0, 0)
    torch.randn(100)
    assert torch.equal(draw(42, 7, 0, 0), first)
    assert not any(
        torch.equal(draw(*other), first) for other in [(43, 7, 0, 0), (42, 8, 0, 0), (42, 7, 1, 0), (42, 7, 0, 1)]
    )


# Noise on the first frame


def test_one_noise_scale_follows_the_published_distribution():
    generator = torch.Generator().manual_seed(0)
    logs = torch.cat([image_noise_scales(1, generator) for _ in range(4000)]).log().double()
    assert logs.mean() == pytest.approx(-3.0, abs=0.03)
    assert logs.std() == pytest.approx(0.5, abs=0.03)


def test_each_of_several_noise_scales_is_from_another_part_of_the_distribution():
    generator = torch.Generator().manual_seed(0)
    # The quartiles of N(-3, 0.5): the normal distribution's are at 0.67449 standard deviations.
    edges = [-math.inf, -3 - 0.5 * 0.67449, -3, -3 + 0.5 * 0.67449, math.inf]
    draws = torch.stack([image_noise_scales(4, generator) for _ in range(200)]).log()
    for part in range(4):
        assert ((edges[part] - 1e-4 <= draws[:, part]) & (draws[:, part] <= edges[part + 1] + 1e-4)).all()
    assert draws.mean() == pytest.approx(-3.0, abs=0.05)
