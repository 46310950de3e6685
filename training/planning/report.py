"""Show the plan before anything is encoded or trained: a table of buckets with notes, and a CSV file."""

import csv
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median

import numpy as np

from common.files import atomic_write
from data.buckets import Bucket, cropped_share
from data.clips import BadClip, Clip, ClipSample
from data.epochs import Kind
from data.sampler import BucketBatchSampler
from data.token_budget import BatchSize, TokenBudget
from planning.captions import is_refusal
from video.io import SEEK_FROM


_FAR_RATE = 2  # factor from the model's frame rate at which samples teach another kind of motion
_EXAMPLES = 3


@dataclass(frozen=True)
class PlanTable:
    """A plan in words: as text, for the terminal, or in parts, for a page."""

    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()  # one for each bucket
    epoch: str = "there are no samples"
    notes: Sequence[str] = ()  # on unusual samples

    def __str__(self) -> str:
        rows = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows if row]
        return "\n".join([*lines, self.epoch, *self.notes])


def plan_table(
    planned: Sequence[ClipSample],
    *,
    batch_size: int | BatchSize | TokenBudget,
    num_ranks: int = 1,
    tokens_of: Callable[[Bucket], int],
    long_captions: Collection[str] = (),
    unknown_captions: Collection[str] = (),
    max_caption_tokens: int = 226,
    model_fps: float,
    reshape_mode: str = "center",
    id_token: str | None = None,
) -> PlanTable:
    """Return a table with one line per bucket, the length of an epoch, and notes on unusual samples.

    "upscaled" counts samples smaller than their bucket. "cropped" is the median share of the picture that center and
    random crop away; with none it is "squeezed". "clip frames" is the median length of the clips, "unused" the share
    of their frames that is in no sample. "batches" are those of an epoch, over all ranks.

    Args:
        planned: as from `plan_clips`, with the samples of a clip next to each other.
        batch_size: samples in a batch, on one rank.
        long_captions: captions beyond `max_caption_tokens`.
        unknown_captions: captions that the model's tokenizer cannot read.
        reshape_mode: "center", "random" or "none".
        id_token: what captions of regularization samples must not have.
    """
    if not planned:
        return PlanTable()
    repeats = [sample.clip.repeats for sample in planned]
    is_apart = np.array([sample.clip.regularization for sample in planned])
    num_captions = np.array([len(sample.clip.captions) or 1 for sample in planned])
    first = [sample for sample in planned if sample.caption_number == 0]
    trained = [sample for sample in first if not sample.clip.regularization]
    sampler = BucketBatchSampler(
        [sample.bucket for sample in planned],
        batch_size,
        seed=0,
        repeats=repeats,
        regularization=is_apart if is_apart.any() else None,
        num_captions=num_captions,
        world_size=num_ranks,
    )
    ranks = f", {sampler.batches_per_epoch} on each of {num_ranks} ranks" if num_ranks > 1 else ""
    off_aspect = "squeezed" if reshape_mode == "none" else "cropped"
    return PlanTable(
        ("bucket", "samples", "tokens", "upscaled", off_aspect, "clip frames", "unused", "batches"),
        _rows(first, sampler.kinds, tokens_of),
        f"an epoch is {_number(sum(sampler.samples_per_epoch.values()), 'sample')} in "
        f"{_number(sampler.num_batches, 'batch')} of up to {batch_size}{ranks}",
        [
            *([regularization_note(sampler, sum(s.clip.regularization for s in first))] if is_apart.any() else ()),
            *_repeat_notes(trained),
            *_sample_notes(first),
            *_decoding_notes(first),
            *_rate_notes(first, model_fps),
            *_caption_notes(planned, long_captions, unknown_captions, max_caption_tokens, id_token),
            *_duplicate_notes(trained),
        ],
    )


