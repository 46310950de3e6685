"""One folder is written to by one process, or by several that do the same work."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

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


@pytest.fixture
def hold(tmp_path) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Start a process that holds the lock of a folder until its stdin ends."""
    started = []

    def start(work: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path), work]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(TRAINING)}, **pipes))
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


def test_a_fork_that_ends_leaves_the_lock_to_its_parent(tmp_path):
    with locked_folder(tmp_path):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        command = [sys.executable, "-c", HOLD, str(tmp_path), ""]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(TRAINING)}, capture_output=True, text=True)
        assert f"process {os.getpid()} on" in done.stderr


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path, caplog):
    (tmp_path / LOCK_FILE).mkdir()
    with locked_folder(tmp_path):
        pass
    assert "cannot be locked" in caplog.text and "start nothing else that writes there" in caplog.text
