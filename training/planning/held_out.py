"""Which clips of the training data are held out (`--validation_fraction`), chosen by their content."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.ranks import launch_size
from common.run_folder import STATE_FILE, list_checkpoints
from data.buckets import count_tokens
from data.clips import ClipSample
from data.sampler import BucketBatchSampler
from data.token_budget import TokenBudget
from flags.settings import TrainingSettings
from planning.describe import read_config
from planning.samples import RawData, TrainingData
from prepared.folder import content_digest, sample_digest, sample_digests


if TYPE_CHECKING:
    import pyarrow as pa

    from prepared.index import PreparedIndex

SHARE = 0.03  # of the forward and backward work of a run that the loss of held-out clips takes at most
FEWEST_PASSES = 3  # forward passes of a measurement: few, middle and much noise
FRACTION_FLAG = "--validation_fraction"
MOST_CLIPS = 8  # more would cost data, and passes that other steps can use

_FEWEST_CLIPS = 10  # of which one is held out if nobody asked for it
_FEWEST_ASKED = 2  # if the flag is set


def hold_out(data: TrainingData, settings: TrainingSettings) -> TrainingData:
    """Hold out a fraction of the clips, with all their samples and copies; of each, one sample is measured."""
    fraction, is_asked = fraction_to_hold_out(settings)
    if not fraction:
        return data
    is_raw = isinstance(data, RawData)
    clips, ranks = _clips_of(data)
    candidates = find_candidates(clips, data.regularization)
    num_clips, num_samples = len(candidates), float(np.sum(data.repeats))
    trained = count_trained(settings, num_samples, _samples_per_batch(data, settings))
    if reason := why_none(num_clips, trained, is_asked=is_asked):
        return replace(data, held_out_note=f"no clip is held out for a validation loss: {reason}")
    chosen = choose_clips(clips, ranks, candidates, fraction)
    left = np.concatenate(chosen)
    # Parts of a clip follow one another.
    held_out = data.take([int(rows[0]) for rows in chosen])
    names = names_of(held_out)
    more = f" with {len(left)} samples" if len(left) > len(chosen) else ""
    note = f"{len(chosen)} of {num_clips} clips{more} held out for the validation loss: {', '.join(names)}"
    if round(fraction * num_clips) > len(chosen):
        note += f" ({FRACTION_FLAG} {fraction:g} would be more, but at most {MOST_CLIPS} are held out, and never all)"
    if is_raw:
        gone = set(left.tolist())
        clips = [planned for number, planned in enumerate(data.clips) if number not in gone]
    else:
        clips = data.clips.omit(left)
    return replace(data, clips=clips, held_out=held_out, held_out_fraction=fraction, held_out_note=note)


def contents_of(data: TrainingData) -> np.ndarray:
    """Return a number for the content of each sample, from 0, `[N]`, which copies of a clip share."""
    if isinstance(data, RawData):
        return _clips_of(data)[0]
    import pyarrow as pa
    from pyarrow import compute

    from prepared.index import IDENTITY

    text, tables, places = pa.large_string(), [], {}
    for folder in data.clips.folders:
        table = folder.mapped_again(IDENTITY)
        place = places.setdefault(os.path.realpath(folder.folder), f"/{len(places)}")
        own = compute.binary_join_element_wise(table["name"], pa.scalar(place, text), pa.scalar("", text))
        digests = compute.coalesce(sample_digests(table["name"]), own)
        tables.append(pa.table({"digest": digests, "content": compute.coalesce(table["content"], digests)}))
    return join_copies(*(_codes(column)[0] for column in pa.concat_tables(tables).columns))


def _clips_of(data: TrainingData) -> tuple[np.ndarray, np.ndarray]:
    """Return the clip of each sample, from 0, and a number for its content, each `[N]`."""
    if isinstance(data, RawData):
        return clips_of_contents([planned.info.sha256 or str(planned.clip.video) for planned in data.clips])
    return clips_of_prepared(data.clips)


def names_of(data: TrainingData) -> list[str]:
    is_raw = isinstance(data, RawData)
    return [f"{one.clip.video.name} ({one.clip.source})" if is_raw else one.name for one in data.clips]


def _samples_per_batch(data: TrainingData, settings: TrainingSettings) -> float:
    """Return how many samples a batch has on average, as far as that is known before the model is read."""
    tokens = settings.training.max_tokens_per_batch
    if tokens is None:
        return settings.training.train_batch_size
    try:
        config = {"patch_size_t": None, **read_config(settings, settings.model.pretrained_model_name_or_path)}
        sampler = BucketBatchSampler.of(data, TokenBudget(tokens, partial(count_tokens, config)), seed=0)
        return sum(sampler.samples_per_epoch.values()) / sampler.num_batches
    except (OSError, ValueError, KeyError):  # an error of its own
        return 1


def fraction_to_hold_out(settings: TrainingSettings) -> tuple[float, bool]:
    """Return the fraction of the clips to hold out, and whether it was asked for: by the flag, or by the run so far.

    A resumed run goes on as it began; checkpoints of older versions are of runs that held out nothing.
    """
    fraction, resumed = settings.validation.validation_fraction, settings.checkpoints.resume_from_checkpoint
    if resumed is None or "validation_fraction" in settings.given or settings.validation.validation_dataset_file:
        return fraction, "validation_fraction" in settings.given
    checkpoints = list_checkpoints(Path(settings.training.output_dir))
    folder = Path(resumed) if resumed != "latest" else checkpoints[-1][1] if checkpoints else None
    if folder is None:
        return fraction, False
    try:
        before = json.loads((folder / STATE_FILE).read_bytes())["settings"].get(FRACTION_FLAG)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # refused when it is read
        return 0.0, False
    return float(before or 0), True


def fewest_samples(num_ranks: int) -> int:
    """Return how many samples a run must train on for two measurements to take at most `SHARE` of its work.

    A training step on a sample takes at least as much as two forward passes.
    """
    return math.ceil(2 * math.ceil(FEWEST_PASSES / num_ranks) * num_ranks / (2 * SHARE))


def count_trained(settings: TrainingSettings, samples_per_epoch: float, samples_per_batch: float) -> float:
    """Return about how many samples a run trains on, over all ranks; a batch is that of one rank."""
    training = settings.training
    if training.max_train_steps is None:
        return training.num_train_epochs * samples_per_epoch
    num_ranks = launch_size() // settings.speed.context_parallel_size
    return training.max_train_steps * samples_per_batch * training.gradient_accumulation_steps * num_ranks


def why_none(num_clips: int, trained: float, *, is_asked: bool) -> str | None:
    """Return why no clip is held out, or None if some are; `trained` as from `count_trained`."""
    fewest = _FEWEST_ASKED if is_asked else _FEWEST_CLIPS
    if num_clips < fewest:
        hint = "" if is_asked or num_clips < _FEWEST_ASKED else f" ({FRACTION_FLAG} 0.1 holds out one)"
        return f"there are fewer than {fewest} different clips{hint}"
    needed = fewest_samples(launch_size())
    if not is_asked and trained < needed:
        return f"a run of fewer than {needed} samples is too short to measure their loss"
    return None


def find_candidates(clips: np.ndarray, regularization: np.ndarray | None) -> np.ndarray:
    """Return the clips that may be held out: those without a sample for regularization.

    Args:
        clips: the clip of each sample, from 0, `[N]`.
        regularization: whether a sample is for regularization, `[N]`; None if none of them is.
    """
    everything = np.unique(clips)
    return everything if regularization is None else np.setdiff1d(everything, clips[regularization])


def choose_clips(clips: np.ndarray, ranks: np.ndarray, candidates: np.ndarray, fraction: float) -> list[np.ndarray]:
    """Return the samples of each clip to hold out: those of the lowest rank, so that new clips replace few.

    Args:
        clips: the clip of each sample, from 0, `[N]`.
        ranks: a number for the content of each sample, uniformly distributed, `[N]`.
        candidates: clips to choose from.
    """
    lowest = np.full(clips.max() + 1, np.iinfo(ranks.dtype).max, ranks.dtype)
    np.minimum.at(lowest, clips, ranks)
    count = min(MOST_CLIPS, max(1, round(fraction * len(candidates))), len(candidates) - 1)
    chosen = candidates[np.argsort(lowest[candidates], kind="stable")[:count]]
    return [np.flatnonzero(clips == clip) for clip in chosen]


def join_copies(*identities: np.ndarray) -> np.ndarray:
    """Return the clip of each sample, from 0, `[N]`: samples that share a number in any array are of one clip.

    Args:
        identities: numbers from 0, `[N]` each.
    """
    labels = identities[0]
    while True:
        before = labels
        for codes in identities:
            lowest = np.full(codes.max() + 1, len(labels))
            np.minimum.at(lowest, codes, labels)
            labels = lowest[codes]
        if (labels == before).all():
            return np.unique(labels, return_inverse=True)[1]


def rank_contents(contents: Sequence[str]) -> np.ndarray:
    """Return a number for each content, `[N]`, that looks random, but is the same in every run."""
    digests = (hashlib.sha256(content.encode(errors="surrogatepass")).digest()[:8] for content in contents)
    return np.fromiter((int.from_bytes(digest, "big") for digest in digests), np.uint64, len(contents))


def clips_of_contents(contents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the clip of each sample, from 0, and a number for its content, each `[N]`."""
    code_of: dict[str, int] = {}
    codes = (code_of.setdefault(content, len(code_of)) for content in contents)
    clips = np.fromiter(codes, np.int64, len(contents))
    return clips, rank_contents(list(code_of))[clips]


