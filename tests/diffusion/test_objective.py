"""The loss of a batch equals the published formula, computed in float64 from the same random draws."""

from dataclasses import replace

import pytest
import torch
from diffusers import CogVideoXPipeline

from data.buckets import Bucket
from data.sampler import Draw
from dataset import Batch, MixedBatch
from diffusion.objective import Objective
from diffusion.timesteps import TimestepSampling
from models.attention import set_attention
from models.encoding import encode_videos
from models.source import ModelSource
from schedulers import alphas_cumprod
from tiny_steps import make_objective


KINDS = {"2b": (1.15258426, 3.0, 1), "5b": (0.7, 1.0, 1), "1.5-5b": (0.7, 1.0, 2)}  # scaling, shift, frames per patch
SEED = 11


def make_batch(frames: int = 5, height: int = 8, width: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 16, frames, height, width, generator=generator)
    logvar = torch.randn(2, 16, frames, height, width, generator=generator) - 2
    return Batch(
        names=["a", "b"],
        bucket=Bucket(4 * frames - 3, 8 * height, 8 * width),
        video_moments=torch.cat([mean, logvar], dim=1),
        prompt_embeds=torch.randn(2, 226, 64, generator=generator),
    )


def recorded_objective(tiny_models) -> tuple[Objective, list[dict[str, torch.Tensor]]]:
    calls = []

    def predict_zeros(**inputs) -> tuple[torch.Tensor]:
        calls.append(inputs)
        return (torch.zeros_like(inputs["hidden_states"]),)

    return make_objective(ModelSource(str(tiny_models("5b"))), model=predict_zeros), calls


def draw(moments: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, list[float], torch.Tensor]:
    """The objective's draws: latents [B, F, C, H, W] and noise in float64, ac of each sample, timesteps."""
    scaling_factor, snr_shift_scale, frames_per_patch = KINDS[kind]
    schedule = alphas_cumprod(snr_shift_scale)
    timesteps, latents, noise = [], [], []
    for generator, moment in zip(generators(len(moments)), moments.double(), strict=True):
        timesteps.append(int(1000 * torch.rand(1, generator=generator, dtype=torch.float64)))
        mean, logvar = moment.chunk(2)
        posterior = mean + (0.5 * logvar).exp() * torch.randn(1, *mean.shape, generator=generator)[0].double()
        sample = (posterior * scaling_factor).movedim(1, 0)
        if len(sample) % frames_per_patch:
            sample = torch.cat([sample[:1], sample])
        latents.append(sample)
        noise.append(torch.randn(1, *sample.shape, generator=generator)[0].double())
    acs = [schedule[timestep] for timestep in timesteps]
    return torch.stack(latents), torch.stack(noise), acs, torch.tensor(timesteps)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(SEED + number) for number in range(count)]


