"""Image-to-video handles learned positions, and passes the transformer the same inputs as the pipeline."""

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image

from common.errors import UserError
from data.buckets import Bucket
from dataset import Batch
from diffusion.image_to_video import ImageToVideo
from models.condition_pipeline import ConditionFramesPipeline
from models.encoding import encode_noised_images, encode_videos
from models.source import ModelSource
from video.condition_frames import given_frames


SIZE = Bucket(17, 64, 96)  # the tiny models' native size
IMAGE_KINDS = ["5b-i2v", "1.5-5b-i2v"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in range(count)]


def configs_of(model):
    return ModelSource(str(model)).configs()


def test_learned_positions_are_refused_at_another_size_unless_they_are_dropped(tiny_models):
    configs = configs_of(tiny_models("5b-i2v"))
    ImageToVideo(0.05, False).check_model(configs, [SIZE])
    with pytest.raises(UserError, match=r"fit only 17x64x96 .*, not 17x96x64; .*--ignore_learned_positional_embed"):
        ImageToVideo(0.05, False).check_model(configs, [SIZE, Bucket(17, 96, 64)])
    ImageToVideo(0.05, True).check_model(configs, [SIZE, Bucket(17, 96, 64)])


def test_a_model_without_learned_positions_cannot_drop_them(tiny_models):
    with pytest.raises(UserError, match="this model has no learned positions; omit the flag"):
        ImageToVideo(0.05, True).check_model(configs_of(tiny_models("1.5-5b-i2v")), [SIZE])


@pytest.mark.parametrize("ignore", [True, False])
def test_learned_positions_are_dropped_on_request_from_the_config_too(tiny_models, ignore):
    transformer = ModelSource(str(tiny_models("5b-i2v"))).load_transformer(torch.float32)
    ImageToVideo(0.05, ignore).prepare_model(transformer)
    assert transformer.config.use_learned_positional_embeddings is not ignore
    assert ("patch_embed.pos_embedding" in transformer.state_dict()) is not ignore


def inputs_of_pipeline(
    model, image: Image.Image | list[Image.Image], num_frames: int, pipeline_class=CogVideoXImageToVideoPipeline
) -> dict[str, torch.Tensor]:
    pipeline = pipeline_class.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    options = {"height": 64, "width": 96, "num_frames": num_frames, "num_inference_steps": 1, "guidance_scale": 1}
    pipeline(image, "a", **options, generator=generator(), output_type="latent")
    return seen[0]


@pytest.mark.parametrize("num_frames", [17, 13])
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_the_image_is_where_the_pipeline_puts_it_and_scaled_alike(tiny_models, kind, num_frames):
    pixels = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=generator())
    sampled = inputs_of_pipeline(tiny_models(kind), Image.fromarray(pixels.permute(1, 2, 0).numpy()), num_frames)

    source = ModelSource(str(tiny_models(kind)))
    vae = source.load_vae(torch.float32, slicing=False, tiling=False)
    moments = encode_noised_images(vae, pixels[None], torch.zeros(1), generator())
    noisy_latents = sampled["hidden_states"][:, :, :16]
    trained = ImageToVideo(0.0, False).transformer_inputs(
        noisy_latents, Batch(["a"], SIZE, image_moments=moments), source.configs(), None, [generator()]
    )
    torch.testing.assert_close(trained["hidden_states"], sampled["hidden_states"], atol=1e-5, rtol=1e-5)
    assert trained["hidden_states"][:, 1:, 16:].abs().max() == 0 < trained["hidden_states"][:, 0, 16:].abs().max()
    if kind == "1.5-5b-i2v":
        assert torch.equal(trained["ofs"], sampled["ofs"])
    else:
        assert "ofs" not in trained
        assert sampled["ofs"] is None