def clips_of_prepared(index: "PreparedIndex") -> tuple[np.ndarray, np.ndarray]:
    """Return the clip of each prepared sample, from 0, and a number for its content, each `[N]`.

    Samples are of one clip if they were listed in one place, if their tensors are equal (preparation ends a name with
    a digest of what these depend on), or if their files are, which indexes of earlier versions do not tell.
    """
    import pyarrow as pa
    from pyarrow import compute

    from prepared.index import IDENTITY

    table = pa.concat_tables([folder.mapped_again(IDENTITY).select(IDENTITY.names) for folder in index.folders])
    listed = compute.binary_join_element_wise(table["clip"], table["source"], pa.scalar("\n", pa.large_string()))
    digests = compute.coalesce(sample_digests(table["name"]), table["name"])
    clips, _ = _codes(compute.coalesce(listed, table["name"]))
    tensors, names = _codes(digests)
    files, _ = _codes(compute.coalesce(table["content"], digests))
    ranks = np.concatenate(
        [rank_contents(names[start : start + 2**14].to_pylist()) for start in range(0, len(names), 2**14)]
    )
    return join_copies(clips, tensors, files), ranks[tensors]


def _codes(column: "pa.ChunkedArray") -> tuple[np.ndarray, "pa.Array"]:
    """Return a number for each value, from 0, `[N]`, and the values by number."""
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if hasattr(encoded, "chunks") else encoded
    return np.from_dlpack(encoded.indices).astype(np.int64), encoded.dictionary


