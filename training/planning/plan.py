"""Plan the samples of a run from flags and files, before anything heavy is imported or any model is loaded."""

import csv
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.bars import tqdm
from common.errors import UserError, listing
from common.files import atomic_write, path_of_script
from common.remote import default_cache_folder, limit_cache, to_path
from common.text_files import digest_lines
from data.buckets import BucketColumn, count_tokens, make_buckets, native_fps
from data.clips import BadClip, Clip, ClipSample, plan_clips, with_each_caption
from data.mix import read_mix, weights_to_repeats
from data.sampler import BucketBatchSampler
from data.sources import DataSource, read_clips
from data.token_budget import BatchSize, TokenBudget
from flags.data import PREPARED_FLAGS, ClipFlags, ControlFlags, MaskFlags, SourceFlags
from flags.settings import PreparationSettings, TrainingSettings
from planning.advice import recommend
from planning.held_out import (
    choose_clips,
    clips_of_contents,
    clips_of_prepared,
    count_trained,
    find_candidates,
    fraction_to_hold_out,
    why_none,
)
from planning.keep import keep_clips
from planning.report import PlanTable, plan_table, regularization_note
from prepared.folder import read_prepared_settings
from video.cache import FileCache
from video.condition_frames import FIRST, fewest_frames, is_context
from video.controls import INPAINT
from video.probe import probe_files


if TYPE_CHECKING:
    from prepared.index import PreparedIndex

SKIPPED_FILE = "skipped_clips.csv"
HELD_OUT_FILE = "held_out_clips.csv"


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


def plan_training_data(settings: TrainingSettings) -> TrainingData:
    """Find the training and held-out clips of the flags; a UserError lists all that are missing or unusable."""
    sources, with_images, control = settings.sources, settings.task == "image-to-video", control_flags(settings)
    extra = regularization_sources(settings, control)
    if settings.prepared.load_tensors:
        data = _read_prepared([*data_sources(sources), *extra])
        if with_images:
            _check_condition_frames(settings.image.condition_frames, data.folders)
    else:
        frames = settings.image.condition_frames
        condition = {
            "with_images": with_images,
            "condition_frames": frames,
            "control": control,
            "masks": settings.masks,
        }
        data = plan_raw_clips(sources, settings.clips, extra, **condition)
        model = settings.model.pretrained_model_name_or_path
        check_bad_clips(data, sources.on_bad_clip, lambda: advise_early(data, settings, model))
    _check_kinds(data, [*data_sources(sources), *extra])
    held_out = plan_validation_clips(settings, with_images=with_images, control=control)
    if isinstance(data, RawData) and held_out is not None:
        # The loss of clips that are also trained on would not show overfitting.
        trained = {planned.info.sha256 for planned in data.clips}
        both = [str(planned.clip.video) for planned in held_out.clips if planned.info.sha256 in trained]
        if both:
            what = f"{len(both)} of its clips are trained on too; remove them from one of the two:"
            raise UserError(listing(f"--validation_dataset_file: {what}", both))
    return hold_out(data, settings) if held_out is None else replace(data, held_out=held_out)


def hold_out(data: TrainingData, settings: TrainingSettings) -> TrainingData:
    """Hold out a fraction of the clips, with all their samples and copies; of each, one sample is measured."""
    fraction, is_asked = fraction_to_hold_out(settings)
    if not fraction:
        return data
    is_raw = isinstance(data, RawData)
    if is_raw:
        clips, ranks = clips_of_contents([planned.info.sha256 or str(planned.clip.video) for planned in data.clips])
    else:
        clips, ranks = clips_of_prepared(data.clips)
    candidates = find_candidates(clips, data.regularization)
    num_clips, trained = len(candidates), count_trained(settings, float(np.sum(data.repeats)))
    if reason := why_none(num_clips, trained, is_asked=is_asked):
        return replace(data, held_out_note=f"no clip is held out for a validation loss: {reason}")
    chosen = choose_clips(clips, ranks, candidates, fraction)
    left = np.concatenate(chosen)
    # Parts of a clip follow one another.
    held_out = data.take([int(rows[0]) for rows in chosen])
    names = [f"{one.clip.video.name} ({one.clip.source})" if is_raw else one.name for one in held_out.clips]
    more = f" with {len(left)} samples" if len(left) > len(chosen) else ""
    note = f"{len(chosen)} of {num_clips} clips{more} held out for the validation loss: {', '.join(names)}"
    if is_raw:
        gone = set(left.tolist())
        clips = [planned for number, planned in enumerate(data.clips) if number not in gone]
    else:
        clips = data.clips.omit(left)
    return replace(data, clips=clips, held_out=held_out, held_out_fraction=fraction, held_out_note=note)


