"""Score clips in several processes: choose frames, read them once, measure them, and remember the scores."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from common.bars import tqdm
from common.errors import UserError, listing
from common.remote import default_cache_folder
from data.clips import ClipSample
from footage import measures
from footage.models import aesthetic, text_share
from footage.pool import worker_processes
from video.cache import FileCache
from video.io import read_frames
from video.probe import VideoInfo


FRAME_SIDE = 512  # pixels of the longer side of the frames that are measured
_TEXT_SIDE = 960
_PAIRS = 8  # of frames, spread over the clip
_PAIR_SECONDS = (
    1 / 8
)  # between its two frames: the rate of CogVideoX; film that repeats each frame is not a slide show
_HASHED = 4
_RATED = 3
# Raise the number whenever the measures or their frames change.
_CACHE_VERSION = 1


@dataclass(frozen=True)
class Measures:
    """What is measured besides the scores that need no model."""

    text: bool = False
    aesthetic_model: Path | None = None


@dataclass(frozen=True)
class UsedFrames:
    """The frames of a file that are a clip."""

    path: Path
    info: VideoInfo
    start: int  # the frame of the file that `info` begins with
    first: int  # the first one used
    count: int

    def times(self, places: np.ndarray) -> np.ndarray:
        """Return when frames are shown, in seconds; their places count from `first`. All are 0 at an unknown rate."""
        if self.info.frame_times is not None:
            return np.array(self.info.frame_times)[self.first - self.start + places] / 1_000_000
        return places / self.info.fps if self.info.fps > 0 else np.zeros(len(places))

    def spread(self, number: int) -> list[int]:
        """Return the frames of the file in the middles of `number` equal parts of the clip; they may repeat."""
        middles = (np.arange(number) + 0.5) * self.count / number
        return (self.first + middles.astype(int)).tolist()

    def read(self, indices: Sequence[int], longer_side: int) -> np.ndarray:
        """Read frames of the file, uint8 [F, H, W, 3]."""
        return read_frames(self.path, indices, seekable=self.info.seekable, longer_side=longer_side)


def score_clips(
    samples: Sequence[ClipSample], wanted: Measures, skip: tuple[int, int], num_workers: int
) -> list[dict[str, Any] | str]:
    """Return the scores of each clip by name, and its hashes; or why it cannot be scored.

    Scores are stored in the cache of `default_cache_folder` as soon as they are known, so that neither a killed run
    nor an unchanged clip is scored again.

    Args:
        samples: one for each clip, with the first usable frame.
        skip: frames at the start and end of each video that do not belong to the clip.
        num_workers: processes; with 1, this one.
    """
    work = partial(score_clip, wanted=wanted, skip=skip)
    show = partial(tqdm, desc="Scoring clips", total=len(samples), unit=" clips", delay=0)
    if num_workers == 1:
        return list(show(map(work, samples)))
    try:
        with worker_processes(num_workers) as pool:
            futures = [pool.submit(work, sample) for sample in samples]
            for _ in show(as_completed(futures)):
                pass
            return [future.result() for future in futures]
    except BrokenProcessPool as error:
        running = [
            sample.clip.video
            for sample, future in zip(samples, futures, strict=True)
            if isinstance(future.exception(), BrokenProcessPool)
        ][:num_workers]
        title = "a process died while it scored one of these clips; finished ones are kept. If its decoder crashes"
        title += " on the clip, convert it or remove it; if memory ran out, lower --num_workers:"
        raise UserError(listing(title, running)) from error


def score_clip(sample: ClipSample, wanted: Measures, skip: tuple[int, int]) -> dict[str, Any] | str:
    """Return the scores of a clip by name, and its hashes; or why it cannot be decoded."""
    count = 1 if sample.info.is_image else sample.info.num_frames - sum(skip)
    clip = UsedFrames(sample.clip.video, sample.info, sample.clip.start_frame, sample.frame_indices[0], count)
    measured: dict[str, Callable[[UsedFrames], dict[str, Any]]] = {"scores": measure_pictures}
    if wanted.text:
        measured["text"] = measure_text
    if wanted.aesthetic_model is not None:
        measured[f"aesthetic {_digest(wanted.aesthetic_model)}"] = partial(measure_rating, wanted.aesthetic_model)
    known, scores = _cache(default_cache_folder()), {}
    try:
        for kind, measure in measured.items():
            fact = f"{kind} {_CACHE_VERSION} {clip.first}+{count}"
            scores |= known.find(clip.path, fact, lambda _, measure=measure: measure(clip))
    except ValueError as error:
        return str(error).removeprefix(f"{clip.path}: ")
    return scores


def measure_pictures(clip: UsedFrames) -> dict[str, Any]:
    """Return the scores that need no model; those of motion are None for a single frame or an unknown rate."""
    gap = min(max(round(clip.info.fps * _PAIR_SECONDS), 1), clip.count - 1)
    places = np.linspace(0, clip.count - 1 - gap, _PAIRS).round().astype(int)
    pairs = (clip.first + np.concatenate([places, places + gap])).tolist()
    frames = clip.read([*pairs, *clip.spread(_HASHED)], FRAME_SIDE)
    before, after = np.split(measures.to_luma(frames[: len(pairs)]), 2)
    seconds = clip.times(places + gap) - clip.times(places)
    return {
        "motion": measures.motion(before, after, seconds) if all(seconds > 0) else None,
        "still": measures.still(before, after) if gap else None,
        "sharpness": measures.sharpness(before),
        "exposure": measures.exposure(before),
        "clipping": measures.clipping(before),
        "black": measures.black(before),
        "hashes": [measures.perceptual_hash(frame) for frame in frames[len(pairs) :]],
    }


def measure_text(clip: UsedFrames) -> dict[str, Any]:
    """Return the share of text."""
    side = min(_TEXT_SIDE, max(clip.info.height, clip.info.width))
    return {"text": text_share(clip.read(clip.spread(_RATED), side))}


def measure_rating(model: Path, clip: UsedFrames) -> dict[str, Any]:
    """Return the rating by the user's model."""
    return {"aesthetic": aesthetic(clip.read(clip.spread(_RATED), FRAME_SIDE), model)}


@cache
def _cache(folder: Path) -> FileCache:
    return FileCache(folder)


@cache
def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]
