"""A task takes the models that are made for it, and no others."""

import pytest
import torch
from diffusers import CogVideoXPipeline

from buckets import Bucket
from dataset import Batch
from errors import UserError
from models import ModelSource
from tasks import TextToVideo


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-5b"])
def test_text_to_video_takes_a_text_to_video_model(tiny_models, kind):
    TextToVideo().check_model(ModelSource(str(tiny_models(kind))).configs())


def test_text_to_video_refuses_an_image_to_video_model_and_says_which_flag_to_change(tiny_models):
    with pytest.raises(UserError, match="--pretrained_model_name_or_path: this is an image-to-video model") as caught:
        TextToVideo().check_model(ModelSource(str(tiny_models("5b-i2v"))).configs())
    assert "32 channels" in str(caught.value)
    assert "16" in str(caught.value)


def test_text_to_video_shows_the_transformer_the_noisy_latents_alone():
    noisy_latents = torch.randn(1, 3, 16, 8, 12)
    inputs = TextToVideo().transformer_inputs(noisy_latents, Batch(["a"], Bucket(9, 64, 96)))
    assert inputs.keys() == {"hidden_states"}
    assert inputs["hidden_states"] is noisy_latents


def test_text_to_video_is_sampled_with_the_text_to_video_pipeline():
    assert TextToVideo.pipeline_class is CogVideoXPipeline