def _check_condition_frames(wanted: str, folders: Iterable[Path]) -> None:
    """Refuse folders that were prepared with other condition frames; older ones have first frames."""
    for folder in folders:
        made_with = read_prepared_settings(folder).get("flags", {}).get("condition_frames", FIRST)
        if made_with != wanted:
            raise UserError(
                f"--condition_frames: {folder} was prepared with {made_with}, not {wanted}; pass --condition_frames "
                f"{made_with}, or prepare the clips with --save_image_latents --condition_frames {wanted}"
            )


def control_flags(settings: TrainingSettings) -> ControlFlags | None:
    """Return how clips get their controls; computed ones as in the preparation, if the clips are prepared.

    None for other tasks.
    """
    if settings.task != "control-to-video":
        return None
    if not settings.prepared.load_tensors:
        return settings.control
    folders = _prepared_folders(data_sources(settings.sources))
    kinds = {read_prepared_settings(folder).get("flags", {}).get("compute_control") for folder in folders}
    return replace(settings.control, compute_control=kinds.pop() if len(kinds) == 1 else None)


def _check_kinds(data: TrainingData, sources: Sequence[DataSource]) -> None:
    """Refuse data without a usable clip to train on, or for the regularization that was asked for."""
    is_missing = data.regularization is None and any(source.regularization for source in sources)
    if is_missing or (data.regularization is not None and data.regularization.all()):
        kind = "for regularization (--regularization_data_root)" if is_missing else "to train on"
        raise UserError(f"no clip {kind} can be used; add some, or fix those that are skipped")


def plan_raw_clips(
    flags: SourceFlags,
    clip_flags: ClipFlags,
    extra: Sequence[DataSource] = (),
    *,
    with_images: bool = False,
    condition_frames: str = FIRST,
    control: ControlFlags | None = None,
    masks: MaskFlags | None = None,
) -> RawData:
    """List the clips, probe them, and assign them to buckets; `with_images` and with `control` with theirs.

    Those of `extra` sources come last. With images, samples have more frames than `condition_frames` gives. Masks are
    read for the loss and for controls, which need one for every clip.
    """
    cache = default_cache_folder()
    buckets = make_buckets(clip_flags.frame_buckets, clip_flags.height_buckets, clip_flags.width_buckets)
    sources = [*data_sources(flags, control, masks), *extra]
    read = [read_clips(source, cache / "media", name_folder=bool(flags.dataset_mix or extra)) for source in sources]
    clips = [clip for of_source, _ in read for clip in of_source]
    files = [clip.video for clip in clips]
    files += [clip.image for clip in clips if with_images and clip.image is not None]
    files += [file for clip in clips for file in (clip.control, clip.mask) if file is not None]
    infos = probe_files(files, FileCache(cache))
    planned, bad, dropped = [], [], []
    for source, (of_source, unreadable) in zip(sources, read, strict=True):
        kept, dropped_here, unscored = keep_clips(of_source, infos, source)
        if with_images and is_context(condition_frames):
            _refuse_images(of_source, condition_frames)
        usable, unusable = plan_clips(
            kept,
            infos,
            buckets,
            skip_start=flags.skip_frames_start,
            skip_end=flags.skip_frames_end,
            fps=clip_flags.fps,
            long_clips=clip_flags.long_clips,
            hold_last_frame=clip_flags.hold_last_frame,
            with_images=with_images,
            needs_masks=_fills_masks(control),
        )
        usable, short = _without_short(usable, condition_frames if with_images else FIRST)
        planned.append(usable)
        bad += [*unreadable, *unscored, *unusable, *short]
        dropped += dropped_here
    uses_masks = masks is not None and masks.use_masks
    if uses_masks and any(planned) and not any(sample.mask for of_source in planned for sample in of_source):
        raise UserError(
            f"--use_masks: none of the {sum(map(len, planned))} samples has a mask; add a.mask.mp4 or a.mask.png "
            "beside a.mp4, name them in the list (--mask_column), or omit the flag"
        )
    return RawData(_weighted(sources, planned), bad, dropped)


