"""`make demo`: a LoRA visibly learns the style of 24 clips, in our sampling script and in plain diffusers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from PIL import Image

from encoded_clips import all_frames
from measure_model import saturation
from measure_style import MODEL_DIR
from repository import ROOT


PROMPT = "OLD_FILM a red circle moves from left to right over a plain light blue background"
SAMPLING_STEPS = 10


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {"DEMO_STEPS": "75", "DEMO_SAMPLING_STEPS": str(SAMPLING_STEPS)}
    done = subprocess.run(
        ["bash", ROOT / "assets" / "scripts" / "demo.sh"],
        env=os.environ | settings | {"PATH": path, "DEMO_DIR": str(folder), "CPU_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def run(demo) -> Path:
    (folder,) = (demo / "outputs").iterdir()
    return folder


def one(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


def test_only_the_lora_removes_the_colours(demo):
    measured = json.loads((demo / "style.json").read_text())
    assert measured["lora"] <= measured["base_with_token"] / 2
    assert measured["base_with_token"] >= 0.8 * measured["base"] > 0.05
    assert measured["lora"] < measured["half_lora"] < measured["base_with_token"]


def test_the_shapes_still_move_as_prompted(demo):
    measured = json.loads((demo / "style.json").read_text())
    assert measured["right_direction_with_lora"] >= 0.8 * measured["prompts"]


def test_plain_diffusers_samples_the_same_video(demo, run):
    shown = all_frames(one(demo / "generated", "00-*-seed-42.mp4"))
    pipeline = CogVideoXPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
    pipeline.load_lora_weights(run)
    options = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": 2.0, "output_type": "np"}
    video = pipeline(PROMPT, **options, generator=torch.Generator().manual_seed(42)).frames[0]
    # H.264 keeps most of the grain, and half of the colours' resolution.
    assert np.abs(video * 255 - shown).mean() < 3
    assert saturation((video * 255).round().astype(np.uint8)) == pytest.approx(saturation(shown), abs=0.02)


def test_the_pictures_show_the_difference(demo, run):
    before, after = (
        saturation(all_frames(one(demo / "generated", f"00-*-seed-42{end}.mp4"))) for end in ("-base", "")
    )
    assert after <= before / 2
    assert np.asarray(Image.open(one(demo / "generated", "00-*-compare.png")).convert("RGB")).std() > 10
    for name in ("loss.png", "validation/progress.png", "pytorch_lora_weights.safetensors", "config.yaml"):
        assert (run / name).stat().st_size > 0
