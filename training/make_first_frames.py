"""Write the first frame of every clip as a PNG, and a table of clips and images for image-to-video training.

    python training/make_first_frames.py --data_root my-clips --output_dir my-first-frames

Edit the images if you like, then pass my-first-frames/metadata.jsonl as --dataset_file, with the same --data_root.
Existing images are kept, so that a second run never undoes an edit. Clips need no captions yet.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from args import parse_first_frame_args
from common.bars import tqdm
from common.errors import UserError, one_line_errors
from common.files import atomic_write
from common.logs import log_without_tokens
from common.remote import default_cache_folder
from common.startup import announce
from common.text_files import index_lines
from data.buckets import Bucket
from data.clips import BadClip, ClipSample, plan_clips
from data.sources import DataSource, read_clips
from flags.captions import CAPTIONS_FILE
from flags.preparation import FIRST_FRAMES_FILE
from planning.describe import report_skipped
from planning.plan import check_bad_clips, data_sources
from planning.samples import RawData
from video.cache import FileCache
from video.io import read_frames
from video.probe import probe_files


def plan_first_frames(source: DataSource, skip_start: int, table: Path) -> RawData:
    """List and probe the clips, and plan only the first usable frame of each; an unreadable list is a UserError.

    Clips need no captions: these can be written to `table` later.
    """
    cache = default_cache_folder()
    clips, bad = read_clips(source, cache / "media", captions_file=table)
    files = [clip.video for clip in clips] + [clip.image for clip in clips if clip.image is not None]
    one_frame = [Bucket(1, 16, 16)]  # its size has no effect, because nothing is resized
    infos = probe_files(files, FileCache(cache))
    planned, unusable = plan_clips(clips, infos, one_frame, skip_start=skip_start, with_images=True)
    return RawData(planned, [*bad, *unusable])


def make_first_frames(data: RawData, folder: Path, on_bad_clip: str) -> Path:
    """Write the missing images, then the table; return its path.

    A table that exists is a UserError, and with `on_bad_clip` "error" a clip that does not decode. `folder` is
    absolute.
    """
    table = folder / FIRST_FRAMES_FILE
    if table.exists():
        raise UserError(
            f"--output_dir: {table} already exists; remove it to write it again (existing images are kept), or pass "
            "another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    failures = write_images(data.clips, folder)
    listed = [planned for planned, failure in zip(data.clips, failures, strict=True) if failure is None]
    made = RawData(listed, [*data.bad, *filter(None, failures)])
    check_bad_clips(made, on_bad_clip)
    report_skipped(made.bad, folder)
    with atomic_write(table) as partial:
        partial.write_text(index_lines(image_row(planned, folder) for planned in listed), encoding="utf-8")
    return table


def check_folder(folder: Path, data: RawData, source: DataSource) -> None:
    """Refuse an output folder in which the images would be among the clips, and could be read as such."""
    holders = {planned.clip.video.parent.resolve() for planned in data.clips}
    if source.dataset_file is None and source.dataset_name is None:
        holders.add(source.data_root.resolve())
    for holder in sorted(holders):
        if folder.resolve().is_relative_to(holder) or holder.is_relative_to(folder.resolve()):
            raise UserError(
                f"--output_dir: {folder} is among the clips in {holder}, where the images would become clips; pass a "
                f"folder beside it, such as {holder.parent / f'{holder.name}-first-frames'}"
            )


def write_images(planned: Sequence[ClipSample], folder: Path) -> list[BadClip | None]:
    """Write the first frames in parallel; return for each clip None, or why it cannot be decoded."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = pool.map(lambda one: write_image(one, image_path(one, folder)), planned)
        return list(tqdm(results, "Writing first frames", len(planned), unit=" clips"))
    finally:
        pool.shutdown(cancel_futures=True)  # stop at once after Ctrl-C or on a full disk


def write_image(planned: ClipSample, image: Path) -> BadClip | None:
    """Write the planned frame of a clip as PNG unless the file exists; return why if it cannot be decoded."""
    if image.exists():
        return None
    clip = planned.clip
    try:
        (frame,) = read_frames(clip.video, planned.frame_indices, seekable=planned.info.seekable)
    except ValueError as error:
        return BadClip(str(clip.video), clip.source, str(error).removeprefix(f"{clip.video}: "))
    with atomic_write(image) as partial:
        Image.fromarray(frame).save(partial)
    return None


def image_path(planned: ClipSample, folder: Path) -> Path:
    """Return the image that the clip names, or the file of its first frame.

    Its name depends on the content of the clip and the frame, so that a changed clip gets a new image.
    """
    if planned.clip.image is not None:
        return planned.clip.image.absolute()
    stem = planned.clip.video.stem.encode()[:100].decode(errors="ignore")  # file names have at most 255 bytes
    return folder / f"{stem}-{planned.info.content[:12]}-{planned.frame_indices[0]}.png"


def image_row(planned: ClipSample, folder: Path) -> dict[str, str]:
    """Return the table row of a clip: its paths, its caption, and its other columns."""
    row = {
        "video": str(planned.clip.video.absolute()),
        "caption": planned.clip.caption,
        "image": str(image_path(planned, folder)),
    }
    return row | {name: value for name, value in planned.clip.metadata.items() if name not in row}


def table_flags(table: Path, source: DataSource) -> str:
    """Return the flags with which a script reads the table, with the folder of the clips."""
    folder = source.data_root or (source.dataset_file and source.dataset_file.absolute().parent)
    return f"--dataset_file {table}" + (f" --data_root {folder}" if folder else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the flags of `argv`, or of the command line if it is None."""
    with one_line_errors():
        settings = parse_first_frame_args(argv)
        log_without_tokens(logging.INFO)
        announce("reading the data")
        (source,) = data_sources(settings.sources)
        folder = Path(settings.output.output_dir).absolute()
        data = plan_first_frames(source, settings.sources.skip_frames_start, folder / FIRST_FRAMES_FILE)
        check_bad_clips(data, settings.sources.on_bad_clip)
        check_folder(folder, data, source)
        try:
            table = make_first_frames(data, folder, settings.sources.on_bad_clip)
        except OSError as error:
            raise UserError(
                f"--output_dir: {settings.output.output_dir} cannot be written ({error.strerror or error})"
            ) from error
        flags = table_flags(table, source)
        num_without = sum(not planned.clip.caption for planned in data.clips)
        if num_without:
            print(
                f"{num_without} of {len(data.clips)} clips have no caption: write it into the table, or let a model "
                f"write it: caption_dataset.py {flags} --output_file {folder / CAPTIONS_FILE}"
            )
        print(f"wrote {table}; edit the images if you like, then pass to prepare_dataset.py: {flags}")


if __name__ == "__main__":
    main()