def _refuse_images(clips: Sequence[Clip], condition: str) -> None:
    """Refuse images of the user's as the beginning of a video."""
    if with_image := [f"{clip.image} ({clip.source})" for clip in clips if clip.image is not None]:
        what = f"the given frames are the clip's own, but {len(with_image)} clips have an image; remove the images:"
        raise UserError(listing(f"--condition_frames {condition}: {what}", with_image))


def _without_short(samples: Sequence[ClipSample], condition: str) -> tuple[list[ClipSample], list[BadClip]]:
    """Return the samples that are longer than their given frames, and the clips without one."""
    fewest = fewest_frames(condition)
    kept = [sample for sample in samples if sample.bucket.num_frames >= fewest]
    clips, short = {id(sample.clip) for sample in kept}, {}
    for sample in samples:
        if id(sample.clip) not in clips:
            reason = f"gives {sample.bucket.num_frames} frames; --condition_frames {condition} needs {fewest} or more"
            short[id(sample.clip)] = BadClip(str(sample.clip.video), sample.clip.source, reason, sample.info)
    return kept, list(short.values())


def plan_validation_clips(
    settings: TrainingSettings, *, with_images: bool, control: ControlFlags | None = None
) -> RawData | None:
    """Plan the held-out clips of --validation_dataset_file; None without it. A UserError lists all unusable ones.

    They are cut and resized like the training clips, but each has one sample: a split clip its first part.
    """
    if settings.validation.validation_dataset_file is None:
        return None
    masks = replace(settings.masks, use_masks=False)  # the loss of validation is that of all pixels
    data = plan_raw_clips(
        *validation_data_flags(settings),
        with_images=with_images,
        condition_frames=settings.image.condition_frames,
        control=control,
        masks=masks,
    )
    if data.bad:
        what = f"{len(data.bad)} of {data.num_listed} clips cannot be used; fix or remove them:"
        raise UserError(listing(f"--validation_dataset_file: {what}", data.bad, most=len(data.bad)))
    return RawData([planned for planned in data.clips if planned.part == planned.caption_number == 0])


def validation_data_flags(settings: TrainingSettings) -> tuple[SourceFlags, ClipFlags]:
    """Return the flags to read the clips of --validation_dataset_file with.

    They are those of training except for the places of the clips, and nothing is random. For prepared training data,
    frames and sizes are those of the preparation, if all prepared folders agree on them.
    """
    places = {"data_root": None, "dataset_name": None, "dataset_mix": None, "max_samples": None}
    sources = replace(settings.sources, **places, dataset_file=settings.validation.validation_dataset_file)
    clips = settings.clips
    if settings.prepared.load_tensors:
        folders = _prepared_folders(data_sources(settings.sources))
        first, *others = [read_prepared_settings(folder).get("flags", {}) for folder in folders]
        known = {name: first[name] for name in PREPARED_FLAGS if name in first}
        agreed = {name: one for name, one in known.items() if all(other.get(name) == one for other in others)}
        sources = replace(sources, **{name: value for name, value in agreed.items() if hasattr(sources, name)})
        clips = replace(clips, **{name: value for name, value in agreed.items() if hasattr(clips, name)})
    sources = replace(sources, keep=None)  # a held-out clip is a choice already
    mode = "center" if clips.video_reshape_mode == "random" else clips.video_reshape_mode
    return sources, replace(clips, random_flip=None, video_reshape_mode=mode)


