"""Only whole checkpoints are found, and the right one is resumed from."""

from pathlib import Path

import pytest

from checkpoints import STATE_FILE, TrainerState, find_checkpoint, list_checkpoints, read_state
from errors import UserError


def make_checkpoint(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text(f'{{"step": {step}, "seed": 42, "settings": {{}}}}\n')
    return folder


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    made = {step: make_checkpoint(tmp_path / f"checkpoint-{step}", step) for step in (10, 9, 100, 1)}
    assert list_checkpoints(tmp_path) == [(step, made[step]) for step in (1, 9, 10, 100)]


def test_what_only_looks_like_a_checkpoint_is_none(tmp_path):
    whole = make_checkpoint(tmp_path / "checkpoint-4", 4)
    for name in (
        "checkpoint-5.partial",
        "checkpoint-x",
        "checkpoint-",
        "checkpoint-6-old",
        ".partial.checkpoint-7",
        ".replaced.checkpoint-8",
        "my-checkpoint-9",
    ):
        make_checkpoint(tmp_path / name, 5)
    (tmp_path / "checkpoint-10").mkdir()  # without a state: a folder of something else, or half deleted
    (tmp_path / "checkpoint-11").write_text("a file")
    assert list_checkpoints(tmp_path) == [(4, whole)]


def test_a_folder_that_does_not_exist_has_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []


def test_without_the_flag_a_run_starts_anew(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-1", 1)
    assert find_checkpoint(None, tmp_path) is None


def test_latest_is_the_checkpoint_with_the_largest_number(tmp_path):
    for step in (9, 10):
        make_checkpoint(tmp_path / f"checkpoint-{step}", step)
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"


def test_latest_of_a_run_without_checkpoints_starts_anew(tmp_path):
    assert find_checkpoint("latest", tmp_path) is None


def test_a_checkpoint_given_by_its_path_is_taken_wherever_it_is(tmp_path):
    elsewhere = make_checkpoint(tmp_path / "other" / "checkpoint-3", 3)
    make_checkpoint(tmp_path / "run" / "checkpoint-10", 10)
    assert find_checkpoint(str(elsewhere), tmp_path / "run") == elsewhere


def test_the_state_is_read_back(tmp_path):
    assert read_state(make_checkpoint(tmp_path / "checkpoint-7", 7)) == TrainerState(step=7, seed=42, settings={})


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "null", '{"step": 1}', '{"step": 1, "seed": 2, "lr": 3}'], ids=repr
)
def test_a_folder_that_is_no_checkpoint_is_refused_with_the_flags_name(tmp_path, content):
    if content is not None:
        (tmp_path / STATE_FILE).write_text(content)
    with pytest.raises(UserError, match=r"^--resume_from_checkpoint: .* is no complete checkpoint") as caught:
        read_state(tmp_path)
    assert str(tmp_path) in str(caught.value)
