"""Training agrees with sampling: the transformer gets the same inputs, and learns the prediction that the scheduler
expects."""

import shutil
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from PIL import Image

import prepare_dataset
from data.buckets import Bucket
from dataset import Batch
from diffusion.image_to_video import ImageToVideo
from diffusion.text_to_video import TextToVideo
from models.encoding import encode_noised_images, encode_prompts
from models.prompts import PromptCache
from models.source import ModelSource
from prepared.folder import read_tensor
from prepared.read_index import read_index
from schedulers import alphas_cumprod
from tiny_runs import sample_latents
from tiny_steps import make_objective


KINDS = ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
NATIVE = Bucket(17, 64, 96)
# 5, 4 and 3 latent frames: 1.5 pads odd ones.
SIZES = [NATIVE, Bucket(16, 64, 96), Bucket(9, 64, 96), Bucket(17, 48, 80)]
LARGER = [Bucket(25, 96, 64)]  # for 1.5 there are no positions of it
PROMPTS = {"short": "a red circle", "empty": "", "long": "a red circle moves over a blue background, " * 100}
CPU = torch.device("cpu")


class Kind:
    """A tiny model as a user samples it, and the objective that trains it; learned positions may be dropped."""

    def __init__(self, source: ModelSource, *, drop_positions: bool):
        self.source = source
        self.configs = source.configs()
        self.task = ImageToVideo(0.0, drop_positions) if self.configs.is_image_to_video else TextToVideo()
        self.pipeline = self.task.pipeline_class.from_pretrained(source.path)
        exec("\n".join(self.task.usage()), {"pipe": self.pipeline})
        transformer = source.load_transformer(torch.float32).eval()
        self.task.prepare_model(transformer)
        self.objective = make_objective(source, transformer, task=self.task)

    def sample(self, size: Bucket, image: Image.Image | None = None, **options) -> torch.Tensor:
        return sample_latents(
            self.pipeline, size, **({"image": image} if self.task.condition == "image" else {}), **options
        )


@pytest.fixture(scope="module")
def make_kind(tiny_models) -> Callable[[str, Bucket], Kind]:
    """Return a kind as used for a size: CogVideoX-5b-I2V has learned positions only at the native one."""
    made = cache(lambda name, drop: Kind(ModelSource(str(tiny_models(name))), drop_positions=drop))
    return lambda name, size=NATIVE: made(name, name == "5b-i2v" and size != NATIVE)


def inputs_of(transformer: torch.nn.Module, run: Callable[[], object]) -> dict[str, object]:
    seen = []
    hook = transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        run()
    hook.remove()
    return {name: value for name, value in seen[0].items() if value is not None}


# Inputs of the transformer


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in KINDS for size in SIZES + ([] if name.startswith("1.5") else LARGER)],
    ids=str,
)
def test_training_and_sampling_pass_the_same_inputs_to_the_transformer(make_kind, name, size):
    """At the last timestep the noisy latents are pure noise, as at the first step of sampling."""
    kind = make_kind(name, size)
    pixels = torch.randint(256, (3, size.height, size.width), dtype=torch.uint8)
    batch = Batch(
        ["a"],
        size,
        video_moments=torch.randn(1, 32, *size.latent_shape),
        image_moments=encode_noised_images(kind.pipeline.vae, pixels[None], torch.zeros(1), torch.Generator()),
        prompt_embeds=encode_prompts(kind.pipeline, ["a red circle"]),
    )
    timesteps = torch.tensor([999])
    trained = inputs_of(
        kind.objective.transformer, lambda: kind.objective.losses(batch, timesteps, [torch.Generator().manual_seed(7)])
    )

    noise = trained["hidden_states"][:, :, :16]
    # The image's posterior is drawn after the video's and the noise.
    generator = torch.Generator().manual_seed(7)
    torch.randn(1, 16, *size.latent_shape, generator=generator)
    torch.randn(noise.shape, generator=generator)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    options = {"prompt": "a red circle", "guidance_scale": 1, "num_inference_steps": 1}
    sample = partial(kind.sample, size, image, latents=noise, generator=generator, **options)
    sampled = inputs_of(kind.pipeline.transformer, sample)
    assert trained.keys() == sampled.keys()
    assert ("image_rotary_emb" in trained) is (name != "2b")
    assert ("ofs" in trained) is (name == "1.5-5b-i2v")
    for key in trained.keys() - {"hidden_states", "return_dict"}:
        # No tolerance: not in values, dtypes or shapes.
        torch.testing.assert_close(trained[key], sampled[key], rtol=0, atol=0)
    # The VAE computes in another memory layout in training.
    torch.testing.assert_close(trained["hidden_states"], sampled["hidden_states"], rtol=1e-5, atol=1e-5)
    if kind.task.condition == "image":
        condition = trained["hidden_states"][:, :, 16:]
        assert condition[:, 1:].abs().max() == 0 < condition[:, 0].abs().min()
    assert kind.objective.transformer.state_dict().keys() == kind.pipeline.transformer.state_dict().keys()


@pytest.mark.parametrize("name", KINDS)
def test_guided_sampling_passes_the_cached_prompts_and_the_empty_one_to_the_transformer(make_kind, tmp_path, name):
    size = Bucket(1, 32, 48)
    kind = make_kind(name, size)
    cache = PromptCache(tmp_path, kind.source, torch.float32)
    cache.embed(list(PROMPTS.values()), CPU)
    for prompt in PROMPTS.values():
        options = {"prompt": prompt, "guidance_scale": 6, "num_inference_steps": 1}
        sample = partial(kind.sample, size, Image.new("RGB", (48, 32), "red"), **options)
        sampled = inputs_of(kind.pipeline.transformer, sample)
        assert torch.equal(sampled["encoder_hidden_states"], torch.stack([cache.load(""), cache.load(prompt)]))


