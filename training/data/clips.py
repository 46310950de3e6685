"""Clips, and the choice of frames and bucket for each before anything is decoded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from data.buckets import Bucket, assign_bucket
from data.folder import describe_folder
from video.controls import check_companion
from video.frames import choose_samples
from video.probe import VideoInfo


@dataclass(frozen=True, slots=True)
class Clip:
    """A video or still image with its caption."""

    video: Path
    caption: str  # with the id token in front
    source: str  # where it is listed, for messages: "videos.txt:3"
    image: Path | None = None  # the first frame that image-to-video conditions on; None for the video's own
    repeats: float = 1.0  # times per epoch; 2.5 means twice in every epoch and a third time in half of them
    metadata: Mapping[str, str] = field(default_factory=dict)  # the table's other columns
    # The part of the file that is the clip: its first frame, and the one after its last (None: up to the end).
    start_frame: int = 0
    end_frame: int | None = None
    control: Path | None = None  # the video that control-to-video follows, if it is not computed
    regularization: bool = False  # what the model should keep doing, drawn in batches of its own
    captions: tuple[str, ...] = ()  # all, if it has several: they take turns
    caption_dropout: float | None = None  # probability of no caption; None: that of the flag
    mask: Path | None = None  # a video or a still image, white where the loss counts


@dataclass(frozen=True, slots=True)
class BadClip:
    """A clip that cannot be used, with the reason."""

    what: str  # its path as far as known
    source: str
    reason: str
    info: VideoInfo | None = field(default=None, compare=False, repr=False)  # if only the flags make it unusable

    def __str__(self) -> str:
        return f"{self.what} ({self.source}): {self.reason}"


@dataclass(frozen=True, slots=True)
class ClipSample:
    """A sample: chosen frames of a clip, and their bucket."""

    clip: Clip
    info: VideoInfo  # of the clip, which may be a part of its file
    bucket: Bucket
    frame_indices: tuple[int, ...]  # of the file
    part: int = 0  # index among the samples of a clip that is split
    first_frame: VideoInfo | None = None  # probe result of clip.image, for image-to-video
    num_held: int = 0  # frames at the end that repeat the last one to fill the bucket
    control: VideoInfo | None = None  # probe result of clip.control
    caption_number: int = 0  # of its clip's captions
    mask: VideoInfo | None = None  # probe result of clip.mask

    @property
    def shown_fps(self) -> float | None:
        """The frames per second of the chosen frames without held ones; None if unknown."""
        indices, info = self.frame_indices[: len(self.frame_indices) - self.num_held], self.info
        first, last = (index - self.clip.start_frame for index in (indices[0], indices[-1]))
        if info.frame_times is not None:
            seconds = (info.frame_times[last] - info.frame_times[first]) / 1_000_000
        else:
            seconds = (last - first) / info.fps if info.fps > 0 else 0
        return (len(indices) - 1) / seconds if seconds > 0 else None


def plan_clips(
    clips: Sequence[Clip],
    infos: Mapping[Path, VideoInfo | str],
    buckets: Sequence[Bucket],
    *,
    skip_start: int = 0,
    skip_end: int = 0,
    fps: float | None = None,
    long_clips: str = "spread",
    hold_last_frame: bool = False,
    with_images: bool = False,
    needs_masks: bool = False,
) -> tuple[list[ClipSample], list[BadClip]]:
    """Choose frames and bucket of every clip, or say why it cannot be used; both in the order of `clips`.

    Args:
        infos: probe results of every video, control and mask, and of every image if `with_images`, as from
            `probe_files`; a str is the reason why a file cannot be used.
        buckets: as from `make_buckets`.
        skip_start, skip_end: frames to skip at either end of each video.
        fps: frames per second to sample at; None keeps all frames of a clip.
        long_clips: one of `frames.LONG_CLIPS`.
        hold_last_frame: repeat the last frame of videos that are too short.
        with_images: require the images that clips name; otherwise images are not read.
        needs_masks: require a mask for every clip.
    """
    choose = partial(choose_samples, skip_start=skip_start, skip_end=skip_end, fps=fps, long_clips=long_clips)
    frame_counts = sorted({bucket.num_frames for bucket in buckets})

    # Clips of equal timing share one tuple of frame numbers, which saves time and memory for a million clips.
    @cache
    def samples_of(timing: VideoInfo) -> tuple[list[tuple[int, ...]], int]:
        """Return the samples of a clip, and how many frames at the end of its only sample repeat the last one."""
        try:
            return choose(timing, frame_counts), 0
        except ValueError:
            if not hold_last_frame:
                raise
        (sample,) = choose(timing, frame_counts, hold_last_frame=True)
        # Frames also repeat where fps is above the clip's rate, so equal frame numbers cannot be counted instead.
        try:
            num_shown = len(choose(timing, range(1, len(sample)))[0])
        except ValueError:  # 1 is a count for videos only if there is no other
            num_shown = 1
        return [sample], len(sample) - num_shown

    @cache
    def bucket_of(num_frames: int, height: int, width: int) -> Bucket:
        return assign_bucket(num_frames, height, width, buckets)

    planned, bad = [], []
    for clip in clips:
        readable = None
        try:
            info = _found(infos, clip.video)
            has_image = with_images and clip.image is not None
            first_frame = _found(infos, clip.image, f"its image {clip.image}: ") if has_image else None
            control = _companion("control", clip.control, infos, info)
            mask = _companion("mask", clip.mask, infos, info)
            if needs_masks and mask is None:
                raise ValueError("has no mask")
            if clip.start_frame or clip.end_frame is not None:
                info = info.part(clip.start_frame, clip.end_frame)
            readable = info
            # Only what the choice of frames depends on.
            timing = replace(info, height=0, width=0, rotation=0, seekable=False, sha256="", corrections=())
            samples, num_held = samples_of(timing)
        except ValueError as reason:
            bad.append(BadClip(str(clip.video), clip.source, str(reason), readable))
            continue
        for part, indices in enumerate(samples):
            bucket = bucket_of(len(indices), info.height, info.width)
            if clip.start_frame:
                indices = tuple(clip.start_frame + index for index in indices)
            planned.append(ClipSample(clip, info, bucket, indices, part, first_frame, num_held, control, mask=mask))
    return planned, bad


def with_each_caption(samples: Iterable[ClipSample]) -> Iterator[ClipSample]:
    """Yield a sample for each caption of a clip that has several; together, they come as often as the clip."""
    clips: dict[int, list[Clip]] = {}  # the samples of a clip still share it
    for sample in samples:
        clip, captions = sample.clip, sample.clip.captions
        if not captions:
            yield sample
            continue
        if id(clip) not in clips:
            times = clip.repeats / len(captions)
            clips[id(clip)] = [replace(clip, caption=caption, repeats=times) for caption in captions]
        for number, with_caption in enumerate(clips[id(clip)]):
            yield replace(sample, clip=with_caption, caption_number=number)


def _companion(
    kind: str, file: Path | None, infos: Mapping[Path, VideoInfo | str], clip: VideoInfo
) -> VideoInfo | None:
    """Return the probe result of a control or a mask that fits its clip; None without one."""
    if file is None:
        return None
    where = f"its {kind} {file}: "
    own = _found(infos, file, where)
    check_companion(own, clip, where, may_be_still=kind == "mask")
    return own


def _found(infos: Mapping[Path, VideoInfo | str], file: Path, where: str = "") -> VideoInfo:
    info = infos[file]
    if isinstance(info, str):
        raise ValueError(f"{where}{describe_folder(file) or info}")
    return info
