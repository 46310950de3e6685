"""Prompts and images are encoded before the transformer is loaded."""

import pytest
import torch
from PIL import Image

from args import parse_args
from common.errors import UserError
from models.source import ModelSource
from planning.plan import plan_training_data
from planning.samples import PreparedData, RawData
from prepared.folder import write_empty_prompt
from run.encoded_inputs import encode_inputs, find_prompt
from run.recipe import Recipe
from run.spec import check_spec
from tiny_runs import run_flags


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize(("mode", "left"), [("center", (0, 255, 0)), ("none", (255, 0, 0))])
def test_first_frames_are_cropped_like_clips(tiny_models, demo_clips, tmp_path, mode, left):
    wide = Image.new("RGB", (400, 64), (0, 255, 0))
    wide.paste((255, 0, 0), (0, 0, 100, 64))
    wide.save(tmp_path / "wide.png")
    flags = ("--max_samples", "1", "--validation_prompt", "a", "--validation_images", str(tmp_path / "wide.png"))
    argv = run_flags(tiny_models("5b-i2v"), demo_clips, tmp_path, *flags, "--video_reshape_mode", mode)
    args = parse_args(argv, task="image-to-video", method="lora")
    inputs = encode_inputs(check_spec(Recipe(args, plan_training_data(args))))
    (image,) = inputs.conditions
    if mode == "center":
        assert image.size == (96, 64)
    assert image.getpixel((0, 0)) == left
    assert inputs.prompts.load("a").shape == inputs.prompts.load("").shape == (226, 64)
    assert inputs.vae is not None  # the clips are raw
    assert inputs.empty_prompt is None  # no caption is dropped


def test_the_empty_prompt_comes_from_the_prepared_data(tiny_models, tmp_path):
    configs = ModelSource(str(tiny_models("5b"))).configs()
    older, newer = tmp_path / "older", tmp_path / "newer"
    older.mkdir()
    newer.mkdir()
    embeds = torch.randn(226, 64)
    write_empty_prompt(newer, embeds)
    assert find_prompt(RawData([]), configs, "") is None
    assert find_prompt(PreparedData([], [older]), configs, "") is None
    assert torch.equal(find_prompt(PreparedData([], [older, newer]), configs, ""), embeds)


def test_an_empty_prompt_of_another_model_is_refused(tiny_models, tmp_path):
    write_empty_prompt(tmp_path, torch.randn(226, 32))
    with pytest.raises(UserError, match=r"--load_tensors: the prompt '' .* \(226, 32\), the model needs \(226, 64\)"):
        find_prompt(PreparedData([], [tmp_path]), ModelSource(str(tiny_models("5b"))).configs(), "")
