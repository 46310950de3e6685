"""Runs are killed and told to stop at any moment, and end with the bytes of a run that never was."""

import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.manifest import find_damage
from common.run_folder import LORA_FILE, list_checkpoints
from common.signals import STOPPED_EXIT_CODE


CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, in the server that all processes are forked from: an import takes longer than the whole training. That
# server does not find modules of our own.
PIPELINES = "diffusers.pipelines.cogvideo"
CONTEXT.set_forkserver_preload(
    [
        *("accelerate", "peft", "torchvision", "diffusers.training_utils", "transformers.models.t5.modeling_t5"),
        *(f"{PIPELINES}.pipeline_cogvideox", f"{PIPELINES}.pipeline_cogvideox_image2video"),
    ]
)
LORA, SFT = "cogvideox_text_to_video_lora", "cogvideox_text_to_video_sft"
NUM_STOPS = 20
SIZE = ["--height", "64", "--width", "96", "--frame_buckets", "17", "--max_num_frames", "17"]
# What Python tells of a process's work on files, in the order of a save: written, renamed, older ones removed.
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


@pytest.fixture(scope="module")
def prepared(prepared_demo) -> Path:
    return prepared_demo(*SIZE)


@pytest.fixture
def flags(prepared, tiny_models) -> list[str]:
    """A run that saves and removes checkpoints at every step, with accumulation over the ends of epochs."""
    flags = ["--pretrained_model_name_or_path", str(tiny_models("5b")), "--data_root", str(prepared), "--load_tensors"]
    flags += ["--train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_train_steps", "48"]
    flags += ["--checkpointing_steps", "1", "--checkpoints_total_limit", "2", "--optimizer", "adamw", "--seed", "0"]
    return [*flags, *SIZE, "--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--rank", "4", "--report_to", "none"]


@dataclass(frozen=True)
class Stop:
    """A moment of a run that depends on no clock, but for the delay: most of them lie in a save or just behind it."""

    signal: signal.Signals
    event: int  # number of the file event in the output folder after which the process gets the signal
    delay: float  # seconds


def run_rank(
    script: str, argv: list[str], rank: int, num_ranks: int, port: int, log: Path, stop: Stop | None, largest_file: int
) -> None:
    """One process of a launch.

    Args:
        stop: when it gets a signal; None for never.
        largest_file: that it can write, in bytes; 0 for any.
    """
    if num_ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.modules["deepspeed"] = None  # takes as long to import as ten steps do
    folder, count = argv[argv.index("--output_dir") + 1], 0

    def watch(event: str, details: tuple) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(details[0]).startswith(folder):
            count += 1
            if count == stop.event:
                # Straight away, if there is no delay: at this event, not soon after it.
                later = threading.Timer(stop.delay, os.kill, (os.getpid(), stop.signal))
                later.start() if stop.delay else later.function(*later.args)

    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if stop:
        sys.addaudithook(watch)
    __import__(script).main(argv)


def start(
    script: str, argv: list[str], log: Path, num_ranks: int = 1, *, stop: Stop | None = None, largest_file: int = 0
) -> list:
    """Start a launch; the first process is the one that is stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        CONTEXT.Process(
            target=run_rank,
            args=(script, argv, rank, num_ranks, port, log, None if rank else stop, largest_file),
        )
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    return ranks


def stopped(script: str, argv: list[str], log: Path, num_ranks: int, stop: Stop) -> list[int]:
    """Run until it is stopped, or done; returns the exit codes."""
    first, *others = start(script, argv, log, num_ranks, stop=stop)
    first.join()
    for process in others:
        if first.exitcode < 0:
            process.kill()  # as its launcher would
        process.join()
    return [process.exitcode for process in (first, *others)]


def finish(script: str, argv: list[str], log: Path, num_ranks: int = 1) -> None:
    """Run to the end."""
    for process in start(script, argv, log, num_ranks):
        process.join()
        assert process.exitcode == 0, log.read_text()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The result, and what training would go on from."""
    newest = list_checkpoints(folder)[-1][1]
    files = [file for place in (folder, newest) for file in place.glob("*.safetensors")]
    files += [file for place in (folder, newest) for file in place.glob("transformer/*.safetensors")]
    assert len(files) == 2
    return {f"{file.relative_to(folder)} {name}": weight for file in files for name, weight in load_file(file).items()}


def survive(
    script: str, flags: list[str], tmp_path: Path, number: signal.Signals, num_ranks: int = 1
) -> list[list[int]]:
    """Stop a run twenty times and let it go on each time; returns the exit codes."""
    log, whole, survivor = tmp_path / "log.txt", tmp_path / "whole", tmp_path / "survivor"
    finish(script, [*flags, "--output_dir", str(whole)], log, num_ranks)
    chance, codes = random.Random(int(number)), []
    for attempt in range(NUM_STOPS):
        argv = [*flags, "--output_dir", str(survivor), "--resume_from_checkpoint", "latest"]
        stop = Stop(number, chance.randrange(1, 60), chance.uniform(0, 0.3) if attempt % 2 else 0.0)
        codes.append(stopped(script, argv, log, num_ranks, stop))
    finish(script, argv, log, num_ranks)
    weights, expected = weights_of(survivor), weights_of(whole)
    assert weights.keys() == expected.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, expected[name])] == []
    assert not list(survivor.glob(".*"))
    return codes


IN_SLOW_TESTS = [pytest.param(LORA, 2, marks=pytest.mark.slow), pytest.param(SFT, 1, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("script", "num_ranks"), [(LORA, 1), *IN_SLOW_TESTS])
def test_killed_twenty_times_a_run_ends_with_the_weights_of_an_uninterrupted_one(script, num_ranks, flags, tmp_path):
    codes = survive(script, flags, tmp_path, signal.SIGKILL, num_ranks)
    assert codes.count([-signal.SIGKILL] * num_ranks) > NUM_STOPS / 2
    assert {code for of_ranks in codes for code in of_ranks} <= {0, -signal.SIGKILL}


@pytest.mark.parametrize(("script", "num_ranks"), [(LORA, 1), *IN_SLOW_TESTS])
def test_told_to_stop_twenty_times_it_does_so_too(script, num_ranks, flags, tmp_path):
    codes = survive(script, flags, tmp_path, signal.SIGTERM, num_ranks)
    assert codes.count([STOPPED_EXIT_CODE] * num_ranks) > NUM_STOPS / 2
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
    assert "GB of free space, and at least 0.00 GB are needed for checkpoint-" in error
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
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "checkpoint-2", *others, LORA_FILE]
    finish(LORA, argv, log)
