"""The page for users of other trainers names our flags as they are, and its new commands are accepted."""

import re

import pytest

from args import METHODS, TASKS, flag_names
from cli.schema import flag_values
from doc_pages import PARSERS, flags_of, help_flags, marked_blocks, named_flags, noted_calls, read_page, table_rows


PAGE = read_page("assets/docs/migrate.md")
BLOCKS = marked_blocks(PAGE)
NAMES = {f"--{name}" for task in TASKS for method in METHODS for name in flag_names(task, method)}
ROWS = [cells for cells in table_rows(PAGE) if len(cells) == 3]
LORA = "cogvideox_image_to_video_lora.py"


def test_every_flag_of_ours_exists():
    ours = named_flags(" ".join(" ".join(cells[1:]) for cells in ROWS))
    assert len(ours) > 20 and ours <= NAMES


def test_what_keeps_its_name_is_accepted_under_it():
    accepted = help_flags(LORA) | help_flags("prepare_dataset.py") | NAMES
    for theirs, ours, _ in ROWS:
        if ours.startswith("the same") and theirs != "all others":
            flags = named_flags(theirs) or {f"--{key}" for key in re.findall(r"`(\w+)`", theirs)}
            assert flags and flags <= accepted


@pytest.mark.parametrize("block", BLOCKS)
def test_the_new_command_is_accepted(block, tmp_path, monkeypatch):
    clips = tmp_path / "my-clips"
    for folder in (clips, tmp_path / "t2v/train"):
        folder.mkdir(parents=True)
    for file in (clips / "prompts.txt", clips / "videos.txt", tmp_path / "t2v/train/metadata.jsonl"):
        file.touch()
    monkeypatch.chdir(tmp_path)
    (call,) = noted_calls(BLOCKS[block], tmp_path)
    assert flags_of(call).output_dir == "my-lora"


@pytest.mark.parametrize(
    "name", ["rank", "train_batch_size", "dataloader_num_workers", "checkpointing_steps", "optimizer", "lr_scheduler"]
)
def test_a_default_that_differs_is_named(name, tmp_path):
    argv = ["--pretrained_model_name_or_path", "THUDM/CogVideoX-5b-I2V", "--data_root", str(tmp_path)]
    default = flag_values(PARSERS[LORA](argv))[name]
    notes = [cells[2] for cells in ROWS if f"`--{name}`" in cells[0] + cells[1] and cells[2].startswith("default")]
    assert notes and all(re.match(rf"default `?{default}\b", note) for note in notes)
