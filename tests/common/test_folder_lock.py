"""One folder is written to by one process, or by several that do the same work."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from common import folder_lock
from common.errors import UserError
from common.folder_lock import LOCK_FILE, locked_folder
from repository import TRAINING


HOLD = """
import sys
from pathlib import Path
from common.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1]), sys.argv[2]):
    print(flush=True)
    sys.stdin.read()
"""
COMMAND = [sys.executable, "-c", HOLD]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(TRAINING)}


@pytest.fixture
def hold(tmp_path) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Start a process that holds the lock of a folder until its stdin ends."""
    started = []

    def start(work: str) -> subprocess.Popen:
        command = [*COMMAND, str(tmp_path), work]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=ENVIRONMENT, **pipes))
        assert started[-1].stdout.readline() == b"\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_another_process_is_refused_with_the_holders_name_until_that_dies(hold, tmp_path):
    holder = hold("")
    said = rf"^--output_dir: process {holder.pid} on {os.uname().nodename} is writing to '{tmp_path}'; wait"
    with pytest.raises(UserError, match=said), locked_folder(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_processes_with_the_same_work_write_together(hold, tmp_path):
    holder = hold("the same")
    with locked_folder(tmp_path, "the same"):
        pass
    with pytest.raises(UserError, match=f"process {holder.pid} on"), locked_folder(tmp_path, "other"):
        pass
    assert (tmp_path / LOCK_FILE).exists()


def test_one_with_the_same_work_succeeds_the_holder_and_refuses_others(hold, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_SUCCESSION", 0.01)
    holder, begun = hold("the same"), []
    with locked_folder(tmp_path, "the same", lambda: begun.append("again")):
        holder.kill()
        holder.wait()
        while f'"process": {os.getpid()},' not in (tmp_path / LOCK_FILE).read_text():
            pass
        done = subprocess.run([*COMMAND, str(tmp_path), "other"], env=ENVIRONMENT, capture_output=True, text=True)
        assert f"process {os.getpid()} on" in done.stderr
    assert begun == [] and list(tmp_path.iterdir()) == []


def test_the_last_of_several_removes_the_file_of_a_killed_holder(hold, tmp_path):
    holder = hold("the same")
    with locked_folder(tmp_path, "the same"):
        holder.kill()
        holder.wait()
    assert list(tmp_path.iterdir()) == []


def test_others_join_after_the_first_has_begun(tmp_path):
    begun = []

    def begin():
        assert (tmp_path / LOCK_FILE).read_text() == ""  # nobody's name, for which others wait
        begun.append("first")

    (tmp_path / LOCK_FILE).write_text('{"work": "the same"}')  # of a process that was killed
    with locked_folder(tmp_path, "the same", begin), locked_folder(tmp_path, "the same", begin):
        assert begun == ["first"]


def test_a_fork_that_ends_leaves_the_lock_to_its_parent(tmp_path):
    with locked_folder(tmp_path):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        done = subprocess.run([*COMMAND, str(tmp_path), ""], env=ENVIRONMENT, capture_output=True, text=True)
        assert f"process {os.getpid()} on" in done.stderr


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path, caplog):
    (tmp_path / LOCK_FILE).mkdir()
    with locked_folder(tmp_path):
        pass
    assert "cannot be locked" in caplog.text and "start nothing else that writes there" in caplog.text