@pytest.mark.parametrize("name", ["2b", "1.5-5b-i2v"])
def test_prepared_prompts_are_embedded_as_the_pipeline_does_in_the_same_precision(
    tiny_models, demo_clips, tmp_path, name
):
    captions = [PROMPTS["short"], PROMPTS["long"].strip()]
    for number, caption in enumerate(captions):
        clip = sorted(demo_clips.rglob("*.mp4"))[number]
        shutil.copy(clip, tmp_path / f"{number}.mp4")
        (tmp_path / f"{number}.txt").write_text(caption)
    flags = ["--model_id", str(tiny_models(name)), "--data_root", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    flags += ["--save_latents_and_embeddings", "--dtype", "bf16", "--frame_buckets", "1", "--max_num_frames", "1"]
    prepare_dataset.main([*flags, "--height_buckets", "32", "--width_buckets", "48"])
    prepared = [read_tensor(clip.prompt_embeds) for clip in read_index(tmp_path / "out")]

    pipeline = CogVideoXPipeline.from_pretrained(tiny_models(name), transformer=None, vae=None, dtype=torch.bfloat16)
    with torch.no_grad():
        sampled = [pipeline.encode_prompt(caption, do_classifier_free_guidance=False)[0][0] for caption in captions]
    assert len(prepared) == 2
    for embeds in sampled:
        assert embeds.dtype == torch.bfloat16
        assert any(torch.equal(embeds, other) for other in prepared)


# Target of the transformer


def predict_the_truth(kind: Kind, clean: torch.Tensor) -> Callable[..., tuple[torch.Tensor]]:
    """Return a forward pass that predicts the velocity from its noisy input to the clean latents, in float64."""
    schedule = torch.tensor(alphas_cumprod(kind.configs.scheduler["snr_shift_scale"]), dtype=torch.float64)

    def forward(hidden_states, timestep, **_) -> tuple[torch.Tensor]:
        ac = schedule[timestep].view(-1, 1, 1, 1, 1)
        noisy = hidden_states[:, :, :16].double()
        return (((ac.sqrt() * noisy - clean) / (1 - ac).sqrt()).float(),)

    return forward


@pytest.mark.parametrize("name", KINDS)
def test_the_true_velocity_has_no_loss_and_the_scheduler_recovers_the_clean_latents_at_every_timestep(
    make_kind, monkeypatch, name
):
    kind, timesteps = make_kind(name), torch.arange(1000)
    mean = torch.randn(1000, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    moments = torch.cat([mean, torch.full_like(mean, -40.0)], dim=1)  # e^-40: practically no noise
    clean = mean.movedim(1, 2).double() * {"2b": 1.15258426}.get(name, 0.7)
    if name.startswith("1.5"):
        clean = clean.expand(-1, 2, -1, -1, -1)  # padded
    transformer = kind.objective.transformer
    monkeypatch.setattr(transformer, "forward", predict_the_truth(kind, clean))
    tensors = {"video_moments": moments, "image_moments": moments, "prompt_embeds": torch.zeros(1000, 1, 64)}
    batch = Batch(["a"] * 1000, Bucket(1, 16, 16), **tensors)
    generators = [torch.Generator().manual_seed(number) for number in range(1000)]
    losses = []
    trained = inputs_of(transformer, lambda: losses.append(kind.objective.losses(batch, timesteps, generators)))
    assert losses[0].shape == (1000,)
    assert losses[0].max() < 1e-6

    noisy = trained["hidden_states"][:, :, :16]
    (velocity,) = transformer.forward(noisy, timesteps)
    config = kind.pipeline.scheduler.config
    ddim, dpm = CogVideoXDDIMScheduler.from_config(config), CogVideoXDPMScheduler.from_config(config)
    for scheduler in (ddim, dpm):
        scheduler.set_timesteps(1000)
    steps = [
        (ddim.step(v, t, z).pred_original_sample, dpm.step(v, None, t, None, z)[1])
        for t, v, z in zip(timesteps, velocity, noisy, strict=True)
    ]
    for predicted in zip(*steps, strict=True):
        torch.testing.assert_close(torch.stack(predicted).double(), clean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("name", KINDS)
def test_a_pipeline_whose_model_predicts_the_true_velocity_samples_the_clean_latents(
    make_kind, monkeypatch, name, scheduler_class
):
    kind, size = make_kind(name), NATIVE
    frames, height, width = size.latent_shape
    frames += frames % 2 if name.startswith("1.5") else 0
    clean = torch.randn(1, frames, 16, height, width, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(kind.pipeline.transformer, "forward", predict_the_truth(kind, clean.double()))
    monkeypatch.setattr(kind.pipeline, "scheduler", scheduler_class.from_config(kind.pipeline.scheduler.config))
    options = {"prompt": "a", "guidance_scale": 1, "num_inference_steps": 8, "generator": torch.Generator()}
    sampled = kind.sample(size, Image.new("RGB", (96, 64), "red"), **options)
    torch.testing.assert_close(sampled, clean, rtol=0, atol=1e-3)
