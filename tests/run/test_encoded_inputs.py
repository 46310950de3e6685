"""What training needs of the other networks is encoded before the transformer is loaded."""

import pytest
import torch
from PIL import Image

from args import parse_args
from common.errors import UserError
from data.plan import PreparedData, RawData, plan_training_data
from data.prepared import write_empty_prompt
from models.source import ModelSource
from run.encoded_inputs import encode_inputs, find_empty_prompt
from run.recipe import Recipe
from run.spec import check_spec


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize(("mode", "left"), [("center", (0, 255, 0)), ("none", (255, 0, 0))])
def test_images_to_begin_with_are_cut_to_the_videos_size_as_clips_are(tiny_models, demo_clips, tmp_path, mode, left):
    wide = Image.new("RGB", (400, 64), (0, 255, 0))
    wide.paste((255, 0, 0), (0, 0, 100, 64))
    wide.save(tmp_path / "wide.png")
    argv = ["--pretrained_model_name_or_path", str(tiny_models("5b-i2v")), "--data_root", str(demo_clips)]
    argv += ["--caption_column", "prompts.txt", "--max_samples", "1", "--height", "64", "--width", "96"]
    argv += ["--frame_buckets", "17", "--max_num_frames", "17", "--report_to", "none", "--output_dir", str(tmp_path)]
    argv += ["--validation_prompt", "a", "--validation_images", str(tmp_path / "wide.png")]
    args = parse_args([*argv, "--video_reshape_mode", mode], task="image-to-video", method="lora")
    inputs = encode_inputs(check_spec(Recipe(args, plan_training_data(args))))
    (image,) = inputs.images
    if mode == "center":
        assert image.size == (96, 64)
    assert image.getpixel((0, 0)) == left
    assert inputs.prompts.load("a").shape == inputs.prompts.load("").shape == (226, 64)
    assert inputs.vae is not None  # the clips are raw
    assert inputs.empty_prompt is None  # no caption is dropped


def test_the_empty_prompt_is_the_one_that_the_data_was_prepared_with(tiny_models, tmp_path):
    configs = ModelSource(str(tiny_models("5b"))).configs()
    older, newer = tmp_path / "older", tmp_path / "newer"
    older.mkdir()
    newer.mkdir()
    embeds = torch.randn(226, 64)
    write_empty_prompt(newer, embeds)
    assert find_empty_prompt(RawData([]), configs) is None
    assert find_empty_prompt(PreparedData([], [older]), configs) is None
    assert torch.equal(find_empty_prompt(PreparedData([], [older, newer]), configs), embeds)


def test_an_empty_prompt_of_another_model_is_refused(tiny_models, tmp_path):
    write_empty_prompt(tmp_path, torch.randn(226, 32))
    with pytest.raises(UserError, match=r"--caption_dropout: .* \(226, 32\), the model needs \(226, 64\)"):
        find_empty_prompt(PreparedData([], [tmp_path]), ModelSource(str(tiny_models("5b"))).configs())