def _weighted(sources: Sequence[DataSource], planned: Sequence[Sequence[ClipSample]]) -> list[ClipSample]:
    """Join the samples of all data sets, one for each caption, with weights as repeats.

    Weights count samples, not listed clips or captions.
    """
    joined = []
    for repeats, samples in zip(weights_to_repeats(sources, list(map(len, planned))), planned, strict=True):
        if repeats is not None:
            # The samples of a clip still share it.
            clips = {id(sample.clip): replace(sample.clip, repeats=repeats) for sample in samples}
            samples = [replace(sample, clip=clips[id(sample.clip)]) for sample in samples]
        joined += with_each_caption(samples)
    return joined


def check_bad_clips(data: RawData, on_bad_clip: str, advise: Callable[[], str | None] = lambda: None) -> None:
    """Refuse unusable clips, all listed with reasons; with "skip" only if no clip is usable. --keep must keep one.

    `advise` returns the line on the flags that keep more clips, if there are any.
    """
    if data.dropped and not data.clips and not data.bad:
        raise UserError(listing(f"--keep drops all {len(data.dropped)} clips; relax the condition:", data.dropped))
    if not data.bad or (data.clips and on_bad_clip == "skip"):
        return
    advice = "; fix or remove them, or skip them with --on_bad_clip skip" if data.clips else ""
    if any(clip.reason.startswith("has no caption") for clip in data.bad):
        script = shlex.quote(path_of_script("caption_dataset.py"))
        advice += f"; a model writes captions with python {script} --data_root FOLDER --endpoint URL"
    title = f"{len(data.bad)} of {data.num_listed} clips cannot be used{advice}:"
    flags = advise() if any(clip.info for clip in data.bad) else None
    raise UserError("\n".join(filter(None, [listing(title, data.bad, most=len(data.bad)), flags])))


def advise(data: RawData, settings: TrainingSettings | PreparationSettings, config: Mapping[str, Any]) -> str | None:
    """Return a line with the flags that keep more clips of the data, for a transformer of this config."""
    ignores = isinstance(settings, TrainingSettings) and settings.image.ignore_learned_positional_embeddings
    infos = [sample.info for sample in data.clips if sample.part == sample.caption_number == 0]
    return recommend(
        [*infos, *(clip.info for clip in data.bad if clip.info)],
        settings.clips,
        config,
        skip_start=settings.sources.skip_frames_start,
        skip_end=settings.sources.skip_frames_end,
        is_fixed=bool(config.get("use_learned_positional_embeddings")) and not ignores,
        given=settings.given,
    )


