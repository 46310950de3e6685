"""What a run will see, settled from flags and files before anything heavy is imported or any model is loaded."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from buckets import Bucket, make_buckets
from clips import PlannedClip, describe_plan, load_clips, plan_clips
from errors import UserError
from prepared import PreparedClip, read_index
from video import probe_videos


@dataclass(frozen=True)
class TrainingData:
    """The clips of a run: raw ones with their plan, or prepared ones."""

    clips: Sequence[PlannedClip] | Sequence[PreparedClip]
    prepared: bool

    @property
    def buckets(self) -> list[Bucket]:
        """The bucket of each clip."""
        return [clip.bucket for clip in self.clips]

    @property
    def captions(self) -> list[str]:
        """The captions still to be embedded: none of prepared clips."""
        return [] if self.prepared else [planned.clip.caption for planned in self.clips]


def plan_training_data(args: argparse.Namespace) -> TrainingData:
    """Find the clips that the training flags name.

    Raises:
        UserError: files are missing or unusable; all of them are listed.
    """
    if args.load_tensors:
        return TrainingData(read_index(Path(args.data_root)), prepared=True)
    return TrainingData(plan_raw_clips(args), prepared=False)


def plan_raw_clips(args: argparse.Namespace) -> list[PlannedClip]:
    """List, probe and bucket the clips, by the data flags that training and preparation share.

    Raises:
        UserError: files are missing or unusable, or clips too short; all of them are listed.
    """
    clips = load_clips(
        Path(args.data_root),
        dataset_file=Path(args.dataset_file) if args.dataset_file else None,
        video_column=args.video_column,
        caption_column=args.caption_column,
        id_token=args.id_token,
    )
    try:
        buckets = make_buckets(args.frame_buckets, args.height_buckets, args.width_buckets, args.max_num_frames)
    except ValueError as error:
        raise UserError(f"--frame_buckets: {error}") from error
    infos = probe_videos([clip.video for clip in clips])
    return plan_clips(
        clips,
        infos,
        buckets,
        skip_start=args.skip_frames_start,
        skip_end=args.skip_frames_end,
        fps=args.fps,
    )


def describe(data: TrainingData) -> str:
    """The plan as a table for the log."""
    if not data.prepared:
        return describe_plan(data.clips)
    counts = {bucket: data.buckets.count(bucket) for bucket in sorted(set(data.buckets))}
    return "\n".join(f"{bucket}: {count} prepared clips" for bucket, count in counts.items())
