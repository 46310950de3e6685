"""A checkpoint is saved completely or not at all; tests of runs cover its contents."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from checkpoint_folders import make_checkpoint
from checkpoints.folder import CheckpointFolder
from checkpoints.manifest import find_damage
from checkpoints.schedule import ScheduleStart
from checkpoints.state import TrainerState, read_state
from common.errors import UserError
from common.run_folder import STATE_FILE
from parallel.coordinator import Coordinator


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def checkpoint_folder(path: Path, total_limit: int | None = None) -> CheckpointFolder:
    """Return the checkpoints of a model of two numbers."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return CheckpointFolder(path, accelerator, Coordinator(), total_limit)


def test_a_saved_checkpoint_is_complete_and_has_the_state(tmp_path):
    state = TrainerState(5, 1, {"model": "5b"}, {"use_8bit": True}, ScheduleStart(2, 3, 4, 1, 6))
    saved = checkpoint_folder(tmp_path / "new").save(state)
    assert saved == tmp_path / "new" / "checkpoint-5"
    assert find_damage(saved) is None
    assert read_state(saved) == state


def test_saving_removes_older_ones_and_what_killed_processes_left(tmp_path):
    checkpoints = checkpoint_folder(tmp_path, total_limit=2)
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


def test_without_space_nothing_is_written_and_the_last_one_is_named(tmp_path):
    checkpoints = checkpoint_folder(tmp_path, total_limit=1)
    checkpoints.save(TrainerState(1, 0, {}))
    free = r"^--output_dir: '.*' has .*B of free space, and at least 1000000000.00 GB are needed for checkpoint-2"
    with pytest.raises(UserError, match=f"{free}; checkpoint-1 is complete: make room"):
        checkpoints.save(TrainerState(2, 0, {}), min_bytes=10**18)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert find_damage(tmp_path / "checkpoint-1") is None


def test_a_damaged_one_is_written_again(tmp_path):
    (make_checkpoint(tmp_path / "checkpoint-1", 1) / STATE_FILE).unlink()
    assert find_damage(checkpoint_folder(tmp_path).save(TrainerState(1, 0, {}))) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_file_in_the_way_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written: .*Not a directory"):
        checkpoint_folder(tmp_path / "file" / "run").save(TrainerState(1, 0, {}))
