"""A data worker that dies, and an error in one, come with the clip that was being read."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.failures import explain_death, explained_failures
from data.buckets import Bucket
from data.clips import Clip, ClipSample
from data.prepared import PreparedClip, StoredTensor
from data.sampler import Draw
from dataset import ClipDataset, PreparedDataset, make_loader, without_failures
from video.probe import VideoInfo


BUCKET = Bucket(1, 16, 16)


class Clips(ClipDataset):
    """Clips of which the one named "bad" does something to whoever reads it."""

    def __init__(self, names: str, read_bad: Callable[[], None]):
        info = VideoInfo(1, 16, 16, 8.0, 0, "")
        clips = [
            ClipSample(Clip(Path(f"{name}.mp4"), "a caption", f"videos.txt:{number}"), info, BUCKET, (0,))
            for number, name in enumerate(names.split(), 1)
        ]
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


@pytest.mark.parametrize(
    ("number", "cause", "advice"),
    [
        (signal.SIGKILL, "Killed", "ran out of host memory: give fewer --dataloader_num_workers"),
        (signal.SIGSEGV, "Segmentation fault", "convert the file (ffmpeg -i OLD NEW.mp4), or take it off the list"),
        (signal.SIGBUS, "Bus error", "enlarge /dev/shm"),
    ],
)
def test_a_worker_that_is_killed_is_reported_with_the_clip_that_it_was_reading(number, cause, advice):
    with pytest.raises(UserError) as caught:
        read_all(Clips("a b bad c", lambda: os.kill(os.getpid(), number)))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"a data worker died ({cause}) while reading bad.mp4 (videos.txt:3); ")
    assert advice in line


def test_a_worker_that_leaves_on_its_own_is_reported_with_its_clip():
    with pytest.raises(UserError, match=r"a data worker died \(it ended without a word\) while reading bad\.mp4"):
        read_all(Clips("bad a", lambda: os._exit(3)), num_workers=1)


def test_of_several_loaders_the_one_whose_worker_died_is_named():
    idle = iter(make_loader(Clips("x y", lambda: None), [[Draw(0, 0)], [Draw(1, 0)]], num_workers=1))
    next(idle)
    with pytest.raises(UserError, match=r"while reading bad\.mp4"):
        read_all(Clips("bad", lambda: os.kill(os.getpid(), signal.SIGKILL)), num_workers=1)


def test_a_worker_that_dies_between_two_clips_is_reported_without_one():
    error = RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")
    assert explain_death(error).startswith("a data worker died (Killed) between two clips; most likely the system ran")


def test_other_errors_are_no_deaths():
    assert explain_death(RuntimeError("Caught ValueError in DataLoader worker process 0.")) is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_while_a_clip_is_read_names_the_clip(num_workers):
    def fail():
        raise KeyError("a bug")

    with pytest.raises(KeyError) as caught:
        read_all(Clips("a bad", fail), num_workers)
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "while reading bad.mp4 (videos.txt:2)" in told


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "allocate", [lambda: np.empty(2**60, np.uint8), lambda: torch.empty(2**55, dtype=torch.uint8)]
)
def test_a_clip_that_does_not_fit_into_memory_is_one_line(num_workers, allocate):
    batches = without_failures(make_loader(Clips("bad", allocate), [[Draw(0, 0)]], num_workers=num_workers))
    with pytest.raises(UserError) as caught:
        next(batches)
    _, line = str(caught.value).splitlines()
    assert line.strip().startswith("bad.mp4 (videos.txt:1): too little host memory to read it (")
    assert line.endswith("give fewer --dataloader_num_workers")


def test_a_prepared_sample_is_named_with_its_file():
    stored = StoredTensor(Path("prepared/latents/aa.safetensors"), "rabbit.video_latents")
    dataset = PreparedDataset([PreparedClip("rabbit", BUCKET, stored, stored)])
    assert dataset.name_of(0) == "rabbit (prepared/latents/aa.safetensors)"
