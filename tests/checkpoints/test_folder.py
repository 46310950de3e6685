"""Only whole checkpoints are found, and the right one is resumed from."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from checkpoints.folder import CheckpointFolder, check_space
from checkpoints.manifest import find_damage, write_manifest
from checkpoints.schedule import ScheduleStart
from checkpoints.state import TrainerState, find_checkpoint, newest_checkpoint, read_state
from common.errors import UserError
from common.run_folder import STATE_FILE, list_checkpoints
from parallel.coordinator import Coordinator


def make_checkpoint(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text(f'{{"step": {step}, "seed": 42, "settings": {{}}}}\n')
    write_manifest(folder)
    return folder


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    made = {step: make_checkpoint(tmp_path / f"checkpoint-{step}", step) for step in (10, 9, 100, 1)}
    assert list_checkpoints(tmp_path) == [(step, made[step]) for step in (1, 9, 10, 100)]


def test_what_only_looks_like_a_checkpoint_is_none(tmp_path, caplog):
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
    (tmp_path / "checkpoint-10").mkdir()  # a folder of something else, or half copied
    (tmp_path / "checkpoint-11").write_text("a file")
    assert list_checkpoints(tmp_path) == [(4, whole)]
    assert find_checkpoint("latest", tmp_path) == whole
    assert [word in caplog.text for word in ("checkpoint-10 is no checkpoint", "checkpoint-11 is no checkpoint")]


def test_a_folder_that_does_not_exist_has_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []


def test_without_the_flag_a_run_starts_anew(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-1", 1)
    assert find_checkpoint(None, tmp_path) is newest_checkpoint(None, tmp_path) is None


def test_latest_is_the_checkpoint_with_the_largest_number(tmp_path):
    for step in (9, 10):
        make_checkpoint(tmp_path / f"checkpoint-{step}", step)
    assert find_checkpoint("latest", tmp_path) == newest_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"


def test_latest_of_a_run_without_checkpoints_starts_anew(tmp_path):
    assert find_checkpoint("latest", tmp_path) is newest_checkpoint("latest", tmp_path) is None


def test_latest_passes_over_damaged_ones_with_a_warning(tmp_path, caplog):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-3" / STATE_FILE).write_text('{"step": 3')
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-3 is damaged (trainer_state.json has" in caplog.text


def test_a_run_of_damaged_checkpoints_alone_is_not_started_over(tmp_path):
    (make_checkpoint(tmp_path / "checkpoint-3", 3) / STATE_FILE).unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; to start anew"):
        find_checkpoint("latest", tmp_path)


def test_a_checkpoint_given_by_its_path_is_taken_wherever_it_is(tmp_path):
    elsewhere = make_checkpoint(tmp_path / "other" / "checkpoint-3", 3)
    make_checkpoint(tmp_path / "run" / "checkpoint-10", 10)
    assert find_checkpoint(str(elsewhere), tmp_path / "run") == elsewhere


def test_a_damaged_one_given_by_its_path_is_refused(tmp_path):
    (make_checkpoint(tmp_path / "checkpoint-3", 3) / STATE_FILE).unlink()
    with pytest.raises(
        UserError, match=r"^--resume_from_checkpoint: .*-3 is no whole checkpoint: trainer_state.json is"
    ):
        find_checkpoint(str(tmp_path / "checkpoint-3"), tmp_path)


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


@pytest.mark.usefixtures("fresh_accelerator")
class TestSaving:
    """A model of two numbers; what a run saves is tested with whole runs."""

    def folder(self, path: Path, total_limit: int | None = None) -> CheckpointFolder:
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(1, 1)
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        return CheckpointFolder(path, accelerator, Coordinator(), total_limit)

    def test_a_saved_one_is_whole_and_says_where_the_run_was(self, tmp_path):
        state = TrainerState(5, 1, {"model": "5b"}, {"use_8bit": True}, ScheduleStart(2, 3, 4, 1, 6))
        saved = self.folder(tmp_path / "new").save(state)
        assert saved == tmp_path / "new" / "checkpoint-5"
        assert find_damage(saved) is None
        assert read_state(saved) == state

    def test_older_ones_and_what_killed_processes_left_are_removed_when_the_new_one_is_there(self, tmp_path):
        checkpoints = self.folder(tmp_path, total_limit=2)
        for step in (1, 2, 30):
            make_checkpoint(tmp_path / f"checkpoint-{step}", step)
        for left in (".partial.checkpoint-9", ".removed.checkpoint-0", ".replaced.checkpoint-7"):
            make_checkpoint(tmp_path / left, 9)
        (tmp_path / "checkpoint-notes").mkdir()
        checkpoints.save(TrainerState(3, 0, {}))
        # One of a later step is not older.
        assert {path.name for path in tmp_path.iterdir()} == {
            *("checkpoint-2", "checkpoint-3", "checkpoint-30", "checkpoint-notes")
        }

    def test_without_space_nothing_is_begun_and_the_last_one_is_named(self, tmp_path):
        checkpoints = self.folder(tmp_path, total_limit=1)
        checkpoints.save(TrainerState(1, 0, {}))
        with pytest.raises(UserError, match=r"at least 1000000000.00 GB are needed for checkpoint-2; checkpoint-1 is"):
            checkpoints.save(TrainerState(2, 0, {}), min_bytes=10**18)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
        assert find_damage(tmp_path / "checkpoint-1") is None

    def test_one_that_is_damaged_is_written_again(self, tmp_path):
        (make_checkpoint(tmp_path / "checkpoint-1", 1) / STATE_FILE).unlink()
        assert find_damage(self.folder(tmp_path).save(TrainerState(1, 0, {}))) is None
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]

    def test_what_is_in_the_way_is_an_error_of_one_line(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"cannot be written: .*Not a directory"):
            self.folder(tmp_path / "file" / "run").save(TrainerState(1, 0, {}))


def test_space_is_said_in_numbers(tmp_path):
    check_space(tmp_path, 1, "a checkpoint")
    with pytest.raises(
        UserError, match=r"^--output_dir: '.*' has .* GB of free space, and at least 2000000.00 GB"
    ) as caught:
        check_space(tmp_path, 2 * 10**15, "a checkpoint")
    assert "needed for a checkpoint" in str(caught.value)
