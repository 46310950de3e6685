"""A task takes the models made for it, at the sizes that they sample."""

from itertools import product

import pytest
import torch

from common.errors import UserError
from data.buckets import Bucket
from diffusion.image_to_video import ImageToVideo
from diffusion.positions import rotary_embeddings
from diffusion.text_to_video import TextToVideo
from models.source import ModelSource
from repository import ROOT


SIZE = Bucket(17, 64, 96)  # the tiny models' native size
IMAGE_KINDS = ["5b-i2v", "1.5-5b-i2v"]
LATER_KINDS = ["1.5-5b", "1.5-5b-i2v"]


def configs_of(model):
    return ModelSource(str(model)).configs()


def task_of(kind: str) -> TextToVideo | ImageToVideo:
    return ImageToVideo(0.05, False) if kind in IMAGE_KINDS else TextToVideo()


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        (TextToVideo(), "5b-i2v", "an image-to-video model .* takes 32 channels.* cogvideox_image_to_video_lora.py"),
        (ImageToVideo(0.05, False), "5b", "a text-to-video model .* cogvideox_text_to_video_lora.py"),
    ],
)
def test_a_model_of_the_other_task_is_refused_with_its_script(tiny_models, task, kind, message):
    with pytest.raises(UserError, match=f"^--pretrained_model_name_or_path: this is {message}"):
        task.check_model(configs_of(tiny_models(kind)), [SIZE])


def test_a_text_model_with_learned_positions_takes_only_their_size():
    configs = configs_of(ROOT / "assets/models/tiny-cogvideox")
    TextToVideo().check_model(configs, [SIZE])
    with pytest.raises(UserError, match=r"fit only 17x64x96 .*, not 17x96x64; use that size$"):
        TextToVideo().check_model(configs, [SIZE, Bucket(17, 96, 64)])


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_models_that_compute_their_positions_take_any_size(tiny_models, kind):
    TextToVideo().check_model(configs_of(tiny_models(kind)), [Bucket(9, 96, 64), Bucket(33, 128, 160)])


@pytest.mark.parametrize("kind", LATER_KINDS)
@pytest.mark.parametrize(("size", "nearest"), [((96, 64), "64x64"), ((64, 112), "64x96"), ((128, 128), "64x96")])
def test_sizes_beyond_the_positions_of_cogvideox_1_5_are_refused_with_the_nearest(tiny_models, kind, size, nearest):
    height, width = size
    words = rf"--height_buckets.* up to 64x96 .*, not for {height}x{width}; nearest is {nearest}"
    with pytest.raises(UserError, match=words) as caught:
        task_of(kind).check_model(configs_of(tiny_models(kind)), [SIZE, Bucket(17, height, width)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", LATER_KINDS)
def test_cogvideox_1_5_takes_exactly_the_sizes_that_its_pipeline_has_positions_for(tiny_models, kind):
    transformer = ModelSource(str(tiny_models(kind))).load_transformer(torch.float32)
    configs, taken = configs_of(tiny_models(kind)), []
    for height, width in product(range(16, 113, 16), repeat=2):
        try:
            rotary_embeddings(transformer, 4, height, width, torch.device("cpu"))
        except RuntimeError:
            with pytest.raises(UserError, match="nearest"):
                task_of(kind).check_model(configs, [Bucket(17, height, width)])
        else:
            task_of(kind).check_model(configs, [Bucket(17, height, width)])
            taken.append((height, width))
    assert set(taken) == set(product(range(16, 65, 16), range(16, 97, 16)))


@pytest.mark.parametrize("kind", LATER_KINDS)
@pytest.mark.parametrize(
    ("frames", "nearest"), [(4, "1, 8"), (5, "1, 8"), (12, "9, 16"), (13, "9, 16"), (20, "17, 24"), (45, "41, 48")]
)
def test_frame_counts_that_cogvideox_1_5_does_not_sample_are_refused_with_the_nearest(
    tiny_models, kind, frames, nearest
):
    words = rf"--frame_buckets: .* takes 1, 8k or 8k\+1 frames, not {frames}, .*; nearest are {nearest} "
    with pytest.raises(UserError, match=words) as caught:
        task_of(kind).check_model(configs_of(tiny_models(kind)), [SIZE, Bucket(frames, 64, 96)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", LATER_KINDS)
def test_the_frame_counts_taken_are_those_that_the_vae_returns(tiny_models, kind):
    vae = ModelSource(str(tiny_models(kind))).load_vae(torch.float32, slicing=False, tiling=False)
    configs, taken = configs_of(tiny_models(kind)), []
    for frames in (1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25):
        size = Bucket(frames, 16, 16)
        with torch.no_grad():
            decoded = vae.decode(vae.encode(torch.zeros(1, 3, *size)).latent_dist.mean).sample
        if decoded.shape[2] == frames:
            task_of(kind).check_model(configs, [size])
            taken.append(frames)
        else:
            with pytest.raises(UserError, match="--max_num_frames"):
                task_of(kind).check_model(configs, [size])
    assert taken == [1, 8, 9, 16, 17, 24, 25]
