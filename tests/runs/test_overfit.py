"""A model overfits one clip: full fine-tuning until it samples the clip, a LoRA until its loss falls."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.utils import export_to_video

import cogvideox_text_to_video_lora
import cogvideox_text_to_video_sft
import prepare_dataset
from data.buckets import Bucket
from data.sampler import Draw
from dataset import Batch
from diffusion.randomness import sample_generators
from models.source import ModelSource
from prepared.folder import read_tensor
from prepared.index import PreparedClip
from prepared.read_index import read_index
from tiny_runs import sample_latents
from tiny_steps import make_objective


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SIZE = Bucket(9, 32, 48)
SIZE_FLAGS = ["--frame_buckets", "9", "--max_num_frames", "9", "--height", "32", "--width", "48"]


@pytest.fixture(scope="module")
def clip(tiny_models, tmp_path_factory) -> PreparedClip:
    """One prepared clip: blue covers a red background from the left."""
    folder = tmp_path_factory.mktemp("one-clip")
    frames = np.full((SIZE.num_frames, SIZE.height, SIZE.width, 3), (0.9, 0.0, 0.0))
    for number, frame in enumerate(frames, start=1):
        frame[:, : SIZE.width * number // (SIZE.num_frames + 1)] = (0.0, 0.2, 0.9)
    export_to_video(list(frames), str(folder / "clip.mp4"), fps=8)
    (folder / "clip.txt").write_text("blue covers a red background")
    argv = ["--model_id", str(tiny_models("5b")), "--data_root", str(folder), "--output_dir", str(folder / "prepared")]
    prepare_dataset.main([*argv, "--save_latents_and_embeddings", *SIZE_FLAGS])
    return read_index(folder / "prepared")[0]


def train(script: ModuleType, model: Path, clip: PreparedClip, output: Path, *flags: str) -> Path:
    mix = output.parent / "mix.json"
    mix.write_text(json.dumps([{"data_root": str(clip.video_latents.file.parents[1]), "repeats": 4}]))
    argv = ["--pretrained_model_name_or_path", str(model), "--dataset_mix", str(mix), "--load_tensors", *SIZE_FLAGS]
    argv += ["--output_dir", str(output), "--train_batch_size", "4", "--report_to", "none", "--optimizer", "adamw"]
    argv += ["--allow_outside_paths"]  # the mix is beside the output
    script.main([*argv, *flags])
    return output


def test_full_fine_tuning_on_one_clip_halves_the_distance_of_samples_to_it(tiny_models, clip, tmp_path):
    model = tiny_models("5b")
    flags = ("--max_train_steps", "80", "--learning_rate", "3e-3", "--lr_scheduler", "cosine", "--seed", "0")
    output = train(cogvideox_text_to_video_sft, model, clip, tmp_path / "out", *flags, "--lr_warmup_steps", "8")
    pipeline = CogVideoXPipeline.from_pretrained(model)
    mean, _ = read_tensor(clip.video_latents).float().movedim(0, 1).chunk(2, dim=1)
    prompt_embeds = read_tensor(clip.prompt_embeds)[None].float()

    def distance(transformer: CogVideoXTransformer3DModel) -> float:
        pipeline.transformer = transformer
        options = {"guidance_scale": 1, "num_inference_steps": 4, "generator": torch.Generator().manual_seed(1)}
        (sampled,) = sample_latents(pipeline, SIZE, prompt_embeds=prompt_embeds, **options)
        return (sampled - mean * pipeline.vae.config.scaling_factor).norm().item()

    before = distance(pipeline.transformer)
    assert distance(CogVideoXTransformer3DModel.from_pretrained(output / "transformer")) < 0.5 * before


def test_a_lora_on_one_clip_lowers_its_loss_by_30_percent(tiny_models, clip, tmp_path):
    source = ModelSource(str(tiny_models("5b")))
    flags = ("--max_train_steps", "20", "--learning_rate", "1e-2", "--lr_scheduler", "cosine", "--seed", "0")
    flags += ("--rank", "8", "--lora_alpha", "8", "--lr_warmup_steps", "3")
    output = train(cogvideox_text_to_video_lora, Path(source.path), clip, tmp_path / "out", *flags)
    pipeline = CogVideoXPipeline.from_pretrained(source.path)
    batch = Batch(
        ["a"] * 9,
        SIZE,
        video_moments=read_tensor(clip.video_latents)[None].expand(9, -1, -1, -1, -1),
        prompt_embeds=read_tensor(clip.prompt_embeds)[None].expand(9, -1, -1),
    )

    def loss() -> float:
        objective = make_objective(source, pipeline.transformer)
        generators = sample_generators(torch.device("cpu"), 5, [Draw(number, 0) for number in range(9)])
        with torch.no_grad():
            return objective.losses(batch, torch.arange(50, 1000, 111)[:9], generators).mean().item()

    before = loss()
    pipeline.load_lora_weights(output)
    assert loss() < 0.7 * before
