"""Nothing is in memory that is not needed: which networks are alive when, in runs of the real script."""

import gc
from pathlib import Path

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

import prepare_dataset
from args import parse_args
from data.plan import plan_training_data
from run.loop import train
from run.recipe import Recipe
from run.setup import Run, set_up
from run.spec import check_spec


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SIZE = ["--height", "64", "--width", "96", "--frame_buckets", "9", "--max_num_frames", "9"]
NETWORKS = (T5EncoderModel, AutoencoderKLCogVideoX, CogVideoXEncoder3D, CogVideoXTransformer3DModel)


def alive() -> list[str]:
    """The networks that anything in this process still holds on to."""
    gc.collect()
    # By type(): isinstance would ask torch's lazy modules for attributes that warn.
    return sorted(kind.__name__ for kind in (type(thing) for thing in gc.get_objects()) if kind in NETWORKS)


@pytest.mark.parametrize(
    ("kind", "task", "pipeline_class", "sampled_with"),
    [
        ("5b", "text-to-video", CogVideoXPipeline, ["AutoencoderKLCogVideoX"]),
        # The first frame has to be encoded.
        (
            "5b-i2v",
            "image-to-video",
            CogVideoXImageToVideoPipeline,
            ["AutoencoderKLCogVideoX", "CogVideoXEncoder3D"],
        ),
    ],
)
def test_from_prepared_data_only_the_transformer_is_in_memory_and_to_sample_the_decoder(
    tiny_models, demo_clips, tmp_path, monkeypatch, kind, task, pipeline_class, sampled_with
):
    model, prepared = str(tiny_models(kind)), tmp_path / "prepared"
    flags = ["--data_root", str(demo_clips), "--output_dir", str(prepared), "--max_samples", "2", *SIZE]
    flags += ["--save_latents_and_embeddings", *(["--save_image_latents"] if task == "image-to-video" else [])]
    prepare_dataset.main(["--model_id", model, *flags])
    while_sampling: list[list[str]] = []
    decode = pipeline_class.decode_latents

    def decode_and_look(pipeline: CogVideoXPipeline, latents: torch.Tensor) -> torch.Tensor:
        assert pipeline.vae.use_tiling and pipeline.vae.use_slicing
        while_sampling.append(alive())
        return decode(pipeline, latents)

    monkeypatch.setattr(pipeline_class, "decode_latents", decode_and_look)
    run = set_up_run(model, prepared, tmp_path / "out", task)
    assert alive() == ["CogVideoXTransformer3DModel"]
    train(run)
    assert alive() == ["CogVideoXTransformer3DModel"]
    assert run.validate(1) == []
    assert while_sampling == [sorted([*sampled_with, "CogVideoXTransformer3DModel"])]
    assert alive() == ["CogVideoXTransformer3DModel"]


def set_up_run(model: str, prepared: Path, output: Path, task: str) -> Run:
    """A run of one step with a validation; the prompts are embedded when this returns."""
    flags = ["--pretrained_model_name_or_path", model, "--data_root", str(prepared), "--load_tensors"]
    flags += ["--output_dir", str(output), "--max_train_steps", "1", "--train_batch_size", "1", "--report_to", "none"]
    flags += ["--validation_prompt", "a", "--num_inference_steps", "1", "--seed", "0", "--rank", "4", *SIZE]
    if task == "image-to-video":
        image = prepared.parent / "start.png"
        Image.new("RGB", (96, 64), "gray").save(image)
        flags += ["--validation_images", str(image), "--ignore_learned_positional_embeddings"]
    args = parse_args(flags, task=task, method="lora")
    return set_up(check_spec(Recipe(args, plan_training_data(args))))
