"""The samples of a run, raw or prepared, as planned from metadata alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.text_files import digest_lines
from data.buckets import BucketColumn
from data.clips import BadClip, ClipSample


if TYPE_CHECKING:
    from prepared.index import PreparedIndex


@dataclass(frozen=True)
class RawData:
    """Clips to decode, and clips that cannot be used."""

    clips: Sequence[ClipSample]
    bad: Sequence[BadClip] = ()
    dropped: Sequence[BadClip] = ()  # by --keep, which is no reason to stop
    held_out: "RawData | None" = None  # clips whose loss is measured, not trained on
    held_out_fraction: float = 0.0  # that was held out of the training data, if some is
    held_out_note: str = ""  # which clips are held out of the training data, or why none is

    blocks = None  # each clip is a file of its own

    @cached_property
    def buckets(self) -> BucketColumn:
        """The bucket of each clip."""
        return BucketColumn.of([planned.bucket for planned in self.clips])

    @property
    def repeats(self) -> list[float]:
        """How often each clip is drawn in an epoch."""
        return [planned.clip.repeats for planned in self.clips]

    @cached_property
    def regularization(self) -> np.ndarray | None:
        """Which samples are for regularization, `[N]`; None if none of them is."""
        flags = np.array([planned.clip.regularization for planned in self.clips], bool)
        return flags if flags.any() else None

    @property
    def num_captions(self) -> np.ndarray | None:
        """How many samples next to each other are the captions of one clip, `[N]`; None for one each."""
        counts = np.array([len(planned.clip.captions) or 1 for planned in self.clips], np.int32)
        return counts if (counts > 1).any() else None

    @property
    def own_dropouts(self) -> list[float | None]:
        """The probability of no caption of each sample; None: that of the flag."""
        return [planned.clip.caption_dropout for planned in self.clips]

    @property
    def captions(self) -> list[str]:
        """The captions to embed."""
        return [planned.clip.caption for planned in self.clips]

    @cached_property
    def fingerprint(self) -> str:
        """A description that changes with the content of the samples, not with their paths."""
        facts = (
            (
                planned.info.content,
                planned.first_frame and planned.first_frame.content,
                planned.frame_indices,
                planned.bucket,
                planned.clip.caption,
                planned.clip.repeats,
                *([planned.control.content] if planned.control else []),
                *(["mask", planned.mask.content] if planned.mask else []),
                *(("regularization",) if planned.clip.regularization else ()),
            )
            for planned in self.clips
        )
        return _describe_samples(len(self.clips), map(repr, facts))

    @property
    def num_listed(self) -> int:
        """The number of listed clips, unusable and dropped ones included; a split clip counts once."""
        listed = {id(planned.clip) for planned in self.clips if planned.caption_number == 0}
        return len(listed) + len(self.bad) + len(self.dropped)

    @property
    def trained(self) -> "RawData":
        """The data without the samples for regularization."""
        if self.regularization is None:
            return self
        return replace(self, clips=[planned for planned in self.clips if not planned.clip.regularization])

    def take(self, samples: Sequence[int]) -> "RawData":
        """Return only some samples, to train on each of them once per epoch."""
        plain = {"repeats": 1.0, "regularization": False, "captions": ()}
        taken = [self.clips[sample] for sample in samples]
        return replace(self, clips=[replace(one, clip=replace(one.clip, **plain)) for one in taken])


@dataclass(frozen=True)
class PreparedData:
    """Prepared samples."""

    clips: "PreparedIndex"
    folders: Sequence[Path]  # of the samples
    held_out: "TrainingData | None" = None  # clips whose loss is measured, not trained on
    held_out_fraction: float = 0.0  # that was held out of the training data, if some is
    held_out_note: str = ""  # which clips are held out of the training data, or why none is

    captions = ()  # already embedded

    @cached_property
    def blocks(self) -> np.ndarray | None:
        """Which samples are drawn together, `[N]`, so that few files of a store are needed at a time; None for any."""
        from planning.blocks import blocks_of  # imports pyarrow

        blocks = blocks_of(self.clips)
        return None if blocks is None else self.clips.without_omitted(blocks)

    @cached_property
    def fingerprint(self) -> str:
        """A description that changes with the content of the samples, not with their paths."""
        return _describe_samples(len(self.clips), self.clips.describe())

    @property
    def buckets(self) -> BucketColumn:
        """The bucket of each sample."""
        return self.clips.buckets

    @property
    def repeats(self) -> np.ndarray:
        """How often each sample is drawn in an epoch, `[N]`."""
        return self.clips.repeats

    @property
    def regularization(self) -> np.ndarray | None:
        """Which samples are for regularization, `[N]`; None if none of them is."""
        return self.clips.regularization

    @property
    def num_captions(self) -> np.ndarray | None:
        """How many samples next to each other are the captions of one clip, `[N]`; None for one each."""
        return self.clips.num_captions

    @property
    def own_dropouts(self) -> list[float | None]:
        """The probability of no caption of each sample; None: that of the flag."""
        folders = self.clips.folders
        if all(folder.caption_dropout is None for folder in folders):  # most data, which may have a million samples
            return []
        own = np.array([folder.caption_dropout for folder in folders], object)
        return self.clips.without_omitted(np.repeat(own, [folder.table.num_rows for folder in folders])).tolist()

    @property
    def trained(self) -> "PreparedData":
        """The data without the samples for regularization."""
        if self.regularization is None:
            return self
        clips = self.clips.without_regularization()
        return replace(self, clips=clips, folders=list(dict.fromkeys(folder.folder for folder in clips.folders)))

    def take(self, samples: Sequence[int]) -> "PreparedData":
        """Return only some samples, to train on each of them once per epoch."""
        return replace(self, clips=self.clips.take(samples))


TrainingData = RawData | PreparedData


def caption_dropouts(data: TrainingData, default: float) -> np.ndarray | None:
    """Return the probability of no caption of each sample, `[N]`; None if it is the default for all."""
    own = data.own_dropouts
    if all(one is None for one in own):
        return None
    return np.array([default if one is None else one for one in own], np.float32)


def _describe_samples(count: int, lines: Iterable[str]) -> str:
    return f"{count} samples ({digest_lines(lines)})"
