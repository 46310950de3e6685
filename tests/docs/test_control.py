"""The page on controls matches the code: its commands, its code, its messages, its numbers."""

import re

import pytest

from diffusion.control_to_video import ControlToVideo
from doc_pages import flags_of, marked_blocks, noted_calls, read_page, table_rows, value_of
from methods.lora import Lora
from repository import ROOT, TRAINING
from video.controls import BLUR, INPAINT, KINDS, TILES


PAGE = read_page("assets/docs/control.md")
BLOCKS = marked_blocks(PAGE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    outputs = "my-control-lora", "my-style", "my-control-model/transformer"
    for name in ("my-clips", "my-prepared", *(f"outputs/{output}" for output in outputs)):
        (tmp_path / name).mkdir(parents=True)
    results = (f"outputs/{output}/pytorch_lora_weights.safetensors" for output in outputs[:2])
    for name in ("rabbit.mp4", "fox.mp4", *results, f"outputs/{outputs[2]}/config.json"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("block", "kind"), [("way", "canny"), ("inpaint", INPAINT)])
def test_each_command_of_the_way_goes_on_from_the_one_before(folder, block, kind):
    prepare, train, sample = map(flags_of, noted_calls(BLOCKS[block], folder))
    assert prepare.save_control_latents and prepare.save_latents_and_embeddings
    assert (train.data_root, train.load_tensors) == (prepare.output_dir, True)
    assert train.settings.validation.controls == ("rabbit.mp4",)
    assert prepare.compute_control == kind and sample.compute_control is None  # that of the run
    assert train.use_masks == prepare.use_masks == (kind == INPAINT)
    assert (sample.pretrained_model_name_or_path, sample.control) == (
        train.pretrained_model_name_or_path,
        ("fox.mp4",),
    )


def test_a_merged_pipeline_is_sampled_with_the_style_and_the_strength_that_were_tried(folder):
    both, merge, merged, extract = noted_calls(BLOCKS["more"], folder)
    assert flags_of(both).settings.loras == flags_of(merge).settings.loras
    assert [scale for _, scale in flags_of(both).settings.loras] == [1.0, 0.8]
    assert flags_of(extract).transformer == "outputs/my-control-model"
    (folder / "outputs/merged").mkdir()
    (folder / "outputs/merged/model_index.json").touch()
    assert flags_of(merged).pretrained_model_name_or_path == value_of(merge, "--output_dir") == "outputs/merged"


def test_the_code_is_what_a_run_prints():
    code = Lora(64, 64).usage("CogVideoXFunControlPipeline", "THUDM/CogVideoX-5b", "outputs/my-control-lora")
    task = ControlToVideo()
    scheduler = f"pipe.scheduler = {task.scheduler_class.__name__}.from_config(pipe.scheduler.config)"
    assert "\n".join([code[0], *task.usage(), code[1], scheduler]) in BLOCKS["code"]


def test_the_demo_of_the_page_exists_and_all_kinds_of_controls_are_described():
    demo, inpainting = (BLOCKS[block].split() for block in ("try", "try inpainting"))
    assert (ROOT / demo[1]).is_file() and inpainting == [f"DEMO_CONTROL={INPAINT}", *demo]
    described = {cells[0].strip("`"): cells[1] for cells in table_rows(PAGE.split("## Controls")[1].split("## ")[0])}
    assert set(KINDS) == set(described) - {"`--compute_control`".strip("`"), "none"}
    assert f"1/{BLUR} " in described["blur"] and f"{TILES} tiles" in described["tile"]


def test_the_messages_of_the_page_are_in_the_code():
    code = "".join(file.read_text(encoding="utf-8") for file in TRAINING.rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", code)
    messages = re.findall(r"^\| `([^`]+)` \|", PAGE.split("## Messages")[1], flags=re.MULTILINE)
    assert len(messages) >= 8
    assert [message for message in messages if message not in code] == []


def test_every_block_of_the_page_is_tested_here():
    assert BLOCKS.keys() == {"way", "inpaint", "code", "more", "try", "try inpainting"}
