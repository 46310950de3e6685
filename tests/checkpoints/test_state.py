"""Only complete checkpoints are found, and a run resumes from the right one."""

import pytest

from checkpoint_folders import make_checkpoint
from checkpoints.resume import find_checkpoint, newest_checkpoint
from checkpoints.state import TrainerState, read_state
from common.errors import UserError
from common.run_folder import STATE_FILE, list_checkpoints


def test_folders_with_similar_names_are_not_checkpoints(tmp_path, caplog):
    complete = make_checkpoint(tmp_path / "checkpoint-4", 4)
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
    (tmp_path / "checkpoint-10").mkdir()  # a folder of something else, or half copied
    (tmp_path / "checkpoint-11").write_text("a file")
    assert list_checkpoints(tmp_path) == [(4, complete)]
    assert find_checkpoint("latest", tmp_path) == complete
    assert [word in caplog.text for word in ("checkpoint-10 is not a", "checkpoint-11 is not a checkpoint")]


def test_latest_is_the_checkpoint_with_the_largest_number(tmp_path):
    made = {step: make_checkpoint(tmp_path / f"checkpoint-{step}", step) for step in (10, 9, 100, 1)}
    assert list_checkpoints(tmp_path) == [(step, made[step]) for step in (1, 9, 10, 100)]
    assert find_checkpoint("latest", tmp_path) == newest_checkpoint("latest", tmp_path) == made[100]


@pytest.mark.parametrize(("resume_from", "folder"), [(None, "."), ("latest", "empty"), ("latest", "none")])
def test_a_run_without_the_flag_or_without_checkpoints_starts_at_step_0(tmp_path, resume_from, folder):
    make_checkpoint(tmp_path / "checkpoint-1", 1)
    (tmp_path / "empty").mkdir()
    assert find_checkpoint(resume_from, tmp_path / folder) is None
    assert newest_checkpoint(resume_from, tmp_path / folder) is None


def test_latest_skips_damaged_ones_with_a_warning(tmp_path, caplog):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-3" / STATE_FILE).write_text('{"step": 3')
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-3 is damaged (trainer_state.json has" in caplog.text


def test_a_run_with_only_damaged_checkpoints_is_not_started_again(tmp_path):
    (make_checkpoint(tmp_path / "checkpoint-3", 3) / STATE_FILE).unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; to start again"):
        find_checkpoint("latest", tmp_path)


def test_a_checkpoint_set_by_its_path_is_used_wherever_it_is(tmp_path):
    elsewhere = make_checkpoint(tmp_path / "other" / "checkpoint-3", 3)
    make_checkpoint(tmp_path / "run" / "checkpoint-10", 10)
    assert find_checkpoint(str(elsewhere), tmp_path / "run") == elsewhere
    (elsewhere / STATE_FILE).unlink()
    message = r"^--resume_from_checkpoint: .*-3 is not a complete checkpoint: trainer_state.json is missing"
    with pytest.raises(UserError, match=message):
        find_checkpoint(str(elsewhere), tmp_path / "run")


def test_the_state_is_read_back(tmp_path):
    assert read_state(make_checkpoint(tmp_path / "checkpoint-7", 7)) == TrainerState(step=7, seed=42, settings={})


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "null", '{"step": 1}', '{"step": 1, "seed": 2, "lr": 3}'], ids=repr
)
def test_a_folder_that_is_not_a_checkpoint_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / STATE_FILE).write_text(content)
    with pytest.raises(UserError, match=r"^--resume_from_checkpoint: .* is not a complete checkpoint") as caught:
        read_state(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("before", "now", "words"), [(1.0, None, "was on, is now off"), (None, 2.0, "was off, is now on")]
)
@pytest.mark.parametrize(
    ("flag", "what"),
    [
        ("--regularization_weight", r"regularization \(--regularization_data_root\)"),
        ("--mask_background_weight", "--use_masks"),
    ],
)
def test_what_comes_or_goes_is_named_instead_of_its_weight(flag, what, before, now, words):
    with pytest.raises(UserError, match=rf"settings: {what} {words};"):
        TrainerState(1, 0, {flag: before}).check_settings({flag: now})
    with pytest.raises(UserError, match=rf"{flag} was 1\.0, is now 2\.0"):
        TrainerState(1, 0, {flag: 1.0}).check_settings({flag: 2.0})


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"--condition_frames": "first,last"}, False, "was first,last, is now first"),
        ({}, "first:2", "was first, is now first:2"),  # of an older version
    ],
)
def test_a_run_with_first_frames_is_not_one_without_given_frames(before, now, words):
    with pytest.raises(UserError, match=f"settings: --condition_frames {words};"):
        TrainerState(1, 0, before).check_settings({"--condition_frames": now})
