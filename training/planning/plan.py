"""Plan the samples of a run from flags and files, before anything heavy is imported or any model is loaded."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from common.errors import UserError, listing
from common.files import path_of_script
from common.remote import default_cache_folder, limit_cache, to_path
from data.buckets import make_buckets
from data.clips import BadClip, Clip, ClipSample, plan_clips, with_each_caption
from data.mix import read_mix, weights_to_repeats
from data.sources import DataSource, read_clips
from flags.data import PREPARED_FLAGS, ClipFlags, ControlFlags, MaskFlags, SourceFlags
from flags.settings import TrainingSettings
from planning.describe import advise_early
from planning.held_out import contents_of, find_prepared, hold_out, names_of
from planning.keep import keep_clips
from planning.samples import PreparedData, RawData, TrainingData
from prepared.folder import read_prepared_settings
from video.cache import FileCache
from video.condition_frames import FIRST, fewest_frames, is_context
from video.controls import INPAINT
from video.probe import probe_files


def plan_training_data(settings: TrainingSettings) -> TrainingData:
    """Find the training and held-out clips of the flags; a UserError lists all that are missing or unusable."""
    sources, with_images, control = settings.sources, settings.task == "image-to-video", control_flags(settings)
    extra = regularization_sources(settings, control)
    if settings.prepared.load_tensors:
        data = _read_prepared([*data_sources(sources), *extra], extra)
        if with_images:
            _check_condition_frames(settings.image.condition_frames, data.folders)
        if control is not None:
            _check_control_kinds(settings, data.folders)
    else:
        data = plan_raw_clips(
            sources,
            settings.clips,
            extra,
            with_images=with_images,
            condition_frames=settings.image.condition_frames,
            control=control,
            masks=settings.masks,
        )
        model = settings.model.pretrained_model_name_or_path
        check_bad_clips(data, sources.on_bad_clip, lambda: advise_early(data, settings, model))
    _check_kinds(data, [*data_sources(sources), *extra])
    held_out = plan_validation_clips(settings, with_images=with_images, control=control)
    if held_out is not None:
        # The loss of clips that are also trained on would not show overfitting.
        if isinstance(data, RawData):
            trained = {planned.info.sha256 for planned in data.clips}
            both = [str(planned.clip.video) for planned in held_out.clips if planned.info.sha256 in trained]
        else:
            both = find_prepared(held_out.clips, data.clips, validation_data_flags(settings)[1].video_reshape_mode)
        if both:
            what = f"{len(both)} of its clips are trained on too; remove them from one of the two:"
            raise UserError(listing(f"--validation_dataset_file: {what}", both))
    return hold_out(data, settings) if held_out is None else replace(data, held_out=held_out)


def _check_condition_frames(wanted: str, folders: Iterable[Path]) -> None:
    """Refuse folders that were prepared with other condition frames; older ones have first frames."""
    for folder in folders:
        made_with = read_prepared_settings(folder).get("flags", {}).get("condition_frames", FIRST)
        if made_with != wanted:
            raise UserError(
                f"--condition_frames: {folder} was prepared with {made_with}, not {wanted}; pass --condition_frames "
                f"{made_with}, or prepare the clips with --save_image_latents --condition_frames {wanted}"
            )


def _check_control_kinds(settings: TrainingSettings, folders: Sequence[Path]) -> None:
    """Refuse folders that were prepared with controls of several kinds, or of another kind than the one passed."""
    kinds = {folder: read_prepared_settings(folder).get("flags", {}).get("compute_control") for folder in folders}
    kinds = {folder: f"--compute_control {kind}" if kind else "control clips" for folder, kind in kinds.items()}
    passed, (first, wanted) = settings.control.compute_control, next(iter(kinds.items()))
    wanted, why = (f"--compute_control {passed}", ", or omit the flag") if passed else (wanted, f", as {first} was")
    for folder, kind in kinds.items():
        if kind != wanted:
            raise UserError(f"--load_tensors: {folder} was prepared with {kind}; prepare it with {wanted}{why}")


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
    """Refuse data without a usable clip to train on, or for the regularization that was asked for; or one for both."""
    is_missing = data.regularization is None and any(source.regularization for source in sources)
    if is_missing or (data.regularization is not None and data.regularization.all()):
        kind = "for regularization (--regularization_data_root)" if is_missing else "to train on"
        raise UserError(f"no clip {kind} can be used; add some, or fix those that are skipped")
    if data.regularization is not None:
        contents, samples = contents_of(data), np.flatnonzero(data.regularization)
        kept, first = np.unique(contents[samples], return_index=True)
        both = sorted(samples[first[np.isin(kept, contents[~data.regularization])]].tolist())
        if both:
            names = names_of(data.take(both[:20]))
            what = "are also those to train on; remove them from one of the two"
            title = f"{len(both)} of the clips for regularization (--regularization_data_root) {what}, among them:"
            raise UserError(listing(title, names))


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
    read = []
    for source in sources:
        with _naming_own_flag(source in extra):
            read.append(read_clips(source, cache / "media", name_folder=bool(flags.dataset_mix or extra)))
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
    # Clips that cannot be used may be those with masks, and are an error of their own unless they are skipped.
    if masks is not None and masks.use_masks and (not bad or flags.on_bad_clip == "skip"):
        _check_masks(list(chain.from_iterable(planned)), bad)
    return RawData(_weighted(sources, planned), bad, dropped)


def _check_masks(samples: Sequence[ClipSample], skipped: Sequence[BadClip]) -> None:
    """Refuse samples of which none has a mask."""
    if samples and not any(sample.mask for sample in samples):
        what = (
            f"--use_masks: none of the {len(samples)} samples has a mask; add a.mask.mp4 or a.mask.png beside a.mp4, "
            "name them in masks.txt or the table (--mask_column), or omit the flag"
        )
        raise UserError(listing(f"{what}; skipped are:", skipped) if skipped else what)


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
        agreed = prepared_flags(settings)
        sources = replace(sources, **{name: value for name, value in agreed.items() if hasattr(sources, name)})
        clips = replace(clips, **{name: value for name, value in agreed.items() if hasattr(clips, name)})
    sources = replace(sources, keep=None)  # a held-out clip is a choice already
    mode = "center" if clips.video_reshape_mode == "random" else clips.video_reshape_mode
    return sources, replace(clips, random_flip=None, video_reshape_mode=mode)


def prepared_flags(settings: TrainingSettings) -> dict[str, object]:
    """Return the flags of the preparation on which all prepared folders to train on agree."""
    folders = _prepared_folders(data_sources(settings.sources))
    first, *others = [read_prepared_settings(folder).get("flags", {}) for folder in folders]
    known = {name: first[name] for name in PREPARED_FLAGS if name in first}
    return {name: one for name, one in known.items() if all(other.get(name) == one for other in others)}


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
    sources = read_mix(Path(flags.dataset_mix), source) if flags.dataset_mix else [source]
    needs_all = _fills_masks(control)  # otherwise masks are for the loss only, and that of regularization has none
    return [replace(one, mask_column=None) if one.regularization and not needs_all else one for one in sources]


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


_ADVICE_ON_EXTRA = {
    r"; --\w+ names the file, below --data_root \(or pass a --dataset_file\)": "",
    ", or omit --load_tensors": "",
    ", or a data set with --dataset_name": "",
    "pass a table with --dataset_file": 'list a table in a --dataset_mix, with "regularization": true',
    "pass --dataset_file (.*)": r'list \1 in a --dataset_mix, with "regularization": true',
    "--data_root": "--regularization_data_root",
}


@contextmanager
def _naming_own_flag(is_extra: bool) -> Iterator[None]:
    """Let the errors on extra clips name --regularization_data_root instead of the flags of other clips."""
    try:
        yield
    except UserError as error:
        if not is_extra:
            raise
        text = str(error)
        for advice, own in _ADVICE_ON_EXTRA.items():
            text = re.sub(advice, own, text)
        flag = "" if "--regularization_data_root" in text else "--regularization_data_root: "
        raise UserError(flag + text) from error


def _read_prepared(sources: Sequence[DataSource], extra: Sequence[DataSource]) -> PreparedData:
    from prepared.index import PreparedIndex  # pyarrow takes tenths of a second to import
    from prepared.read_index import read_index

    folders = _prepared_folders(sources)
    indexes = []
    for source in sources:
        with _naming_own_flag(source in extra):
            indexes.append(read_index(source.data_root, allow_outside_paths=source.allow_outside_paths))
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
