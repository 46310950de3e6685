"""Recommend a frame rate, frames and sizes that keep the most clips, as flags to add to a command."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.buckets import (
    Bucket,
    assign_bucket,
    cropped_share,
    is_upscaled,
    largest_sides,
    make_buckets,
    native_fps,
    native_size,
)
from data.clips import BadClip, Clip, ClipSample, plan_clips
from flags.data import ClipFlags
from video.frames import usable_frames
from video.probe import VideoInfo


_FRAME_STEP = 8  # lengths of 8k + 1 frames, at which models are sampled as they were trained, or of 8k
_MOST_OFF_RATE = 1.25  # factor between the rates of sample and model
_MOST_CROPPED = 0.2  # share of the picture; 16:9 in the 3:2 of most models is 16%
_MOST_SIZES = 3
_MOST_TRIED = 12

_Size = tuple[int, int]  # height, width


def recommend(
    infos: Iterable[VideoInfo],
    flags: ClipFlags,
    config: Mapping[str, Any],
    *,
    skip_start: int = 0,
    skip_end: int = 0,
    is_fixed: bool = False,
    frames_rest: int = 1,
    given: Iterable[str] = ("long_clips",),
) -> str | None:
    """Return a line with the flags that keep more clips, at the model's rate and in their shape; None if none do.

    Rate and frames are changed only if more clips can be used, or nearly as many and more of them at the model's rate.
    Sizes are changed only if more clips are then neither upscaled nor cropped by more than a fifth. No sample becomes
    longer than the present flags allow, and none much larger than the model's size or a smaller present one.

    Args:
        infos: probe results of all clips that can be read.
        flags: the present ones.
        config: of the model's transformer.
        is_fixed: the model takes only its own size.
        frames_rest: 0 for a model that is sampled only at 8k frames, otherwise 1.
        given: names of the flags that the user passed.
    """
    clips = _Clips.of(infos, skip_start, skip_end, native_fps(config), frames_rest)
    better = replace(flags, **_better_timing(clips, flags, is_fixed=is_fixed))
    # More clips fit after each round; with the sizes of the last one, the next recommendation is none.
    while not is_fixed and (sizes := _better_sizes(clips.shapes, better, config)):
        better = replace(better, **sizes)
    words = _changed_flags(flags, better, given)
    return f"{_outcome(clips, flags, better)}, add: {' '.join(words)}" if words and clips.score(better) else None


@dataclass(frozen=True)
class _Clips:
    """Clips that can be read, grouped by what the plan depends on."""

    groups: Sequence[tuple[VideoInfo, int]]  # with the number of clips
    skip_start: int
    skip_end: int
    model_fps: int
    frames_rest: int  # of the lengths that the model is sampled at

    @classmethod
    def of(cls, infos: Iterable[VideoInfo], *facts: int) -> "_Clips":
        infos = list(infos)
        keys = [(one.num_frames, one.fps, one.frame_times, one.is_image, one.height, one.width) for one in infos]
        examples, counts = dict(zip(keys, infos, strict=True)), Counter(keys)
        return cls([(examples[key], count) for key, count in counts.items()], *facts)

    @property
    def num_clips(self) -> int:
        return sum(count for _, count in self.groups)

    @property
    def shapes(self) -> Counter[_Size]:
        """The number of clips of each height and width."""
        shapes = Counter()
        for info, count in self.groups:
            shapes[info.height, info.width] += count
        return shapes

    def plan(self, flags: ClipFlags) -> tuple[list[tuple[ClipSample, int]], list[tuple[BadClip, int]]]:
        """Return the first sample of each group that can be used, the others, and the number of clips of each."""
        clips = [Clip(Path(str(number)), "", "") for number in range(len(self.groups))]
        planned, bad = plan_clips(
            clips,
            {clip.video: info for clip, (info, _) in zip(clips, self.groups, strict=True)},
            make_buckets(flags.frame_buckets, flags.height_buckets, flags.width_buckets),
            skip_start=self.skip_start,
            skip_end=self.skip_end,
            fps=flags.fps,
            long_clips=flags.long_clips,
            hold_last_frame=flags.hold_last_frame,
        )
        counts = [count for _, count in self.groups]
        usable = [(sample, counts[int(sample.clip.video.name)]) for sample in planned if sample.part == 0]
        return usable, [(clip, counts[int(clip.what)]) for clip in bad]

    def score(self, flags: ClipFlags) -> int:
        """Return the worth of a choice of frames: 10 for each clip that is used, less 1 if it is not at its rate."""
        usable, _ = self.plan(replace(flags, height_buckets=(16,), width_buckets=(16,)))  # any size will do
        return sum(count * (10 if self._is_at_rate(sample) else 9) for sample, count in usable)

    def _is_at_rate(self, sample: ClipSample) -> bool:
        """Return whether a sample has nearly the model's rate, and no held frames."""
        fps = sample.shown_fps
        factor = 1 if fps is None else fps / self.model_fps
        return not sample.num_held and 1 / _MOST_OFF_RATE <= factor <= _MOST_OFF_RATE