def find_prepared(samples: Sequence[ClipSample], index: "PreparedIndex", reshape_mode: str) -> list[str]:
    """Return the clips of samples that prepared ones were made of: of common frames of a file, or of the same content.

    In indexes of earlier versions, only names of samples without random crops, images or controls tell the content.
    """
    import pyarrow as pa
    from pyarrow import compute

    from prepared.index import ORIGIN

    text = pa.large_string()
    digests = [sample_digest((one.info.content, one.bucket, one.frame_indices, reshape_mode)) for one in samples]
    contents = [content_digest(one.info.sha256) for one in samples]
    wanted = {"digest": digests, "content": contents, "file": [one.clip.video.name for one in samples]}
    found = []
    for table in (folder.mapped_again(ORIGIN) for folder in index.folders):
        table = table.append_column("digest", sample_digests(table["name"]))
        table = table.append_column("file", compute.replace_substring_regex(table["clip"], r"^.*/", ""))
        matches = (compute.is_in(table[name], pa.array(values, text).drop_null()) for name, values in wanted.items())
        found += table.filter(reduce(compute.or_, matches)).to_pylist()
    known = {row[name] for row in found for name in ("digest", "content")} - {None}
    parts = [(os.path.realpath(row["clip"]), row["first_frame"], row["last_frame"]) for row in found if row["clip"]]

    def is_known(one: ClipSample, digest: str, content: str | None) -> bool:
        place, first, last = os.path.realpath(one.clip.video), one.frame_indices[0], one.frame_indices[-1]
        of_file = [part for path, *part in parts if path == place]
        return not known.isdisjoint((digest, content)) or any(
            None in part or (part[0] <= last and first <= part[1]) for part in of_file
        )

    return [str(one[0].clip.video) for one in zip(samples, digests, contents, strict=True) if is_known(*one)]
