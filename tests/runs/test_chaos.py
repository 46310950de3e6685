"""Runs that are killed or told to stop at any moment end with the weights of an uninterrupted run."""

import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from checkpoints.manifest import find_damage
from common.run_folder import LORA_FILE, list_checkpoints
from common.signals import STOPPED_EXIT_CODE
from forked_ranks import Stop, finish, start
from tiny_runs import SIZE, assert_same_weights, short_run_flags, weights_of


LORA, SFT = "cogvideox_text_to_video_lora", "cogvideox_text_to_video_sft"
# Script, number of ranks, steps that it trains, and how often it is stopped.
CASES = [
    (LORA, 1, 16, 4),
    pytest.param(LORA, 1, 48, 20, marks=pytest.mark.slow),
    pytest.param(LORA, 2, 48, 20, marks=pytest.mark.slow),
    pytest.param(SFT, 1, 48, 20, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def flags(prepared_demo, tiny_models) -> list[str]:
    """A run that saves and removes checkpoints at every step, with accumulation over the ends of epochs."""
    flags = [*short_run_flags(tiny_models("5b"), prepared_demo(*SIZE)), "--load_tensors", "--max_train_steps", "16"]
    flags += ["--checkpointing_steps", "1", "--checkpoints_total_limit", "2", "--gradient_accumulation_steps", "2"]
    flags += ["--optimizer", "adamw", "--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--rank", "4"]
    return [*flags, "--report_to", "none"]


def run_until(stop: Stop, script: str, argv: list[str], log: Path, num_ranks: int) -> list[int]:
    """Run until the first rank is stopped, or to the end; returns the exit codes."""
    first, *others = start(script, argv, log, num_ranks, stop=stop)
    first.join()
    for process in others:
        if first.exitcode < 0:
            process.kill()  # as its launcher would
        process.join()
    return [process.exitcode for process in (first, *others)]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory) -> Callable[[str, int, int], Path]:
    """Return the folder of a run that nothing stops, by script, number of ranks and of steps."""

    @cache
    def run(script: str, num_ranks: int, num_steps: int) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted")
        argv = [*flags, "--max_train_steps", str(num_steps), "--output_dir", str(folder / "run")]
        finish(script, argv, folder / "log.txt", num_ranks)
        return folder / "run"

    return run


@pytest.fixture
def survive(flags, uninterrupted, tmp_path) -> Callable[..., list[list[int]]]:
    """Stop a run several times by a signal, resume it each time, and compare its weights; returns the exit codes."""

    def survive(number: signal.Signals, script: str, num_ranks: int, num_steps: int, num_stops: int):
        log, run = tmp_path / "log.txt", tmp_path / "run"
        argv = [*flags, "--max_train_steps", str(num_steps), "--output_dir", str(run)]
        argv += ["--resume_from_checkpoint", "latest"]
        chance, codes = random.Random(int(number)), []
        for attempt in range(num_stops):
            delay = chance.uniform(0, 0.3) if attempt % 2 else 0.0
            # A start takes about 40 events, a step and its save half as many.
            stop = Stop(number, 25 + 60 * (attempt + 1) // (num_stops + 1), delay)
            codes.append(run_until(stop, script, argv, log, num_ranks))
        finish(script, argv, log, num_ranks)
        expected = uninterrupted(script, num_ranks, num_steps)
        assert_same_weights(weights_of(run), weights_of(expected))
        # and training would go on from the same ones
        newest, same = (list_checkpoints(folder)[-1][1] for folder in (run, expected))
        assert newest.name == same.name
        assert_same_weights(weights_of(newest), weights_of(same))
        assert not list(run.glob(".*"))
        return codes

    return survive


@pytest.mark.parametrize(("script", "num_ranks", "num_steps", "num_stops"), CASES)
def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_an_uninterrupted_one(
    survive, script, num_ranks, num_steps, num_stops
):
    codes = survive(signal.SIGKILL, script, num_ranks, num_steps, num_stops)
    assert codes.count([-signal.SIGKILL] * num_ranks) > num_stops / 2
    assert {code for of_ranks in codes for code in of_ranks} <= {0, -signal.SIGKILL}


@pytest.mark.parametrize(("script", "num_ranks", "num_steps", "num_stops"), CASES)
def test_a_run_that_is_told_to_stop_again_and_again_does_so_too(survive, script, num_ranks, num_steps, num_stops):
    codes = survive(signal.SIGTERM, script, num_ranks, num_steps, num_stops)
    assert codes.count([STOPPED_EXIT_CODE] * num_ranks) > num_stops / 2
    # Before the first step there is nothing to save, and the signal ends the process as it ends others.
    assert {first for first, *_ in codes} <= {0, STOPPED_EXIT_CODE, -signal.SIGTERM}
    assert all(len(set(of_ranks)) == 1 for of_ranks in codes if of_ranks[0] >= 0)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of its own, for which one must be root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root can make a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fail(argv: list[str], log: Path, *, largest_file: int = 0) -> str:
    """Run to an error of one line; returns it."""
    log.unlink(missing_ok=True)
    (process,) = start(LORA, argv, log, largest_file=largest_file)
    process.join()
    said = log.read_text()
    assert process.exitcode == 2, said
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(flags, small_disk, tmp_path):
    log, run = tmp_path / "log.txt", small_disk / "run"
    argv = [*flags, "--checkpoints_total_limit", "9", "--output_dir", str(run), "--resume_from_checkpoint", "latest"]
    error = fail(argv, log)
    assert re.search(r"has \d+ [kM]B of free space, and at least \d+ kB are needed for checkpoint-", error)
    assert error.endswith("is complete: make room and continue with --resume_from_checkpoint latest")
    whole = [path for _, path in list_checkpoints(run)]
    assert whole
    assert [find_damage(path) for path in whole] == [None] * len(whole)
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    finish(LORA, argv, log)
    assert (run / LORA_FILE).is_file()


def test_a_save_that_fails_half_way_leaves_nothing_of_it(flags, tmp_path):
    log, run = tmp_path / "log.txt", tmp_path / "run"
    argv = [*flags, "--output_dir", str(run), "--resume_from_checkpoint", "latest"]
    finish(LORA, [*argv, "--max_train_steps", "2"], log)
    # Weights fit in that size of a file, the optimizer's states do not.
    largest = (run / LORA_FILE).stat().st_size + 1000
    error = fail(argv, log, largest_file=largest)
    assert "checkpoint-3 cannot be written: " in error
    assert error.endswith("checkpoint-2 is complete: make room and continue with --resume_from_checkpoint latest")
    others = ["config-step-2.yaml", "config.yaml", "loss.png", "metrics.jsonl"]
    pages = ["report.html", "run_facts.json", "run_notes.jsonl"]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "checkpoint-2", *others, LORA_FILE, *pages]
    finish(LORA, argv, log)
