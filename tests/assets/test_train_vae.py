"""The recipe of the tiny VAE: its clips, its config and its PSNR."""

import json
import math
import random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

import train_vae
from make_base_clips import plan_base_scenes
from shapes import draw_frames
from train_vae import draw_random_clip, main, measure_psnr


@pytest.fixture
def vae(tiny_models) -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX.from_pretrained(tiny_models("5b") / "vae")


@pytest.fixture(autouse=True)
def two_held_out_scenes(monkeypatch):
    trained, held_out = plan_base_scenes()
    monkeypatch.setattr(train_vae, "plan_base_scenes", lambda: (trained, held_out[:2]))
    return held_out[:2]


def test_the_clips_move_and_some_are_old_film():
    chance = random.Random(0)
    clips = [draw_random_clip(chance, 9) for _ in range(20)]
    assert all(clip.shape == (3, 9, train_vae.SIZE, train_vae.SIZE) for clip in clips)
    assert min(clip.min() for clip in clips) >= -1 and max(clip.max() for clip in clips) <= 1
    brown = [clip for clip in clips if ((clip[0] >= clip[1]) & (clip[1] >= clip[2])).all()]
    assert any(clip[0, 0, 0, 0] < clip[0, 0, 0, train_vae.SIZE // 2] for clip in brown)
    assert sum((clip[:, 0] != clip[:, -1]).any().item() for clip in clips) >= 15


def test_psnr_is_that_of_the_frames(vae, two_held_out_scenes):
    expected = []
    for scene in two_held_out_scenes:
        frames = np.stack(list(draw_frames(scene))).astype(np.float64)
        clip = torch.from_numpy(frames / 127.5 - 1).float().permute(3, 0, 1, 2)[None]
        with torch.inference_mode():
            shown = vae.decode(vae.encode(clip).latent_dist.mode()).sample[0].permute(1, 2, 3, 0)
        error = ((shown.double().numpy().clip(-1, 1) + 1) * 127.5 - frames) ** 2
        expected.append(10 * math.log10(255**2 / error.mean()))
    assert measure_psnr(vae) == pytest.approx(sum(expected) / 2, abs=0.01)


def test_the_scale_of_the_latents_is_written_to_the_config(vae, tmp_path, monkeypatch, two_held_out_scenes):
    vae.save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(
        "sys.argv", ["train_vae.py", "--model_dir", str(tmp_path), "--num_steps", "1", "--batch_size", "1"]
    )
    main()
    trained = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae")
    latents = []
    for scene in two_held_out_scenes:
        clip = torch.from_numpy(np.stack(list(draw_frames(scene)))).permute(3, 0, 1, 2)[None] / 127.5 - 1
        with torch.inference_mode():
            latents.append(trained.encode(clip).latent_dist.mode())
    scale = json.loads((tmp_path / "vae" / "config.json").read_text())["scaling_factor"]
    assert torch.cat(latents).std().item() * scale == pytest.approx(1, abs=0.01)