def _better_timing(clips: _Clips, flags: ClipFlags, *, is_fixed: bool) -> dict[str, Any]:
    """Return the frame rate and lengths that use more clips; nothing if the present ones are as good."""
    best, most = {}, clips.score(flags)
    if most == 10 * clips.num_clips:
        return best
    for timing in _timings(clips, flags, is_fixed=is_fixed):
        score = clips.score(replace(flags, **timing))
        if score > most:
            best, most = timing, score
    return best


def _timings(clips: _Clips, flags: ClipFlags, *, is_fixed: bool) -> Iterator[dict[str, Any]]:
    long_clips = "first" if flags.long_clips == "spread" else flags.long_clips
    stills = {1} if any(info.is_image for info, _ in clips.groups) or 1 in flags.frame_buckets else set()
    present = {*flags.frame_buckets, *stills}
    if clips.frames_rest == 0:  # training refuses other lengths, stills too
        stills, present = set(), {count // _FRAME_STEP * _FRAME_STEP for count in present} - {0}
        if not present:
            return
    present = tuple(sorted(present))
    yield {"frame_buckets": present}
    yield {"fps": clips.model_fps, "long_clips": long_clips, "frame_buckets": present}
    if is_fixed:
        # Short clips fill the only length at a higher rate; motion is then learned too slow.
        for fps in range(clips.model_fps + 1, 2 * clips.model_fps + 1):
            yield {"fps": fps, "long_clips": long_clips, "frame_buckets": present}
        return
    if lengths := _lengths(_counts_at_model_rate(clips), present[-1], clips.frames_rest):
        frames = tuple(sorted({*lengths, *stills}))
        yield {"fps": clips.model_fps, "long_clips": long_clips, "frame_buckets": frames}


def _counts_at_model_rate(clips: _Clips) -> Iterator[int]:
    """Yield the number of frames that each video has at the model's rate."""
    for info, _ in clips.groups:
        if not info.is_image and info.fps > 0:
            try:
                yield len(usable_frames(info, clips.skip_start, clips.skip_end, clips.model_fps))
            except ValueError:  # a rate too low to be resampled
                continue


def _lengths(counts: Iterable[int], longest: int, rest: int) -> list[int]:
    """Return a few lengths up to the longest, of 8k + `rest`, so that each clip loses at most a third to its own."""
    lengths = []
    for count in sorted(min(count, longest) for count in counts if count >= min(_FRAME_STEP + rest, longest)):
        if not lengths or count > 1.5 * lengths[-1] or count == longest > lengths[-1]:
            lengths.append(longest if count == longest else (count - rest) // _FRAME_STEP * _FRAME_STEP + rest)
    return lengths


@dataclass(frozen=True)
class _Shapes:
    """Clips by their size, and the pixels that a frame of a sample may have."""

    counts: Counter[_Size]
    most_pixels: int

    def fitting(self, heights: Iterable[int], widths: Iterable[int]) -> dict[_Size, Bucket]:
        """Return the buckets of the clips that are neither upscaled nor much cropped, nor too large to train."""
        buckets = make_buckets([1], heights, widths)
        assigned = {shape: assign_bucket(1, *shape, buckets) for shape in self.counts}
        return {
            shape: bucket
            for shape, bucket in assigned.items()
            if not is_upscaled(*shape, bucket)
            and cropped_share(*shape, bucket) <= _MOST_CROPPED
            and _pixels(bucket) <= 1.1 * self.most_pixels
        }

    def num_fitting(self, heights: Iterable[int], widths: Iterable[int]) -> int:
        return sum(self.counts[shape] for shape in self.fitting(heights, widths))

    def pixels(self, sizes: Sequence[_Size]) -> int:
        """Return the pixels of a frame of all clips that fit these sizes or their combinations."""
        fitting = self.fitting(*zip(*sizes, strict=True)) if sizes else {}
        return sum(self.counts[shape] * _pixels(bucket) for shape, bucket in fitting.items())


def _better_sizes(counts: Counter[_Size], flags: ClipFlags, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that more clips fit; nothing if the present ones are as good."""
    native, listed = native_size(config), make_buckets([1], flags.height_buckets, flags.width_buckets)
    most_pixels = max((p for p in map(_pixels, listed) if p <= _pixels(native)), default=min(map(_pixels, listed)))
    base = _base_size([size for size in listed if _pixels(size) <= most_pixels], native)
    shapes = _Shapes(counts, most_pixels)
    num_fitting = shapes.num_fitting(flags.height_buckets, flags.width_buckets)
    if num_fitting == counts.total():
        return {}
    tried, sizes = _candidate_sizes(shapes, base, largest_sides(config)), []
    while tried and len(sizes) < _MOST_SIZES:
        more = max(([*sizes, size] for size in tried), key=shapes.pixels)
        if shapes.pixels(more) <= shapes.pixels(sizes):
            break
        sizes = more
    if not sizes:
        return {}
    heights, widths = (tuple(sorted(set(sides))) for sides in zip(*sizes, strict=True))
    is_better = shapes.num_fitting(heights, widths) > num_fitting
    return {"height_buckets": heights, "width_buckets": widths} if is_better else {}


def _base_size(listed: Sequence[Bucket], native: Bucket) -> _Size:
    """Return the listed size whose shape is most like the model's, and of these the largest."""
    return min(listed, key=lambda size: (round(cropped_share(*native[1:], size), 2), -_pixels(size)))[1:]


def _candidate_sizes(shapes: _Shapes, base: _Size, largest: tuple[float, float]) -> list[_Size]:
    """Return the base size and its transpose, then the sizes that suit most of the clips."""
    suitable = Counter()
    for (height, width), count in shapes.counts.items():
        sides = min(height, largest[0]), min(width, largest[1])
        aspects = (width / height, base[1] / base[0], base[0] / base[1])
        suitable.update({_size_of(aspect, *sides, shapes.most_pixels): count for aspect in aspects})
    del suitable[None]  # of clips below 16 pixels
    sizes = [size for size in (base, base[::-1]) if size[0] <= largest[0] and size[1] <= largest[1]]
    sizes += [size for size, _ in suitable.most_common(_MOST_TRIED)]
    return [*sizes, *sorted(suitable)[:1]]  # the last one is small enough for the smallest clips


def _size_of(aspect: float, most_height: float, most_width: float, most_pixels: int) -> _Size | None:
    """Return the largest size in steps of 16 within the limits that is at most 5% off the aspect, width by height."""
    sizes = []
    height = 16
    while height <= most_height and 16 * height <= most_pixels:
        width = round(height * aspect / 16) * 16
        off = abs(width / (height * aspect) - 1)
        if 0 < width <= most_width and height * width <= most_pixels and off <= 0.05:
            sizes.append((height * width * (1 - off), height, width))
        height += 16
    return max(sizes)[1:] if sizes else None


def _pixels(bucket: Bucket) -> int:
    return bucket.height * bucket.width


def _changed_flags(flags: ClipFlags, better: ClipFlags, given: Iterable[str]) -> list[str]:
    words = [f"--fps {better.fps:g}"] if better.fps != flags.fps else []
    if better.long_clips != flags.long_clips and "long_clips" in given:  # otherwise it follows from --fps
        words.append(f"--long_clips {better.long_clips}")
    for names in (("frame_buckets",), ("height_buckets", "width_buckets")):
        if any(getattr(flags, name) != getattr(better, name) for name in names):
            words += [f"--{name} {' '.join(map(str, getattr(better, name)))}" for name in names]
    return words


def _outcome(clips: _Clips, flags: ClipFlags, better: ClipFlags) -> str:
    """Say what the better flags do: how many clips are used, at which rate, and how much of their pictures."""
    (present, _), (usable, lost) = clips.plan(flags), clips.plan(better)
    kept = sum(count for _, count in usable)
    everything = "the clip" if kept == 1 else f"all {kept} clips"
    text = f"to keep {f'{kept} of {clips.num_clips} clips' if lost else everything}"
    if better.fps != flags.fps:
        owner = "the model's " if better.fps == clips.model_fps else ""
        text += f" at {owner}{better.fps:g} frames per second"
    if better.height_buckets != flags.height_buckets or better.width_buckets != flags.width_buckets:
        shown = [(one.info.height, one.info.width, one.bucket) for one, _ in usable]
        off_aspect = "squeezed" if flags.video_reshape_mode == "none" else "cropped"
        text += f", {off_aspect} by at most {max(cropped_share(*one) for one in shown):.0%}"
        text += f", {sum(count for one, (_, count) in zip(shown, usable, strict=True) if is_upscaled(*one))} upscaled"
        before, largest = (max((one.bucket for one, _ in plan), key=_pixels) for plan in (present or usable, usable))
        if _pixels(largest) > 1.1 * _pixels(before):  # squares among upright and wide clips
            text += f", in sizes up to {largest.height}x{largest.width}"
    if lost:
        text += f" (the first of the others: {lost[0][0].reason.split(':')[0]})"
    return text
