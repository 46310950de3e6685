"""`make demo`: a LoRA learns a style under a word, in our sampling script and in plain diffusers."""

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
from measure_style import MODEL_DIR, distance
from repository import ROOT


PROMPT = "kinetoscope a red circle moves from left to right over a plain light blue background"
SAMPLING_STEPS = 10


def run_demo(folder: Path, **settings: str) -> Path:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", ROOT / "assets" / "scripts" / "demo.sh"],
        env=os.environ | settings | {"PATH": path, "DEMO_DIR": str(folder), "CPU_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def read_measures(demo: Path) -> dict[str, dict[str, float]]:
    return json.loads((demo / "style" / "style.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return run_demo(tmp_path_factory.mktemp("demo"), DEMO_STEPS="80")


@pytest.fixture(scope="module")
def measured(demo) -> dict[str, dict[str, float]]:
    return read_measures(demo)


@pytest.fixture(scope="module")
def run(demo) -> Path:
    (folder,) = (demo / "outputs").iterdir()
    return folder


def one(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


def test_the_style_follows_the_word_and_the_base_model_ignores_it(measured):
    assert measured["style"]["to_base"] == 1
    assert measured["base_with_word"]["to_base"] < 0.1
    with_word, without = measured["lora_with_word"], measured["lora_without_word"]
    assert with_word["to_style"] < 0.5 < with_word["to_base"]
    assert without["to_base"] < 0.4 and without["to_style"] > 0.8  # after a third of the demo's steps


def test_prompts_are_still_followed(measured):
    assert measured["lora_without_word"]["right_colour"] >= 6
    assert measured["lora_without_word"]["right_direction"] >= 7
    assert measured["lora_with_word"]["right_direction"] >= 6


def test_plain_diffusers_samples_the_same_video(demo, run):
    shown = all_frames(one(demo / "generated", "00-*-seed-42.mp4"))
    pipeline = CogVideoXPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)
    pipeline.load_lora_weights(run)
    options = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": 1.0, "output_type": "np"}
    video = pipeline(PROMPT, **options, generator=torch.Generator().manual_seed(42)).frames[0]
    # H.264 keeps half of the colours' resolution.
    assert distance((video * 255).round().astype(np.uint8), shown) < 3


def test_the_pictures_show_the_difference(demo, run):
    tuned, base = (all_frames(one(demo / "generated", f"00-*-seed-42{end}.mp4")) for end in ("", "-base"))
    assert distance(tuned, base) > 40
    unchanged, base = (all_frames(one(demo / "generated", f"01-*-seed-42{end}.mp4")) for end in ("", "-base"))
    assert distance(unchanged, base) < 20
    for picture in (one(demo / "generated", "00-*-compare.png"), demo / "style" / "style.png"):
        assert np.asarray(Image.open(picture).convert("RGB")).std() > 10
    for name in ("loss.png", "validation/progress.png", "pytorch_lora_weights.safetensors", "config.yaml"):
        assert (run / name).stat().st_size > 0


@pytest.mark.slow
def test_the_complete_demo_stays_within_a_tenth_of_the_base_model_without_the_word(tmp_path):
    measured = read_measures(run_demo(tmp_path))
    assert measured["lora_without_word"]["to_base"] <= 0.1
    assert measured["lora_with_word"]["to_style"] <= 0.2
    assert measured["lora_without_word"]["right_direction"] == measured["lora_with_word"]["right_direction"] == 8
