"""A first signal stops the run gracefully, a second one at once."""

import os
import signal
import subprocess
import sys

import pytest

from common.signals import SIGNALS, StopSignals
from repository import TRAINING


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_recorded_and_announced_and_the_process_continues(number, capfd):
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
        os.kill(os.getpid(), number)  # as forwarded by a launcher
        assert signals.received == number
    assert [signal.getsignal(one) for one in SIGNALS] == before
    said = capfd.readouterr().err
    assert said.count("saving after this step, then leaving; a second signal ends the run at once") == 1
    assert number.name in said


IMPORTS = "import os, signal; from common import signals as stop_signals"


def run(code: str) -> subprocess.CompletedProcess:
    code, path = f"{IMPORTS}\n{code}", {"PYTHONPATH": str(TRAINING)}
    return subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)


SECOND = """
stop_signals.ECHO_SECONDS = -1.0  # no echo
with stop_signals.StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""


def test_a_second_signal_ends_the_process_at_once():
    done = run(SECOND)
    assert done.returncode == 128 + signal.SIGINT
    assert "still here" not in done.stdout


WORKER = """
stop_signals.outlive_signals()
for number in stop_signals.SIGNALS:
    os.kill(os.getpid(), number)
assert 0 < signal.alarm(0) <= stop_signals.WORKER_GRACE_SECONDS
print("still here")
"""


def test_a_worker_survives_the_signals_of_its_group_for_a_while():
    done = run(WORKER)
    assert (done.returncode, done.stdout) == (0, "still here\n"), done.stderr


PARENT = """
ready, tell = os.pipe()
if os.fork() == 0:
    stop_signals.outlive_signals()
    os.write(tell, b"ready")
    signal.pause()
os.read(ready, 5)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports a parent's death")
def test_a_worker_does_not_outlive_its_parent():
    # Returns at the end of standard output, which the worker inherits.
    assert run(PARENT).returncode == -signal.SIGKILL


LAUNCHED = f"""
{IMPORTS}
stop_signals.ECHO_SECONDS = -1.0  # no echo
stop_signals.follow_launcher()
with stop_signals.StopSignals() as signals:
    if os.environ["CASE"] == "Ctrl-C":
        os.kill(os.getpid(), signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.write(1, b"ready")
    os.close(1)
    signal.sigwait([signal.SIGTERM])  # the launcher is dead
    signals._receive(signal.SIGTERM, None)
    os.write(2, f"continues after {{signals.received.name}}".encode())
"""
LAUNCHER = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {LAUNCHED!r}], stdout=subprocess.PIPE)
child.stdout.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports a parent's death")
@pytest.mark.parametrize(("case", "first"), [("Ctrl-C", "SIGINT"), ("kill", "SIGTERM")])
def test_the_death_of_the_launcher_stops_the_run_and_is_not_a_second_signal(monkeypatch, case, first):
    monkeypatch.setenv("CASE", case)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as the launcher sets it
    # Its end is the end of standard error, which the run inherits.
    assert f"continues after {first}" in run(LAUNCHER).stderr
