"""Jobs run apart from the app, one at a time, and end by the signal that lets a run save."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from common.errors import UserError
from studio.jobs import Jobs


UNTIL_SIGTERM = (
    "import signal, sys\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)))\n"
    "print('ready', flush=True)\n"
    "signal.pause()"
)


def python(code):
    return [sys.executable, "-c", code]


def wait_for(condition):
    while not condition():
        time.sleep(0.02)


@pytest.fixture
def jobs(tmp_path):
    jobs = Jobs(tmp_path)
    yield jobs
    if (job := jobs.latest()) and job.is_running:
        os.killpg(job.process, signal.SIGKILL)


def endless(folder):
    """Return a command that says when it is ready, and that it saves."""
    (folder / "endless.py").write_text(UNTIL_SIGTERM)
    return [sys.executable, str(folder / "endless.py")]


def start_endless(jobs, *more):
    jobs.start("train", [endless(jobs.root), *more], "out")
    wait_for(lambda: "ready" in jobs.latest().log())


def finished(jobs):
    wait_for(lambda: not jobs.latest().is_running)
    return jobs.latest()


def test_commands_run_one_after_another_and_are_logged_until_one_fails(jobs, tmp_path):
    codes = "print('a\\rb; $HOME')", "import os; print(os.getcwd()); exit(3)", "print('never')"
    jobs.start("train", [python(code) for code in codes], "out", ["form", 1])
    job = finished(jobs)
    assert (job.state, job.form) == ("failed with exit code 3; its log says why", ["form", 1])
    first, second = (f"$ {shlex.join(python(code))}" for code in codes[:2])
    assert job.log().splitlines() == [first, "b; $HOME", second, str(tmp_path)]
    jobs.start("plan", [python("")], "out")
    assert (finished(jobs).kind, jobs.latest().state) == ("plan", "finished")


def test_stopping_lets_a_run_save_and_starts_nothing_after_it(jobs):
    start_endless(jobs, python("print('never')"))
    jobs.stop()
    job = finished(jobs)
    assert job.state == "stopped; start it again to continue"
    assert job.log().splitlines()[1:] == ["ready", "saved"]


def test_only_one_job_runs_and_another_app_finds_it(jobs, tmp_path):
    start_endless(jobs)
    other = Jobs(tmp_path)
    assert other.latest() == jobs.latest()
    assert other.latest().state == f"running, process {jobs.latest().process}"
    with pytest.raises(UserError, match="running already"):
        other.start("plan", [python("")], "out")
    other.stop()
    assert finished(jobs).kind == "train"


def test_a_job_outlives_the_app_that_started_it(jobs, tmp_path):
    code = f"import sys; sys.path[:0] = {sys.path!r}; from pathlib import Path; from studio.jobs import Jobs\n"
    code += f"Jobs(Path({str(tmp_path)!r})).start('train', [{endless(tmp_path)!r}], 'out')"
    subprocess.run(python(code), check=True)
    assert jobs.latest().is_running
    wait_for(lambda: "ready" in jobs.latest().log())
    os.killpg(jobs.latest().process, signal.SIGKILL)
    assert finished(jobs).state == "was killed; start it again to continue"


def test_a_runner_that_is_killed_leaves_the_job_running_as_long_as_its_command(jobs):
    start_endless(jobs)
    os.kill(jobs.latest().process, signal.SIGKILL)
    assert jobs.latest().is_running
    jobs.stop()
    assert finished(jobs).log().endswith("saved\n")
    assert json.loads((jobs.latest().folder / "job.json").read_text())["kind"] == "train"


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (".cogvideox-app", ".."),
        (".cogvideox-app", ".cogvideox-app"),
        (".cogvideox-app", None),
        (".cogvideox-app/jobs", "../.."),
        (".cogvideox-app/lock", "../../new"),
    ],
)
def test_links_and_files_in_the_way_of_the_apps_own_folder_are_refused(tmp_path, name, target):
    (root := tmp_path / "root").mkdir()
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(target) if target else (root / name).touch()
    with pytest.raises(UserError, match=f"{name} is a link or a file in the way of the app's own files; move it away"):
        Jobs(root)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_job_whose_files_are_links_is_not_shown(jobs, tmp_path):
    for name in ("1-plan", "2-train"):
        folder = tmp_path / ".cogvideox-app/jobs" / name
        folder.mkdir(parents=True)
        facts = {"kind": name, "commands": [], "result": "out", "form": []}
        (folder / "job.json").write_text(json.dumps(facts))
    (folder / "log.txt").symlink_to("/etc/passwd")
    assert jobs.latest().kind == "1-plan"
