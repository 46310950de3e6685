"""The loss of a batch against the published formula, computed apart in float64 from the same random draws."""

import math

import pytest
import torch
from diffusers import CogVideoXPipeline

from buckets import Bucket
from dataset import Batch
from models import ModelSource, encode_videos
from objective import Objective
from tasks import TextToVideo
from test_diffusion import alphas_cumprod


KINDS = {"2b": (1.15258426, 3.0, 1), "5b": (0.7, 1.0, 1), "1.5-5b": (0.7, 1.0, 2)}  # scaling, shift, frames per patch
SEED = 11


def make_batch(frames: int = 5, height: int = 8, width: int = 12) -> Batch:
    """Two prepared samples, sized in latents."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 16, frames, height, width, generator=generator)
    logvar = torch.randn(2, 16, frames, height, width, generator=generator) - 2
    return Batch(
        names=["a", "b"],
        bucket=Bucket(4 * frames - 3, 8 * height, 8 * width),
        video_moments=torch.cat([mean, logvar], dim=1),
        prompt_embeds=torch.randn(2, 226, 64, generator=generator),
    )


def make_objective(source: ModelSource, model=None) -> Objective:
    transformer = source.load_transformer(torch.float32)
    return Objective(
        TextToVideo(),
        model or transformer,
        transformer,
        source.load_scheduler(),
        source.configs(),
        None,
        torch.float32,
    )


def draw(moments: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, list[float], torch.Tensor]:
    """What the objective draws: latents [B, F, C, H, W] and noise in float64, ac of each sample, timesteps."""
    scaling_factor, snr_shift_scale, frames_per_patch = KINDS[kind]
    generator = torch.Generator().manual_seed(SEED)
    mean, logvar = moments.double().chunk(2, dim=1)
    posterior = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).double()
    latents = (posterior * scaling_factor).movedim(2, 1)
    if latents.shape[1] % frames_per_patch:
        latents = torch.cat([latents[:, :1], latents], dim=1)
    noise = torch.randn(latents.shape, generator=generator).double()
    timesteps = torch.randint(1000, (len(latents),), generator=generator)
    schedule = alphas_cumprod(snr_shift_scale)
    return latents, noise, [schedule[timestep] for timestep in timesteps.tolist()], timesteps


def loss_of(objective: Objective, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return objective(batch, torch.Generator().manual_seed(SEED))


@pytest.mark.parametrize("frames", [5, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_published_one(tiny_models, kind, frames):
    batch = make_batch(frames)
    source = ModelSource(str(tiny_models(kind)))
    loss = loss_of(make_objective(source), batch)

    latents, noise, acs, timesteps = draw(batch.video_moments, kind)
    ac = torch.tensor(acs, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    noisy = ac.sqrt() * latents + (1 - ac).sqrt() * noise
    pipeline = CogVideoXPipeline.from_pretrained(tiny_models(kind), text_encoder=None, tokenizer=None, vae=None)
    positions = None
    if kind != "2b":
        positions = pipeline._prepare_rotary_positional_embeddings(64, 96, latents.shape[1], torch.device("cpu"))
    with torch.no_grad():
        velocity = pipeline.transformer(
            noisy.float(), batch.prompt_embeds, timesteps, image_rotary_emb=positions, return_dict=False
        )[0].double()
    denoised = ac.sqrt() * noisy - (1 - ac).sqrt() * velocity
    expected = (((denoised - latents) ** 2).mean(dim=(1, 2, 3, 4)) / (1 - ac.flatten())).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_predicts_the_true_velocity_has_no_loss(tiny_models, kind):
    batch = make_batch()
    latents, noise, acs, _ = draw(batch.video_moments, kind)
    ac = torch.tensor(acs, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    velocity = (ac.sqrt() * noise - (1 - ac).sqrt() * latents).float()

    def oracle(**_) -> tuple[torch.Tensor]:
        return (velocity,)

    loss = loss_of(make_objective(ModelSource(str(tiny_models(kind))), model=oracle), batch)
    assert loss.item() == pytest.approx(0, abs=1e-8)


def test_a_model_that_predicts_the_true_velocity_and_one_more_has_a_loss_of_one(tiny_models):
    batch = make_batch()
    latents, noise, acs, _ = draw(batch.video_moments, "5b")
    ac = torch.tensor(acs, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    velocity = (ac.sqrt() * noise - (1 - ac).sqrt() * latents).float()
    objective = make_objective(ModelSource(str(tiny_models("5b"))), model=lambda **_: (velocity + 1,))
    assert loss_of(objective, batch).item() == pytest.approx(1, rel=1e-4)


def test_raw_and_prepared_clips_have_the_same_loss(tiny_models):
    source = ModelSource(str(tiny_models("5b")))
    vae = source.load_vae(torch.float32, slicing=False, tiling=False)
    videos = torch.randint(256, (2, 5, 3, 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    embeds = make_batch().prompt_embeds
    raw = Batch(["a", "b"], Bucket(5, 16, 32), videos=videos, prompt_embeds=embeds)
    prepared = Batch(["a", "b"], Bucket(5, 16, 32), video_moments=encode_videos(vae, videos), prompt_embeds=embeds)
    objective = make_objective(source)
    loss = loss_of(objective, prepared)
    objective.vae = vae
    assert torch.equal(loss_of(objective, raw), loss)
    assert math.isfinite(loss)


def test_the_transformer_is_given_its_inputs_in_the_runs_dtype_and_the_loss_stays_in_float32(tiny_models):
    seen = {}

    def note(**inputs) -> tuple[torch.Tensor]:
        seen.update(inputs)
        return (torch.zeros_like(inputs["hidden_states"]),)

    objective = make_objective(ModelSource(str(tiny_models("5b"))), model=note)
    objective.dtype = torch.bfloat16
    assert loss_of(objective, make_batch()).dtype == torch.float32
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16
    assert seen["timestep"].dtype == torch.int64
    assert all(positions.dtype == torch.float32 for positions in seen["image_rotary_emb"])


def test_batches_of_different_sizes_each_get_their_own_positions(tiny_models):
    objective = make_objective(ModelSource(str(tiny_models("5b"))))
    sizes = [(5, 8, 12), (3, 4, 6), (5, 8, 12)]
    mixed = [loss_of(objective, make_batch(*size)) for size in sizes]
    alone = [loss_of(make_objective(ModelSource(str(tiny_models("5b")))), make_batch(*size)) for size in sizes[:2]]
    assert mixed == [*alone, alone[0]]


def test_the_draws_come_from_the_generator_alone(tiny_models):
    objective = make_objective(ModelSource(str(tiny_models("5b"))))
    first = loss_of(objective, make_batch())
    torch.rand(5)
    assert torch.equal(loss_of(objective, make_batch()), first)
