"""The page on using the result says what the code does: its commands are parsed, its code runs."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from PIL import Image

from args import generation_parser, parse_generate_args
from common.run_folder import LORA_FILE
from methods.lora import Lora
from models.source import ModelSource
from repository import ROOT


PAGE = (ROOT / "assets" / "docs" / "inference.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- tested: ([\w ]+) -->\n```(?:bash|python)\n(.*?)```", PAGE, flags=re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with what the commands name."""
    for name in ("my-lora", "style", "motion"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / LORA_FILE).touch()
    (tmp_path / "outputs" / "my-model" / "transformer").mkdir(parents=True)
    (tmp_path / "outputs" / "my-model" / "transformer" / "config.json").touch()
    (tmp_path / "held-out.txt").write_text("a cat\na dog\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "rabbit.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(block: str) -> list:
    """The flags of the commands of a block, as the script reads them."""
    commands = [shlex.split(line) for line in BLOCKS[block].replace("\\\n", " ").splitlines() if line]
    assert all(words[:2] == ["python", "training/generate.py"] for words in commands)
    return [parse_generate_args(words[2:]) for words in commands]


def test_the_commands_of_the_page_ask_for_what_it_says(folder):
    text, image = parsed("generate")
    assert [video.file.name for video in text.videos] == [
        f"00-bw-style-a-panda-plays-a-tiny-guitar-seed-{seed}.mp4" for seed in (1, 2)
    ]
    assert f"generated/{text.videos[0].file.name}" in PAGE
    assert (image.result.transformer, image.content.image) == ("outputs/my-model", ("rabbit.png",))
    (compare,) = parsed("compare")
    assert compare.result.compare and len(compare.videos) == 2
    (several,) = parsed("several")
    assert [scale for _, scale in several.loras] == [1.0, 0.6]


def test_all_code_of_the_page_is_tested_and_its_flags_exist():
    assert re.findall(r"```(?:bash|python)\n(.*?)```", PAGE, flags=re.DOTALL) == list(BLOCKS.values())
    assert BLOCKS.keys() == {"generate", "compare", "several", "merge"}
    named = set(re.findall(r"--\w[\w-]*", re.sub(r"<!--.*?-->", "", PAGE)))
    assert named <= set(generation_parser()._option_string_actions) | {"--help"}


def test_the_code_that_merges_writes_weights_with_the_lora_in_them(folder, tiny_models):
    model = tiny_models("5b")
    transformer = ModelSource(str(model)).load_transformer(torch.float32)
    lora = Lora(rank=4, alpha=2)
    lora.attach(transformer)
    layer = transformer.transformer_blocks[0].attn1.to_q
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    lora.save(transformer, Path("outputs/my-lora"), torch.float32)
    code = BLOCKS["merge"].replace("THUDM/CogVideoX-5b", str(model)).replace("torch.bfloat16", "torch.float32")
    exec(code, {})

    merged = CogVideoXTransformer3DModel.from_pretrained("outputs/merged", subfolder="transformer")
    added = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2 / 4
    expected = layer.base_layer.weight + added
    weights = merged.transformer_blocks[0].attn1.to_q.weight
    assert np.allclose(weights.detach(), expected.detach(), atol=1e-6)
    assert added.abs().max() > 0.1