def losses_of(objective: Objective, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return objective(batch, generators(len(batch.names)))


@pytest.mark.parametrize("frames", [5, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_published_one(tiny_models, kind, frames):
    batch = make_batch(frames)
    losses = losses_of(make_objective(ModelSource(str(tiny_models(kind)))), batch)

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
    expected = ((denoised - latents) ** 2).mean(dim=(1, 2, 3, 4)) / (1 - ac.flatten())
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", ["5b", "1.5-5b"])  # the latter's latents are padded in front
def test_a_white_mask_changes_no_bit_and_another_one_weights_the_errors_of_each_position(tiny_models, kind):
    objective, errors = make_objective(ModelSource(str(tiny_models(kind)))), []
    batch = make_batch()
    plain, objective.mask_background = losses_of(objective, batch), 0.1
    white = replace(batch, masks=torch.ones(2, 5, 8, 12, dtype=torch.float16))
    assert torch.equal(losses_of(objective, white), plain)

    masks = torch.rand(2, 5, 8, 12, generator=torch.Generator().manual_seed(1)).half()
    latents, noise, acs, _ = draw(batch.video_moments, kind)
    predict = objective.model

    def recorded(**inputs) -> tuple[torch.Tensor]:
        (velocity,) = predict(**inputs)
        ac = torch.tensor(acs, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
        errors.append((velocity.double() - (ac.sqrt() * noise - (1 - ac).sqrt() * latents)) ** 2)
        return (velocity,)

    objective.model = recorded
    losses = losses_of(objective, replace(batch, masks=masks))
    weights = 0.1 + 0.9 * masks.double()
    if kind == "1.5-5b":
        weights = torch.cat([weights[:, :1], weights], dim=1)
    expected = (errors[0].mean(dim=2) * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_without_a_background_weight_the_gradient_comes_only_from_white(tiny_models):
    objective, outputs = make_objective(ModelSource(str(tiny_models("5b")))), []

    def predict(**inputs) -> tuple[torch.Tensor]:
        outputs.append(torch.zeros_like(inputs["hidden_states"], requires_grad=True))
        return (outputs[0],)

    objective.model, objective.mask_background = predict, 0.0
    masks = torch.zeros(2, 5, 8, 12)
    masks[0, 1:3, 2:5, 3:9] = masks[1, :, :4] = 1
    objective(replace(make_batch(), masks=masks), generators(2)).sum().backward()
    assert torch.equal((outputs[0].grad != 0).all(dim=2), masks.bool())
    assert torch.equal((outputs[0].grad != 0).any(dim=2), masks.bool())


def test_raw_and_prepared_clips_have_the_same_loss(tiny_models):
    source = ModelSource(str(tiny_models("5b")))
    vae = source.load_vae(torch.float32, slicing=False, tiling=False)
    videos = torch.randint(256, (2, 5, 3, 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    embeds = make_batch().prompt_embeds
    raw = Batch(["a", "b"], Bucket(5, 16, 32), videos=videos, prompt_embeds=embeds)
    prepared = Batch(["a", "b"], Bucket(5, 16, 32), video_moments=encode_videos(vae, videos), prompt_embeds=embeds)
    objective = make_objective(source)
    losses = losses_of(objective, prepared)
    objective.vae = vae
    assert torch.equal(losses_of(objective, raw), losses)
    assert losses.isfinite().all()


def test_the_transformers_inputs_have_the_runs_dtype_and_the_loss_is_float32(tiny_models):
    objective, calls = recorded_objective(tiny_models)
    objective.dtype = torch.bfloat16
    assert losses_of(objective, make_batch()).dtype == torch.float32
    (seen,) = calls
    assert seen["hidden_states"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16
    assert seen["timestep"].dtype == torch.int64
    assert all(positions.dtype == torch.float32 for positions in seen["image_rotary_emb"])


def test_batches_of_different_sizes_each_get_their_own_positions(tiny_models):
    objective = make_objective(ModelSource(str(tiny_models("5b"))))
    sizes = [(5, 8, 12), (3, 4, 6), (5, 8, 12)]
    mixed = [losses_of(objective, make_batch(*size)).tolist() for size in sizes]
    source = ModelSource(str(tiny_models("5b")))
    alone = [losses_of(make_objective(source), make_batch(*size)).tolist() for size in sizes[:2]]
    assert mixed == [*alone, alone[0]]


def gradients(objective: Objective) -> dict[str, torch.Tensor]:
    named = {name: weight.grad for name, weight in objective.transformer.named_parameters()}
    return {name: gradient for name, gradient in named.items() if gradient is not None}


def test_accumulated_gradients_are_those_of_the_big_batch(tiny_models):
    source, batch = ModelSource(str(tiny_models("5b"))), make_batch()
    at_once, accumulated = make_objective(source), make_objective(source)
    at_once(batch, generators(2)).mean().backward()
    for number, generator in enumerate(generators(2)):
        moments, embeds = batch.video_moments[number : number + 1], batch.prompt_embeds[number : number + 1]
        one = Batch([batch.names[number]], batch.bucket, video_moments=moments, prompt_embeds=embeds)
        (accumulated(one, [generator]).sum() / 2).backward()
    expected = gradients(at_once)
    assert gradients(accumulated).keys() == expected.keys() != set()
    for name, gradient in gradients(accumulated).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_dropped_caption_becomes_the_empty_prompt(tiny_models, probability):
    objective, calls = recorded_objective(tiny_models)
    objective.empty_prompt = torch.full((226, 64), 7.0)
    batch, objective.caption_dropout = make_batch(), probability
    losses_of(objective, batch)
    expected = objective.empty_prompt.expand(2, -1, -1) if probability else batch.prompt_embeds
    objective.losses(batch, torch.tensor([5, 5]), generators(2))
    trained, validated = (call["encoder_hidden_states"] for call in calls)
    assert torch.equal(trained, expected)
    assert torch.equal(validated, batch.prompt_embeds)


def test_captions_are_dropped_sample_by_sample_as_often_as_asked_for(tiny_models):
    objective, calls = recorded_objective(tiny_models)
    objective.caption_dropout, objective.empty_prompt = 0.25, torch.full((226, 64), 7.0)
    moments = torch.zeros(400, 32, 1, 2, 2)
    batch = Batch(["a"] * 400, Bucket(1, 16, 16), video_moments=moments, prompt_embeds=torch.zeros(400, 226, 64))
    losses_of(objective, batch)
    assert (calls[0]["encoder_hidden_states"][:, 0, 0] == 7).sum().item() == pytest.approx(100, abs=30)


def test_weights_multiply_the_losses_of_the_samples(tiny_models):
    objective = make_objective(ModelSource(str(tiny_models("5b"))))
    plain = losses_of(objective, make_batch())
    objective.timesteps = TimestepSampling(snr_gamma=5.0)
    acs = torch.tensor(draw(make_batch().video_moments, "5b")[2])
    snr = acs / (1 - acs)
    torch.testing.assert_close(losses_of(objective, make_batch()), plain * snr.clamp(max=5.0) / (snr + 1))


def test_timesteps_are_drawn_from_the_samples_part(tiny_models):
    objective, calls = recorded_objective(tiny_models)
    objective(make_batch(), generators(2), parts=torch.tensor([[9, 10], [0, 10]]))
    first, second = calls[0]["timestep"].tolist()
    assert 900 <= first < 1000
    assert 0 <= second < 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_has_the_losses_and_gradients_of_its_samples(tiny_models, kind):
    source = ModelSource(str(tiny_models(kind)))
    transformer = source.load_transformer(torch.float32)
    set_attention(transformer)
    objective = make_objective(source, transformer=transformer)
    objective.caption_dropout, objective.empty_prompt = 0.5, torch.zeros(226, 64)
    parts = [make_batch(5), make_batch(1, 6, 8)]
    each = [objective(part, generators(4)[2 * number :][:2]) for number, part in enumerate(parts)]
    torch.cat(each).sum().backward()
    expected = {name: weight.grad for name, weight in transformer.named_parameters() if weight.grad is not None}
    transformer.zero_grad()
    mixed = objective(MixedBatch(parts), generators(4))
    mixed.sum().backward()
    torch.testing.assert_close(mixed, torch.cat(each), rtol=1e-5, atol=1e-6)
    largest = max(gradient.norm() for gradient in expected.values())
    for name, weight in transformer.named_parameters():
        if name in expected:
            assert (weight.grad - expected[name]).norm() < 1e-5 * largest, name


def test_captions_are_dropped_by_the_chance_of_each_sample(tiny_models):
    objective, calls = recorded_objective(tiny_models)
    objective.empty_prompt, objective.caption_dropout = torch.full((226, 64), 7.0), torch.tensor([1.0, 0.0, 1.0])
    batch = replace(make_batch(), draws=[Draw(1, 0), Draw(2, 0)])
    losses_of(objective, batch)
    (call,) = calls
    assert torch.equal(call["encoder_hidden_states"], torch.stack([batch.prompt_embeds[0], objective.empty_prompt]))