# Latent frames of 17 and 16 frames: 5 and 4; CogVideoX 1.5 pads the 5 in front, by one that repeats the first.
@pytest.mark.parametrize(
    ("condition", "num_frames", "filled", "padded"),
    [
        ("first,last", 17, [0, 4], [0, 5]),
        ("first,last", 16, [0, 3], [0, 3]),
        ("first:2", 17, [0, 1], [0, 1, 2]),
        ("first:3", 16, [0, 1, 2], [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_given_frames_are_where_our_pipeline_puts_them(tiny_models, kind, condition, num_frames, filled, padded):
    count = len(given_frames(condition, num_frames))
    pixels = torch.randint(256, (count, 3, 64, 96), dtype=torch.uint8, generator=generator())
    images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    task, source = ImageToVideo(0.0, False, condition), ModelSource(str(tiny_models(kind)))
    sampled = inputs_of_pipeline(tiny_models(kind), images, num_frames, task.pipeline_class)

    moments = encode_noised_images(
        source.load_vae(torch.float32, slicing=False, tiling=False), pixels, torch.zeros(1), generator()
    )
    batch = Batch(["a"], Bucket(num_frames, 64, 96), image_moments=moments)
    noisy_latents = sampled["hidden_states"][:, :, :16]
    trained = task.transformer_inputs(noisy_latents, batch, source.configs(), None, [generator()])["hidden_states"]
    torch.testing.assert_close(trained, sampled["hidden_states"], atol=1e-5, rtol=1e-5)
    given = trained[0, :, 16:]
    assert [n for n, frame in enumerate(given) if frame.any()] == (padded if kind == "1.5-5b-i2v" else filled)
    if padded == [0, 1, 2] and num_frames == 17 and kind == "1.5-5b-i2v":
        assert torch.equal(given[0], given[1])


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_our_pipeline_samples_from_a_first_frame_as_the_library_does(tiny_models, kind):
    image = Image.effect_noise((96, 64), 50).convert("RGB")
    ours, library = (
        inputs_of_pipeline(tiny_models(kind), image, 17, one)
        for one in (ConditionFramesPipeline, CogVideoXImageToVideoPipeline)
    )
    assert torch.equal(ours["hidden_states"], library["hidden_states"])


def test_the_beginning_of_a_video_is_encoded_as_a_video_and_its_ends_as_images_under_one_strength(tiny_models):
    vae = ModelSource(str(tiny_models("5b-i2v"))).load_vae(torch.float32, slicing=False, tiling=False)
    video = torch.randint(256, (5, 3, 64, 96), dtype=torch.uint8, generator=generator())
    clean, noised = encode_noised_images(vae, video, torch.tensor([0.0, 0.1]), generator())
    torch.testing.assert_close(clean, encode_videos(vae, video[None])[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(noised, clean, atol=1e-2)
    ends = encode_noised_images(vae, video[[0, 4]], torch.zeros(1), generator())
    images = torch.cat([encode_videos(vae, video[None, [index]]) for index in (0, 4)], dim=2)
    torch.testing.assert_close(ends, images, atol=1e-5, rtol=1e-5)


def test_videos_that_are_not_longer_than_the_given_frames_are_refused(tiny_models):
    configs = configs_of(tiny_models("1.5-5b-i2v"))
    ImageToVideo(0.05, False, "first:2").check_model(configs, [Bucket(9, 64, 96)])
    with pytest.raises(UserError, match=r"--max_num_frames.*first:2 needs videos of 9 frames or more, not 8"):
        ImageToVideo(0.05, False, "first:2").check_model(configs, [Bucket(8, 64, 96), SIZE])


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_images_are_dropped_sample_by_sample(tiny_models, dropout):
    moments = torch.cat([torch.ones(64, 16, 1, 8, 12), torch.full((64, 16, 1, 8, 12), -30.0)], dim=1)
    task, configs = ImageToVideo(dropout, False), configs_of(tiny_models("5b-i2v"))
    latents, batch = torch.zeros(64, 2, 16, 8, 12), Batch(["a"] * 64, SIZE, image_moments=moments)
    inputs = task.transformer_inputs(latents, batch, configs, None, generators(64), drop_images=True)
    images = inputs["hidden_states"][:, 0, 16:]
    is_dropped = (images == 0).flatten(1).all(dim=1)
    assert torch.allclose(images[~is_dropped], torch.tensor(0.7), atol=1e-4)
    assert is_dropped.float().mean() == pytest.approx(dropout, abs=0.2 if dropout == 0.5 else 0)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_raw_images_are_encoded_under_noise_of_the_published_strength(tiny_models, kind):
    source = ModelSource(str(tiny_models(kind)))
    vae = source.load_vae(torch.float32, slicing=False, tiling=False)
    red, blue = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    red[0], blue[2] = 255, 255

    def conditions(image: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        task, batch = (
            ImageToVideo(dropout, False),
            Batch(["a", "b"], SIZE, images=torch.stack([image, image])[:, None]),
        )
        noisy_latents = torch.zeros(2, 5, 16, 8, 12)
        inputs = task.transformer_inputs(noisy_latents, batch, source.configs(), vae, generators(2), drop_images=True)
        return inputs["hidden_states"][:, 0, 16:]

    one, other = conditions(red)
    assert torch.equal(conditions(red)[0], one)
    assert not torch.allclose(one, other)
    factor = source.configs().image_scaling_factor
    clean = encode_noised_images(vae, red[None], torch.zeros(1), generator())[0, :16, 0] * factor
    assert (one - clean).abs().mean() < factor / 0.7  # the image is still there
    assert (one - conditions(blue)[0]).norm() > 0.3 * one.norm()  # under the same noise
    assert conditions(red, dropout=1.0).abs().max() == 0
