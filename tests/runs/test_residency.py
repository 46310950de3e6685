"""Only the networks that a stage of a run needs are in memory."""

import gc

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXEncoder3D
from PIL import Image
from transformers import T5EncoderModel

from diffusion.image_to_video import ImageToVideo
from diffusion.text_to_video import TextToVideo
from run.loop import train
from tiny_runs import set_up_run


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SIZE = ["--height", "64", "--width", "96", "--frame_buckets", "9", "--max_num_frames", "9"]
NETWORKS = (T5EncoderModel, AutoencoderKLCogVideoX, CogVideoXEncoder3D, CogVideoXTransformer3DModel)


def alive() -> list[str]:
    gc.collect()
    # By type(): isinstance would ask torch's lazy modules for attributes that warn.
    return sorted(kind.__name__ for kind in (type(thing) for thing in gc.get_objects()) if kind in NETWORKS)


START = ["--validation_images", "start.png", "--ignore_learned_positional_embeddings"]
WITH_ENCODER = ["AutoencoderKLCogVideoX", "CogVideoXEncoder3D"]  # the first frame has to be encoded


@pytest.mark.parametrize(
    ("kind", "task", "flags", "sampled_with"),
    [("5b", TextToVideo, [], WITH_ENCODER[:1]), ("5b-i2v", ImageToVideo, START, WITH_ENCODER)],
)
def test_with_prepared_data_only_the_transformer_is_in_memory_and_the_decoder_while_sampling(
    tiny_models, prepared_demo, tmp_path, monkeypatch, kind, task, flags, sampled_with
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 64), "gray").save("start.png")
    images = ["--save_image_latents"] if task.condition == "image" else []
    prepared = prepared_demo(*SIZE, "--max_samples", "2", *images, kind=kind)
    while_sampling: list[list[str]] = []
    pipeline_class = CogVideoXImageToVideoPipeline if task is ImageToVideo else CogVideoXPipeline
    decode = pipeline_class.decode_latents

    def decode_and_look(pipeline: CogVideoXPipeline, latents: torch.Tensor) -> torch.Tensor:
        assert pipeline.vae.use_tiling and pipeline.vae.use_slicing
        while_sampling.append(alive())
        return decode(pipeline, latents)

    monkeypatch.setattr(pipeline_class, "decode_latents", decode_and_look)
    # The prompts are embedded when this returns.
    flags = [*flags, *SIZE, "--max_train_steps", "1", "--validation_prompt", "a", "--num_inference_steps", "1"]
    run = set_up_run(task.name, tiny_models(kind), prepared, tmp_path / "out", *flags)
    assert alive() == ["CogVideoXTransformer3DModel"]
    train(run)
    assert alive() == ["CogVideoXTransformer3DModel"]
    assert run.validate(1) == []
    assert while_sampling == [sorted([*sampled_with, "CogVideoXTransformer3DModel"])]
    assert alive() == ["CogVideoXTransformer3DModel"]
