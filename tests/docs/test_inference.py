"""The page on using the result matches the code: its commands are parsed, its code runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from PIL import Image

import convert_lora
from common.errors import UserError
from common.run_folder import CONFIG_TITLE, LORA_FILE
from doc_pages import (
    flags_of,
    help_flags,
    marked_blocks,
    named_flags,
    noted_calls,
    read_page,
    script_flags,
    without_code,
)
from methods.lora import Lora
from models.source import ModelSource
from results.generation import choose_condition_frames


PAGE = read_page("assets/docs/inference.md")
BLOCKS = marked_blocks(PAGE)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("my-lora", "my-ends-lora", "style", "motion"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / LORA_FILE).touch()
    (tmp_path / "outputs" / "my-model" / "transformer").mkdir(parents=True)
    (tmp_path / "outputs" / "my-model" / "transformer" / "config.json").touch()
    (tmp_path / "held-out.txt").write_text("a cat\na dog\n")
    for name in ("rabbit.png", "yawn.png", "fox.mp4"):
        Image.new("RGB", (16, 16)).save(tmp_path / name, format="PNG")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_sample_the_videos_that_the_page_names(folder):
    text, image = map(flags_of, noted_calls(BLOCKS["generate"], folder))
    assert [video.file.name for video in text.settings.videos] == [
        f"00-bw-style-a-panda-plays-a-tiny-guitar-seed-{seed}.mp4" for seed in (1, 2)
    ]
    assert f"generated/{text.settings.videos[0].file.name}" in PAGE
    assert (image.transformer, image.image) == ("outputs/my-model", ("rabbit.png",))
    (compare,) = map(flags_of, noted_calls(BLOCKS["compare"], folder))
    assert compare.compare and len(compare.settings.videos) == 2
    (several,) = map(flags_of, noted_calls(BLOCKS["several"], folder))
    assert [scale for _, scale in several.settings.loras] == [1.0, 0.6]
    for call in noted_calls(BLOCKS["quick"], folder):
        quick = flags_of(call).settings.guidance
        assert (quick.sampling_scheduler, quick.num_inference_steps) == ("ddim", 25)


def test_given_frames_are_passed_as_the_page_says(folder):
    ends, context = map(flags_of, noted_calls(BLOCKS["given frames"], folder))
    assert (ends.image, ends.last_image, ends.condition_frames) == (("rabbit.png",), ("yawn.png",), None)
    assert (context.video, context.condition_frames) == (("fox.mp4",), "first:3")
    (folder / "outputs/my-ends-lora/config.yaml").write_text(f"# {CONFIG_TITLE}\ncondition_frames: first,last\n")
    with pytest.raises(UserError) as error:
        choose_condition_frames(replace(ends.settings, content=replace(ends.settings.content, last_image=())))
    assert f"error: {error.value}\n" in PAGE


def test_every_block_of_the_page_is_tested_here_or_with_the_readme():
    assert BLOCKS.keys() == {"given frames", "generate", "compare", "several", "quick", "convert", "extract", "check"}


def test_the_flags_that_the_page_names_are_those_of_the_script():
    assert named_flags(without_code(PAGE)) <= help_flags("generate.py") | help_flags("convert_lora.py") | {"--help"}


def test_the_commands_convert_what_the_page_says(folder):
    first, second = noted_calls(BLOCKS["convert"], folder)
    assert [scale for _, scale in flags_of(first).settings.loras] == [1.0, 0.6]
    Path("both.safetensors").touch()
    few = flags_of(second)
    assert (few.settings.loras, few.rank, few.format) == ((("both.safetensors", 1.0),), 32, "videox-fun")


def test_the_merging_command_writes_weights_that_include_the_lora(folder, tiny_models):
    model = tiny_models("5b")
    transformer = ModelSource(str(model)).load_transformer(torch.float32)
    lora = Lora(rank=4, alpha=2)
    lora.attach(transformer)
    layer = transformer.transformer_blocks[0].attn1.to_q
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    lora.save(transformer, Path("outputs/my-lora"), torch.float32)
    extract, merge = noted_calls(BLOCKS["extract"].replace("THUDM/CogVideoX-5b", str(model)), folder)
    assert flags_of(extract).energy == 0.9
    convert_lora.main(script_flags(merge))

    merged = CogVideoXTransformer3DModel.from_pretrained("outputs/merged", subfolder="transformer")
    added = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2 / 4
    expected = layer.base_layer.weight + added
    assert np.allclose(merged.transformer_blocks[0].attn1.to_q.weight.detach(), expected.detach(), atol=1e-6)
    assert added.abs().max() > 0.1