def write_plan(planned: Iterable[ClipSample], bad: Iterable[BadClip], path: Path) -> None:
    """Write the full plan as a CSV file in UTF-8, with a line for every sample, then one for every bad clip.

    first_frame, last_frame: frame numbers in the file, from 0. held: frames that repeat the last one. cropped: share
    of the picture outside the bucket's aspect ratio. upscaled: the factor, if the clip is smaller than its bucket.
    """
    # backslashreplace: a file name need not be UTF-8
    with (
        atomic_write(path) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.DictWriter(file, [*_COLUMNS, "reason"], lineterminator="\n")
        table.writeheader()
        table.writerows({name: value(sample) for name, value in _COLUMNS.items()} for sample in planned)
        table.writerows({"source": clip.source, "video": clip.what, "reason": clip.reason} for clip in bad)


def regularization_note(sampler: BucketBatchSampler, num_samples: int) -> str:
    """Return a line on the regularization samples of an epoch."""
    kind = sampler.kinds[-1]
    return (
        f"{_number(sum(kind.samples_per_epoch.values()), 'sample')} of an epoch are regularization, from "
        f"{num_samples}, in {_number(kind.num_batches, 'batch')} of their own"
    )


def _rows(
    planned: Sequence[ClipSample], kinds: Sequence[Kind], tokens_of: Callable[[Bucket], int]
) -> list[tuple[str, ...]]:
    samples_of: dict[tuple[bool, Bucket], list[ClipSample]] = defaultdict(list)
    for sample in planned:
        samples_of[sample.clip.regularization, sample.bucket].append(sample)
    unused, batches = _unused_shares(planned), [kind.batches_of for kind in kinds]
    return [
        (
            f"{bucket} regularization" if is_apart else str(bucket),
            str(len(samples)),
            str(tokens_of(bucket)),
            str(sum(_upscaling(sample) > 1 for sample in samples)),
            f"{median(map(_off_aspect, samples)):.0%}",
            f"{median(sample.info.num_frames for sample in samples):g}",
            f"{unused[bucket]:.0%}",
            str(batches[is_apart][bucket]),
        )
        for (is_apart, bucket), samples in sorted(samples_of.items())
    ]


def _unused_shares(planned: Sequence[ClipSample]) -> dict[Bucket, float]:
    """Return for each bucket the share of its clips' frames that are in no sample of any bucket."""
    frames, shown = Counter(), Counter()
    for _, of_clip in groupby(planned, key=lambda sample: id(sample.clip)):
        samples = list(of_clip)
        num_shown = len(set().union(*(sample.frame_indices for sample in samples)))
        for bucket in {sample.bucket for sample in samples}:
            frames[bucket] += samples[0].info.num_frames
            shown[bucket] += num_shown
    return {bucket: 1 - shown[bucket] / frames[bucket] for bucket in frames}


def _upscaling(sample: ClipSample) -> float:
    return max(sample.bucket.height / sample.info.height, sample.bucket.width / sample.info.width)


def _off_aspect(sample: ClipSample) -> float:
    return cropped_share(sample.info.height, sample.info.width, sample.bucket)


def _repeat_notes(planned: Sequence[ClipSample]) -> Iterator[str]:
    several = [len(sample.clip.captions) for sample in planned if sample.part == 0 and sample.clip.captions]
    if several:
        numbers = " to ".join(map(str, sorted({min(several), max(several)})))
        yield f"{_number(len(several), 'clip')} with {numbers} captions, which take turns from epoch to epoch"
    counts = Counter(sample.clip.repeats * (len(sample.clip.captions) or 1) for sample in planned)
    if set(counts) == {1}:
        return
    if len(counts) <= _EXAMPLES:
        times = ", ".join(f"{_number(counts[times], 'sample')} {times:g} times" for times in sorted(counts))
    else:
        times = f"every sample {min(counts):g} to {max(counts):g} times"
    yield f"an epoch has {times}"


def _sample_notes(planned: Sequence[ClipSample]) -> Iterator[str]:
    num_split = sum(sample.part == 1 for sample in planned)
    if num_split:
        later = sum(sample.part > 0 for sample in planned)
        yield f"{_number(num_split, 'clip')} split: {num_split + later} samples"
    held = [sample for sample in planned if sample.num_held]
    if held:
        most = max(held, key=lambda sample: sample.num_held / len(sample.frame_indices))
        yield (
            f"{_number(len(held), 'sample')} too short: the last frame is held, for up to {most.num_held} of "
            f"{len(most.frame_indices)} frames ({_name(most.clip)})"
        )


def _decoding_notes(planned: Sequence[ClipSample]) -> Iterator[str]:
    """Say what is slow to decode, and which pictures are changed when they are."""
    slow = [sample for sample in planned if sample.frame_indices[0] >= SEEK_FROM and not sample.info.seekable]
    if slow:
        video = slow[0].clip.video
        yield (
            f"{_number(len(slow), 'sample')} of clips that cannot seek, so that all frames before are decoded too: "
            f"ffmpeg -i {shlex.quote(video.name)} -map 0:v:0 -c copy {shlex.quote(f'{video.stem}-seekable.mp4')} "
            "makes H.264 and HEVC seekable"
        )
    corrected = Counter(correction for sample in planned if sample.part == 0 for correction in sample.info.corrections)
    if corrected:
        counts = ", ".join(f"{_number(count, 'clip')} {correction}" for correction, count in sorted(corrected.items()))
        yield f"corrected when decoded: {counts}"


def _rate_notes(planned: Sequence[ClipSample], model_fps: float) -> Iterator[str]:
    """Say which motion the model will learn from samples whose rate is far from its own."""
    rates = [rate for sample in planned if (rate := sample.shown_fps) is not None]
    fast = [rate for rate in rates if rate > _FAR_RATE * model_fps]
    slow = [rate for rate in rates if rate < model_fps / _FAR_RATE]
    for far, motion in ((fast, "slow"), (slow, "fast")):
        if far:
            rates_shown = " to ".join(dict.fromkeys(f"{rate:.3g}" for rate in (min(far), max(far))))
            times = max(max(far) / model_fps, model_fps / min(far))
            yield (
                f"{_number(len(far), 'sample')} at {rates_shown} frames per second, the model's videos have "
                f"{model_fps:g}: motion will be learned up to {times:.1f}x too {motion}"
            )


def _caption_notes(
    planned: Sequence[ClipSample],
    long_captions: Collection[str],
    unknown_captions: Collection[str],
    tokens: int,
    id_token: str | None,
) -> Iterator[str]:
    """Name captions that are cut, are not learned, or say nothing about their clip."""
    samples = [sample for sample in planned if sample.part == 0]
    clips = [sample.clip for sample in samples]
    videos_of: dict[str, set[str | Path]] = defaultdict(set)
    for sample in samples:
        videos_of[sample.clip.caption].add(sample.info.sha256 or sample.clip.video)

    def is_shared(clip: Clip) -> bool:
        return bool(clip.caption.strip()) and not clip.regularization and len(videos_of[clip.caption]) > 1

    def has_token(clip: Clip) -> bool:
        return clip.regularization and bool(id_token) and id_token in clip.caption

    for is_named, what in (
        (lambda clip: clip.caption in long_captions, f"longer than {tokens} tokens: the rest is cut off"),
        (
            lambda clip: clip.caption in unknown_captions,
            "mostly in a script that the model's tokenizer lacks, so that nothing is learned from the text; write in "
            "English",
        ),
        (has_token, f"for regularization with {id_token} in it, which unlearns it; remove it"),
        (
            lambda clip: is_refusal(clip.caption),
            "in which a model refuses to answer; delete them and caption the clips again",
        ),
        (is_shared, "used for several clips, so that the text does not tell them apart"),
    ):
        named = list(filter(is_named, clips))
        if named:
            names = list(dict.fromkeys(map(_name, named)))  # a clip may have several of these captions
            more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
            count = len({clip.caption for clip in named})
            yield f"{_number(count, 'caption')} {what}: {', '.join(names[:_EXAMPLES])}{more}"


def _duplicate_notes(planned: Sequence[ClipSample]) -> Iterator[str]:
    """Name clips of the same file content, with the same caption or another."""
    clips_of: dict[str, dict[str, list[Clip]]] = defaultdict(lambda: defaultdict(list))  # by content, then by caption
    for sample in planned:
        if sample.info.sha256 and sample.part == 0:
            clips_of[sample.info.sha256][sample.clip.caption].append(sample.clip)
    of_videos = [list(by_caption.values()) for by_caption in clips_of.values()]
    same = [(first, clip) for of_video in of_videos for first, *others in of_video for clip in others]
    other = [(of_video[0][0], of_video[1][0]) for of_video in of_videos if len(of_video) > 1]
    if same:
        yield f"{_number(len(same), 'clip')} listed again with the same caption, which adds weight: {_pairs(same)}"
    if other:
        yield f"{_number(len(other), 'video')} with several captions: {_pairs(other)}"


def _pairs(pairs: Sequence[tuple[Clip, Clip]]) -> str:
    names = [f"{_name(first)} and {_name(second)}" for first, second in pairs[:_EXAMPLES]]
    return "; ".join([*names, f"and {len(pairs) - _EXAMPLES} more"] if len(pairs) > _EXAMPLES else names)


def _name(clip: Clip) -> str:
    return f"{clip.video.name} ({clip.source})"


def _number(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def _short_caption(sample: ClipSample) -> str:
    caption = " ".join(sample.clip.caption.split())
    return caption if len(caption) <= 60 else f"{caption[:59].rstrip()}…"


_COLUMNS: dict[str, Callable[[ClipSample], object]] = {
    "source": lambda sample: sample.clip.source,
    "video": lambda sample: sample.clip.video,
    "caption": _short_caption,
    "frames": lambda sample: sample.info.num_frames,
    "fps": lambda sample: f"{sample.info.fps:g}",
    "height": lambda sample: sample.info.height,
    "width": lambda sample: sample.info.width,
    "corrected": lambda sample: ", ".join(sample.info.corrections),
    "bucket": lambda sample: sample.bucket,
    "part": lambda sample: sample.part,
    "first_frame": lambda sample: sample.frame_indices[0],
    "last_frame": lambda sample: sample.frame_indices[-1],
    "held": lambda sample: sample.num_held,
    "cropped": lambda sample: f"{_off_aspect(sample):.3f}",
    "upscaled": lambda sample: f"{_upscaling(sample):.3g}" if _upscaling(sample) > 1 else "",
}
