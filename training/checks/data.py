"""Checks of the flags on clips; none needs a model."""

from collections.abc import Collection
from dataclasses import replace

from cli.schema import flag_values
from common.errors import UserError
from common.remote import to_path
from common.stores import check_url, is_url
from flags.data import PREPARED_FLAGS, ClipFlags, ControlFlags, MaskFlags, SourceFlags
from flags.settings import TrainingSettings
from prepared.folder import read_prepared_settings
from video.controls import INPAINT


SIZE_STEP = 16  # the VAE compresses 8 times in space, the transformer's patches twice more


def settle_clips(clips: ClipFlags, given: Collection[str]) -> ClipFlags:
    """Return the flags with the defaults that depend on others (the only bucket, the use of long clips), checked."""
    if clips.fps is not None and clips.long_clips == "spread":
        raise UserError("--long_clips spread: has no fixed frame rate; omit --fps or choose first or split")
    if {"height", "width"} <= set(given) and not {"height_buckets", "width_buckets"} & set(given):
        clips = replace(clips, height_buckets=(clips.height,), width_buckets=(clips.width,))
    # --height and --width come first: they may have become the buckets, and the message must name what the user typed.
    for flag, sizes in (
        ("--height", (clips.height,)),
        ("--width", (clips.width,)),
        ("--height_buckets", clips.height_buckets),
        ("--width_buckets", clips.width_buckets),
    ):
        for size in sizes:
            check_size(flag, size)
    check_frame_count("--max_num_frames", clips.max_num_frames)
    for count in clips.frame_buckets:
        check_frame_count("--frame_buckets", count)
    if min(clips.frame_buckets) > clips.max_num_frames:
        raise UserError(
            f"--frame_buckets: all exceed --max_num_frames {clips.max_num_frames}; raise it to --max_num_frames "
            f"{max(clips.frame_buckets)} or pass a shorter bucket"
        )
    return replace(clips, long_clips=clips.long_clips or ("first" if clips.fps else "spread"))


def check_size(flag: str, size: int) -> None:
    """Check that a height or width is a multiple of 16."""
    if size % SIZE_STEP:
        below = size // SIZE_STEP * SIZE_STEP
        nearest = _name_nearest("size", [n for n in (below, below + SIZE_STEP) if n])
        raise UserError(f"{flag}: {size} is not divisible by {SIZE_STEP}; {nearest}")


def check_frame_count(flag: str, count: int) -> None:
    """Check that the VAE takes a number of frames."""
    if not _is_frame_count(count):
        below = next(n for n in range(count, 0, -1) if _is_frame_count(n))
        above = next(n for n in range(count, count + 4) if _is_frame_count(n))
        raise UserError(f"{flag}: {count} is not 4k or 4k+1; {_name_nearest('count', [below, above])}")


def _is_frame_count(count: int) -> bool:
    """Return whether the VAE, which compresses 4 times in time, takes this many frames without a remainder."""
    return count == 1 or (count >= 4 and count % 4 in (0, 1))


def _name_nearest(noun: str, values: list[int]) -> str:
    if len(values) == 1:
        return f"nearest valid {noun} is {values[0]}"
    return f"nearest valid {noun}s are {values[0]} and {values[1]}"


def drop_long_buckets(clips: ClipFlags) -> tuple[ClipFlags, list[str]]:
    """Return the flags without the frame buckets that exceed --max_num_frames, and a warning about these, if any."""
    long = [str(count) for count in clips.frame_buckets if count > clips.max_num_frames]
    if not long:
        return clips, []
    kept = tuple(count for count in clips.frame_buckets if count <= clips.max_num_frames)
    warning = f"--frame_buckets {' '.join(long)} not used: longer than --max_num_frames {clips.max_num_frames}"
    return replace(clips, frame_buckets=kept), [warning]


def check_sources(sources: SourceFlags) -> None:
    """Check that one flag names the data set, that its details come with it, and that URLs can be read."""
    named = [name for name in ("dataset_file", "dataset_name", "dataset_mix") if getattr(sources, name)]
    if len(named) > 1:
        raise UserError(f"--{named[1]}: --{named[0]} already names the data; omit one of them")
    for name in ("dataset_config_name", "dataset_streaming"):
        if getattr(sources, name) and not sources.dataset_name:
            raise UserError(f"--{name}: no effect without --dataset_name; omit it")
    for flag, value in (("--data_root", sources.data_root), ("--dataset_file", sources.dataset_file)):
        if value and is_url(value):
            check_url(flag, value)
    if sources.scores and not (sources.keep or sources.dataset_mix):
        raise UserError("--scores: no effect without --keep; omit it")
    if sources.dataset_mix and sources.data_root:
        raise UserError("--data_root: each entry of --dataset_mix names its own; omit one of them")


def check_control(control: ControlFlags) -> None:
    """Check that controls come from one place."""
    if control.compute_control and control.control_column:
        raise UserError("--control_column: not together with --compute_control; omit one of them")


def check_masks(masks: MaskFlags, control: ControlFlags, given: Collection[str]) -> None:
    """Check that what is set about masks has an effect."""
    if masks.mask_column and not masks.use_masks and control.compute_control != INPAINT:
        raise UserError(f"--mask_column: no effect without masks; add --use_masks or --compute_control {INPAINT}")
    if "mask_background_weight" in given and not masks.use_masks:
        raise UserError("--mask_background_weight: no effect without masks; add --use_masks")


def check_prepared_flags(settings: TrainingSettings) -> None:
    """Check that flags on raw clips, passed with --load_tensors, are those that the data was prepared with."""
    folder = settings.sources.data_root
    if not settings.prepared.load_tensors or not folder:
        return
    # The launchers pass the length of validation videos as a frame bucket; the plan compares condition frames.
    compared = settings.given & set(PREPARED_FLAGS) - {"frame_buckets", "condition_frames"}
    if not compared:  # nothing to read, which takes a while from a store
        return
    # Folders of earlier versions were prepared without these.
    made_with = {"caption_per_line": False, "shuffle_tags": None}
    made_with, values = made_with | read_prepared_settings(to_path(folder)).get("flags", {}), flag_values(settings)
    differing = [
        f"--{name} was {made_with[name]!r}, is now {values[name]!r}"
        for name in PREPARED_FLAGS
        if name in compared & made_with.keys() and made_with[name] != values[name]
    ]
    if differing:
        raise UserError(
            f"--load_tensors: '{folder}' was prepared with other flags ({'; '.join(differing)}); prepare it again, or "
            "omit these flags"
        )
