"""The time of a run follows from the operations that it does and the speed of a trial."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from args import parse_args
from forward_pass import COGVIDEOX_5B
from planning.plan import plan_training_data
from run.estimate import Measured, Plan, describe_cache, estimate_bytes, estimate_seconds
from run.recipe import Recipe
from tiny_runs import run_flags
from tracking.throughput import Speed, Throughput


PLAN = Plan(
    first=1,
    last=100,
    epochs=2,
    batches=100,
    tflop=500,
    checkpoints=4,
    kept_checkpoints=2,
    validations=3,
    losses=5,
    loss_tflop=15,
    kept_validations=2,
    videos=5,
    prompts=9,
)


@pytest.fixture
def measured() -> Measured:
    return Measured(
        step=Speed(1, 2.0, 1, 1, Counter(), tflops=10.0, peak_tflops=None),
        throughput=Throughput(COGVIDEOX_5B, torch.device("cpu"), 1, torch.float32, trains_all=False),
        checkpoint_seconds=3.0,
        checkpoint_bytes=100,
        result_bytes=30,
        video_seconds=7.0,
        video_bytes=11,
        embedding_bytes=1000,
    )


@pytest.fixture
def make_recipe(tiny_models, demo_clips, tmp_path):
    def make(*flags: str) -> Recipe:
        argv = run_flags(tiny_models("5b"), demo_clips, tmp_path / "out", "--validation_prompt", "a", *flags)
        argv += ["--height", "480", "--width", "720", "--max_num_frames", "49"]
        settings = parse_args(argv, task="text-to-video", method="lora")
        return Recipe(settings, plan_training_data(settings))

    return make


@pytest.mark.parametrize(("guidance", "passes"), [("1", 1), ("6", 2)])
def test_seconds(measured, make_recipe, guidance, passes):
    recipe = make_recipe("--num_inference_steps", "12", "--guidance_scale", guidance)
    seconds = estimate_seconds(PLAN, recipe, measured, num_processes=2)
    assert (seconds["steps"], seconds["checkpoints"]) == (500 * 2 / 10, 4 * 3)
    assert seconds["held-out loss"] == 15 * 2 / 10
    # A forward pass of CogVideoX-5b: 332.2 TFLOP. Of five videos, the first process samples three.
    assert seconds["validations"] == pytest.approx(3 * 3 * (7 + 10 * passes * 332.2 * 2 / 10), rel=1e-3)


def test_the_seconds_say_that_they_are_without_a_cache(make_recipe):
    recipe = make_recipe("--sampling_cache", "pab")
    assert describe_cache(PLAN, recipe) == "; what --sampling_cache pab skips is not subtracted"
    assert describe_cache(replace(PLAN, validations=0), recipe) == describe_cache(PLAN, make_recipe()) == ""


def test_bytes(measured):
    # With three checkpoints for a moment.
    assert estimate_bytes(PLAN, measured) == {
        "checkpoints": 300,
        "result": 30,
        "weights of validations": 60,
        "videos": 3 * 5 * 11,
        "prompt embeddings": 9000,
    }
