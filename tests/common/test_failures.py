"""Out of memory and dead data workers become short errors with advice; other errors stay as they are."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from common.errors import UserError
from common.failures import explained_failures
from data.buckets import Bucket
from data.clips import Clip, ClipSample
from data.sampler import Draw
from dataset import ClipDataset, PreparedDataset, make_loader, without_failures
from prepared.folder import StoredTensor
from prepared.index import PreparedClip
from video.probe import VideoInfo


ALLOCATIONS = [lambda: np.empty(2**60, np.uint8), lambda: torch.empty(2**55, dtype=torch.uint8)]
CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3.12 GiB is "
    "free. Process 1 has 75.98 GiB memory in use. Of the allocated memory 70 GiB is allocated by PyTorch."
)


def explained(error: Exception) -> list[str]:
    with pytest.raises(UserError) as caught, explained_failures(lambda: ["--offload_checkpoints: 5 GB less"]):
        raise error
    return str(caught.value).splitlines()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_SAYS), RuntimeError("CUDA error: out of memory")])
def test_a_full_gpu_is_reported_with_advice(error):
    title, advice = explained(error)
    assert title.startswith(f"out of GPU memory ({type(error).__name__}: CUDA ")
    assert "Of the allocated memory" not in title
    assert advice.strip() == "--offload_checkpoints: 5 GB less"


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@pytest.mark.parametrize(("other", "advice"), [((), "--dataloader_num_workers"), (("fewer frames",), "fewer frames")])
def test_a_full_host_is_reported_with_other_advice(allocate, other, advice):
    with pytest.raises(UserError) as caught, explained_failures(list, *other):
        allocate()
    (line,) = str(caught.value).splitlines()
    assert line.startswith("out of host memory (")
    assert advice in line


OTHERS = [RuntimeError("shapes do not fit"), RuntimeError("Caught ValueError in DataLoader worker process 0.")]


@pytest.mark.parametrize("error", [*OTHERS, KeyError("a bug"), UserError("--rank: 0")])
def test_other_errors_are_raised_unchanged(error):
    with pytest.raises(type(error)) as caught, explained_failures(list):
        raise error
    assert caught.value is error


def test_a_failed_compilation_names_the_flag_that_turns_it_off():
    with pytest.raises(TorchDynamoException) as caught, explained_failures(list):
        raise TorchDynamoException("cannot be traced")
    assert "pass --no-compile" in caught.value.__notes__[0]


@pytest.mark.gpu
def test_an_allocation_too_large_for_the_gpu_is_reported():
    with pytest.raises(UserError, match=r"^out of GPU memory "), explained_failures(list):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")


BUCKET = Bucket(1, 16, 16)


class Clips(ClipDataset):
    """Clips; reading the one named "bad" calls `read_bad`."""

    def __init__(self, names: str, read_bad: Callable[[], None]):
        info = VideoInfo(1, 16, 16, 8.0, 0, "")
        listed = enumerate(names.split(), 1)
        clips = [Clip(Path(f"{name}.mp4"), "a caption", f"videos.txt:{number}") for number, name in listed]
        clips = [ClipSample(clip, info, BUCKET, (0,)) for clip in clips]
        super().__init__(clips, reshape_mode="none", random_flip=None, seed=0)
        self.read_bad = read_bad

    def _read(self, draw: Draw):
        if self.clips[draw.index].clip.video.stem == "bad":
            self.read_bad()
        return self.failed(draw, "")


def read_all(dataset, num_workers: int = 2) -> None:
    batches = iter(make_loader(dataset, [[Draw(index, 0)] for index in range(len(dataset))], num_workers=num_workers))
    try:
        with explained_failures(list):
            for _ in batches:
                pass
    finally:
        if num_workers:
            # An error keeps the loader in a reference cycle, and the garbage collector waits minutes for its workers.
            batches._shutdown_workers()


def kill_itself(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("die", "cause", "advice"),
    [
        (kill_itself(signal.SIGKILL), "Killed", "ran out of host memory: lower --dataloader_num_workers"),
        (kill_itself(signal.SIGSEGV), "Segmentation fault", "convert the file (ffmpeg -i OLD NEW.mp4), or remove it"),
        (kill_itself(signal.SIGBUS), "Bus error", "enlarge /dev/shm"),
        (lambda: os._exit(3), "it exited without an error", "convert the file"),
    ],
)
def test_the_death_of_a_worker_is_reported_with_its_clip(die, cause, advice):
    with pytest.raises(UserError) as caught:
        read_all(Clips("a b bad c", die))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"a data worker died ({cause}) while reading bad.mp4 (videos.txt:3); ")
    assert advice in line


def test_the_loader_of_the_dead_worker_is_found():
    idle = iter(make_loader(Clips("x y", lambda: None), [[Draw(0, 0)], [Draw(1, 0)]], num_workers=1))
    next(idle)
    with pytest.raises(UserError, match=r"while reading bad\.mp4"):
        read_all(Clips("bad", kill_itself(signal.SIGKILL)), num_workers=1)


def test_a_worker_that_dies_between_two_clips_is_reported_without_one():
    (line,) = explained(RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "))
    assert line.startswith("a data worker died (Killed) between two clips; most likely the system ran")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_while_a_clip_is_read_names_the_clip(num_workers):
    def fail():
        raise KeyError("a bug")

    with pytest.raises(KeyError) as caught:
        read_all(Clips("a bad", fail), num_workers)
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "while reading bad.mp4 (videos.txt:2)" in told


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("allocate", ALLOCATIONS)
def test_a_clip_too_large_for_memory_is_one_line(num_workers, allocate):
    batches = without_failures(make_loader(Clips("bad", allocate), [[Draw(0, 0)]], num_workers=num_workers))
    with pytest.raises(UserError) as caught:
        next(batches)
    _, line = str(caught.value).splitlines()
    assert line.strip().startswith("bad.mp4 (videos.txt:1): too little host memory to read it (")
    assert line.endswith("lower --dataloader_num_workers")


def test_a_prepared_sample_is_named_with_its_file():
    stored = StoredTensor(Path("prepared/latents/aa.safetensors"), "rabbit.video_latents")
    dataset = PreparedDataset([PreparedClip("rabbit", BUCKET, stored, stored)])
    assert dataset.name_of(0) == "rabbit (prepared/latents/aa.safetensors)"
