"""The trained tiny models follow prompts, and match the measures beside them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, DiffusionPipeline

import train_vae
from make_base_clips import DIRECTIONS, plan_base_scenes
from measure_model import sample, see
from measure_style import MODEL_DIR


MODELS = (MODEL_DIR, MODEL_DIR.with_name("tiny-cogvideox-i2v"))
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda folder: folder.name)


def test_their_files_are_small_and_hold_no_code():
    files = [file for model in MODELS for file in model.rglob("*") if file.is_file() and file.resolve() == file]
    assert sum(file.stat().st_size for file in files) < 20e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}


@each_model
def test_the_figures_are_good_enough(model: Path):
    measures = json.loads((model / "measures.json").read_text())
    assert measures["vae_psnr_db"] >= 28
    assert measures["prompts"] == len(plan_base_scenes()[1])
    assert measures["right_colour"] >= 0.9 * measures["prompts"]
    assert measures["right_direction"] >= 0.8 * measures["prompts"]


def test_the_vae_is_as_good_as_its_figures_say(monkeypatch):
    trained, held_out = plan_base_scenes()
    monkeypatch.setattr(train_vae, "plan_base_scenes", lambda: (trained, held_out[::7]))
    vae = AutoencoderKLCogVideoX.from_pretrained(MODEL_DIR / "vae", dtype=torch.float32)
    measured = json.loads((MODEL_DIR / "measures.json").read_text())["vae_psnr_db"]
    assert train_vae.measure_psnr(vae) == pytest.approx(measured, abs=1.5)


@each_model
def test_held_out_prompts_are_shown(model: Path):
    scenes = plan_base_scenes()[1][:5]
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    videos = sample(pipeline, scenes, "", steps=10, guidance_scale=2.0)
    seen = [see(frames) for frames in videos]
    assert np.sum([one.colour == scene.colour for one, scene in zip(seen, scenes, strict=True)]) >= 4
    assert np.sum([one.direction == DIRECTIONS[scene.motion] for one, scene in zip(seen, scenes, strict=True)]) >= 4