def advise_early(data: RawData, settings: TrainingSettings | PreparationSettings, model: str) -> str | None:
    """Do the same before torch is imported; None if the config of the model cannot be read, an error of its own."""
    try:
        file = Path(model) / "transformer/config.json"
        if not os.path.isdir(model):
            from huggingface_hub import hf_hub_download

            where = {"revision": settings.model.revision, "cache_dir": settings.model.cache_dir}
            file = Path(hf_hub_download(model, "transformer/config.json", **where))
        return advise(data, settings, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return None


def _fills_masks(control: ControlFlags | None) -> bool:
    return control is not None and control.compute_control == INPAINT


def data_sources(
    flags: SourceFlags, control: ControlFlags | None = None, masks: MaskFlags | None = None
) -> list[DataSource]:
    """Return the data sets that the flags name, and set the size of the cache of those in stores.

    With `control`, they list controls, unless these are computed.
    """
    lists_masks = masks is not None and (masks.use_masks or _fills_masks(control))
    lists_controls = control is not None and control.compute_control is None
    limit_cache(flags.cache_limit_gb)
    source = DataSource(
        data_root=to_path(flags.data_root) if flags.data_root else None,
        dataset_file=to_path(flags.dataset_file) if flags.dataset_file else None,
        dataset_name=flags.dataset_name,
        dataset_config_name=flags.dataset_config_name,
        dataset_split=flags.dataset_split,
        dataset_streaming=flags.dataset_streaming,
        max_samples=flags.max_samples,
        video_column=flags.video_column,
        caption_column=flags.caption_column,
        caption_per_line=flags.caption_per_line,
        shuffle_tags=flags.shuffle_tags,
        image_column=flags.image_column,
        control_column=(control.control_column or "control") if lists_controls else None,
        mask_column=(masks.mask_column or "mask") if lists_masks else None,
        id_token=flags.id_token,
        keep=flags.keep,
        scores=to_path(flags.scores) if flags.scores else None,
        allow_outside_paths=flags.allow_outside_paths,
    )
    return read_mix(Path(flags.dataset_mix), source) if flags.dataset_mix else [source]


def regularization_sources(settings: TrainingSettings, control: ControlFlags | None = None) -> list[DataSource]:
    """Return the data set of --regularization_data_root, if there is one.

    Only flags on the clips themselves apply to it, as its folder is another one.
    """
    root, flags = settings.regularization.regularization_data_root, settings.sources
    if root is None:
        return []
    column = "control" if control is not None and control.compute_control is None else None
    mask = "mask" if _fills_masks(control) else None  # the loss of regularization counts everywhere
    names = ("max_samples", "allow_outside_paths", "caption_per_line", "shuffle_tags")
    facts = {name: getattr(flags, name) for name in names}
    return [DataSource(to_path(root), control_column=column, mask_column=mask, regularization=True, **facts)]


def _read_prepared(sources: Sequence[DataSource]) -> PreparedData:
    from prepared.index import PreparedIndex  # pyarrow takes tenths of a second to import
    from prepared.read_index import read_index

    folders = _prepared_folders(sources)
    indexes = [read_index(source.data_root, allow_outside_paths=source.allow_outside_paths) for source in sources]
    weighted = weights_to_repeats(sources, list(map(len, indexes)))
    joined = [
        index.with_facts(
            times=source.repeats,
            fixed=fixed,
            regularization=source.regularization,
            caption_dropout=source.caption_dropout,
        )
        for source, fixed, index in zip(sources, weighted, indexes, strict=True)
    ]
    return PreparedData(PreparedIndex([folder for index in joined for folder in index.folders]), folders)


def _prepared_folders(sources: Sequence[DataSource]) -> list[Path]:
    folders = [source.data_root for source in sources]
    if None in folders:
        raise UserError("--load_tensors: pass the prepared folder as --data_root (in every entry of --dataset_mix)")
    for source in sources:
        made_with = read_prepared_settings(source.data_root).get("flags", {})
        if source.keep not in (None, made_with.get("keep")):
            raise UserError(f"--keep: {source.data_root} is prepared already; pass --keep to prepare_dataset.py")
        if source.regularization and made_with.get("id_token"):
            raise UserError(
                f"--regularization_data_root: {source.data_root} was prepared with --id_token "
                f"{made_with['id_token']}, which its captions must not have; prepare it without"
            )
    return list(dict.fromkeys(folders))


def describe_plan(
    data: TrainingData,
    settings: TrainingSettings | PreparationSettings,
    model: Any,
    configs: Any,
    *,
    batch_size: int | BatchSize | TokenBudget,
    num_ranks: int = 1,
) -> str:
    """Return the plan for a `ModelSource` and its `ModelConfigs` as a table; `batch_size` is that of one rank.

    Its last line has the flags that keep more clips, if there are any.
    """
    if isinstance(data, PreparedData):
        lines = [
            f"{bucket}: {count} prepared samples of {count_tokens(configs.transformer, bucket)} tokens"
            for bucket, count in data.buckets.counts.items()
        ]
        lines += [data.held_out_note] if data.held_out_note else []
        if data.num_captions is not None:
            several = int((data.num_captions > 1).sum())
            lines.append(f"{several} of these are the captions of clips that have several: they take turns")
        if data.regularization is not None:
            sampler = BucketBatchSampler.of(data, batch_size, seed=0)
            lines.append(regularization_note(sampler, int(data.regularization.sum())))
        return "\n".join(filter(None, [*lines, _dropout_note(data, settings)]))
    table = tabulate(data, settings, model, configs, batch_size=batch_size, num_ranks=num_ranks)
    dropped = f"{len(data.dropped)} of {data.num_listed} clips are dropped by --keep" if data.dropped else None
    notes = [dropped, _mask_note(data, settings), _dropout_note(data, settings), data.held_out_note]
    return "\n".join(filter(None, [str(table), *notes, advise(data, settings, configs.transformer)]))


def _mask_note(data: RawData, settings: TrainingSettings | PreparationSettings) -> str | None:
    """Return a line on samples whose loss is not weighted, if others are."""
    clips = data.trained.clips if settings.masks.use_masks else ()
    without = sum(planned.mask is None for planned in clips)
    return f"{without} of {len(clips)} samples have no mask: they count fully everywhere" if without else None


def _dropout_note(data: TrainingData, settings: TrainingSettings | PreparationSettings) -> str | None:
    """Return a line on data sets that drop captions otherwise than the flag says; None if none does."""
    if not isinstance(settings, TrainingSettings):
        return None
    dropouts = caption_dropouts(data, settings.objective.caption_dropout)
    if dropouts is None:
        return None
    counts = Counter(dropouts.tolist())
    return f"captions are dropped from {', '.join(f'{p:.3g} of {counts[p]} samples' for p in sorted(counts))}"


def tabulate(
    data: RawData,
    settings: TrainingSettings | PreparationSettings,
    model: Any,
    configs: Any,
    *,
    batch_size: int,
    num_ranks: int = 1,
) -> PlanTable:
    """Return the plan of clips for a `ModelSource` and its `ModelConfigs`, without the recommended flags."""
    tokens = configs.transformer["max_text_seq_length"]
    return plan_table(
        data.clips,
        batch_size=batch_size,
        num_ranks=num_ranks,
        tokens_of=partial(count_tokens, configs.transformer),
        long_captions=model.find_long_captions(data.captions, tokens),
        unknown_captions=model.find_unknown_captions(data.captions),
        max_caption_tokens=tokens,
        model_fps=native_fps(configs.transformer),
        reshape_mode=settings.clips.video_reshape_mode,
        id_token=settings.sources.id_token,
    )


def report_held_out(data: TrainingData, folder: Path) -> None:
    """Write the clips held out of the training data to `held_out_clips.csv` in the output folder, if there are any."""
    if not data.held_out_fraction:
        return
    is_raw = isinstance(data, RawData)
    clips = [(one.clip.video, one.clip.source) if is_raw else (one.name, "") for one in data.held_out.clips]
    with (
        atomic_write(folder / HELD_OUT_FILE) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([("clip", "source"), *clips])


def report_skipped(bad: Sequence[BadClip], folder: Path, dropped: Sequence[BadClip] = ()) -> None:
    """Write the skipped clips to `skipped_clips.csv` in the output folder and say so; remove the file if none are.

    Those that --keep dropped follow the unusable ones.
    """
    path = folder / SKIPPED_FILE
    if not bad and not dropped:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("clip", "source", "reason"))
        table.writerows((clip.what, clip.source, clip.reason) for clip in (*bad, *dropped))
    # Not logged, because in a preparation only the first rank logs.
    if bad:
        tqdm.write(f"{len(bad)} of the clips cannot be used and are skipped: see {path}")
    if dropped:
        tqdm.write(f"{len(dropped)} of the clips are dropped by --keep: see {path}")
