"""The trained tiny model shows what it is asked for, and the figures beside it are those of its files."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

import train_vae
from make_base_clips import DIRECTIONS, plan_base_scenes
from measure_model import sample, see
from measure_style import MODEL_DIR


def test_its_files_are_small_and_hold_no_code():
    files = [file for file in MODEL_DIR.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}


def test_its_figures_are_good_enough():
    measures = json.loads((MODEL_DIR / "measures.json").read_text())
    assert measures["vae_psnr_db"] >= 28
    assert measures["prompts"] == len(plan_base_scenes()[1])
    assert measures["right_colour"] >= 0.9 * measures["prompts"]
    assert measures["right_direction"] >= 0.8 * measures["prompts"]


def test_its_vae_is_as_good_as_its_figures_say(monkeypatch):
    trained, held_out = plan_base_scenes()
    monkeypatch.setattr(train_vae, "plan_base_scenes", lambda: (trained, held_out[::7]))
    vae = AutoencoderKLCogVideoX.from_pretrained(MODEL_DIR / "vae", dtype=torch.float32)
    measured = json.loads((MODEL_DIR / "measures.json").read_text())["vae_psnr_db"]
    assert train_vae.measure_psnr(vae) == pytest.approx(measured, abs=1.5)


def test_held_out_prompts_are_shown():
    scenes = plan_base_scenes()[1][:5]
    pipeline = CogVideoXPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
    videos = sample(pipeline, scenes, "", steps=10, guidance_scale=2.0)
    seen = [see(frames) for frames in videos]
    assert np.sum([one.colour == scene.colour for one, scene in zip(seen, scenes, strict=True)]) >= 4
    assert np.sum([one.direction == DIRECTIONS[scene.motion] for one, scene in zip(seen, scenes, strict=True)]) >= 4
