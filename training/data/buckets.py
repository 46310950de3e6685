"""Buckets: the sizes (frames, height, width) that clips are resized to."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np


class Bucket(NamedTuple):
    """The size of all clips in a batch."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the VAE's latents: 4k frames become k latent frames, 4k + 1 become k + 1."""
        return (self.num_frames + 3) // 4, self.height // 8, self.width // 8


@dataclass(frozen=True, eq=False)
class BucketColumn(Sequence):
    """The bucket of each of many samples, without an object per sample."""

    kinds: Sequence[Bucket]  # sorted, each once
    codes: np.ndarray  # [N]: sample i is of kinds[codes[i]]

    @classmethod
    def of(cls, buckets: Sequence[Bucket]) -> "BucketColumn":
        """Return the column of a list."""
        if isinstance(buckets, cls):
            return buckets
        kinds = sorted(set(buckets))
        code_of = {bucket: code for code, bucket in enumerate(kinds)}
        return cls(kinds, np.fromiter(map(code_of.__getitem__, buckets), np.int32, len(buckets)))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Bucket:
        return self.kinds[self.codes[index]]

    @property
    def counts(self) -> dict[Bucket, int]:
        """The number of samples of each bucket that has any, in the buckets' order."""
        counts = np.bincount(self.codes, minlength=len(self.kinds)).tolist()
        return {bucket: count for bucket, count in zip(self.kinds, counts, strict=True) if count}


def make_buckets(
    frame_buckets: Iterable[int], height_buckets: Iterable[int], width_buckets: Iterable[int]
) -> list[Bucket]:
    """Combine the sizes to buckets, sorted and without repeats."""
    return sorted({Bucket(*size) for size in product(frame_buckets, height_buckets, width_buckets)})


def assign_bucket(num_frames: int, height: int, width: int, buckets: Iterable[Bucket]) -> Bucket:
    """Choose the bucket of a sample among those with the same number of frames.

    Buckets that need no upscaling come first, then the nearest aspect ratio, |log(w/h) - log(w'/h')|, then the nearest
    area, then the smallest height. The order of `buckets` does not matter.
    """
    sizes = [bucket for bucket in buckets if bucket.num_frames == num_frames]
    sizes = [bucket for bucket in sizes if bucket.height <= height and bucket.width <= width] or sizes

    def aspect_distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.width * height) - math.log(bucket.height * width))

    # 1e-9: equal ratios (480x720, 512x768) differ in the last bits of their logarithms.
    nearest = min(map(aspect_distance, sizes)) + 1e-9
    return min(
        (bucket for bucket in sizes if aspect_distance(bucket) <= nearest),
        key=lambda bucket: (abs(bucket.height * bucket.width - height * width), bucket),
    )


def is_upscaled(height: int, width: int, bucket: Bucket) -> bool:
    """Return whether a picture is smaller than its bucket."""
    return bucket.height > height or bucket.width > width


def cropped_share(height: int, width: int, bucket: Bucket) -> float:
    """Return the share of a picture that is outside its bucket's aspect ratio."""
    ratio = (width * bucket.height) / (height * bucket.width)
    return 1 - min(ratio, 1 / ratio)


def native_size(config: Mapping[str, Any]) -> Bucket:
    """Return the size of the videos that a transformer of this config was trained on."""
    height, width = 8 * config["sample_height"], 8 * config["sample_width"]
    if config.get("patch_size_t") is not None:
        # Published configs of CogVideoX 1.5 have the 300x300 latents of the position table.
        height, width = min(height, 768), min(width, 1360)
    return Bucket(config["sample_frames"], height, width)


def native_fps(config: Mapping[str, Any]) -> int:
    """Return the frame rate of the model's training videos: 16 for CogVideoX 1.5, which has patches in time."""
    return 8 if config.get("patch_size_t") is None else 16


def largest_sides(config: Mapping[str, Any]) -> tuple[float, float]:
    """Return the largest height and width: those of CogVideoX 1.5's table of positions; infinite for other models."""
    if config.get("patch_size_t") is None:
        return math.inf, math.inf
    patch = config["patch_size"]
    return config["sample_height"] // patch * patch * 8, config["sample_width"] // patch * patch * 8


def count_tokens(config: Mapping[str, Any], bucket: Bucket) -> int:
    """Count the tokens of a sample for a transformer of this config: text, and patches of the video's latents."""
    frames, height, width = bucket.latent_shape
    patch, patch_frames = config["patch_size"], config["patch_size_t"] or 1
    video = -(-frames // patch_frames) * (height // patch) * (width // patch)  # padded as by `pad_latent_frames`
    return config["max_text_seq_length"] + video
