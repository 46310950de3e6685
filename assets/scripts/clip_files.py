"""Write the demo data: H.264 clips, lists of them, and folders that are complete or do not exist."""

import csv
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np


# A clip in the lists: its path relative to the folder with the lists, with "/", and its caption on one line.
Entry = tuple[str, str]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` which takes that name when the block ends without an error.

    Args:
        folder: the folder to make; it may exist if it is empty.

    Raises:
        FileExistsError: if `folder` holds anything.
    """
    check_free(folder)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is missing or an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} already holds something else: remove it or choose another --output_dir")


def write_mp4(path: Path, frames: Iterable[np.ndarray], fps: int | Fraction) -> None:
    """Encode frames as H.264 in yuv420p, near lossless (crf 18).

    Args:
        path: where the file goes; its folder exists.
        frames: RGB frames of one size, [H, W, 3] uint8; H and W even.
        fps: frames per second.

    Raises:
        ValueError: if there are no frames; as after any error, no file is left then.
    """
    import av

    try:
        frames = iter(frames)
        first = next(frames, None)
        if first is None:
            raise ValueError(f"no frames for {path}")
        height, width, _ = first.shape
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, width=width, height=height, pix_fmt="yuv420p")
            # With more threads, the bytes of the file depend on the number of cores; with x264's macroblock tree, they
            # vary from run to run.
            stream.options, stream.thread_count = {"crf": "18", "preset": "veryfast", "mbtree": "0"}, 1
            for frame in chain([first], frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
            container.mux(stream.encode())  # the frames that the encoder kept to look ahead
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def list_texts(entries: Sequence[Entry]) -> dict[str, str]:
    """Return the texts of the three lists by file name: two with one line a clip, and a table of both columns."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("video", "caption"))
    writer.writerows(entries)
    return {
        "videos.txt": "".join(f"{video}\n" for video, _ in entries),
        "prompts.txt": "".join(f"{caption}\n" for _, caption in entries),
        "metadata.csv": table.getvalue(),
    }


def write_lists(folder: Path, entries: Sequence[Entry]) -> None:
    """Write prompts.txt, videos.txt and metadata.csv into `folder`."""
    for name, text in list_texts(entries).items():
        (folder / name).write_text(text, encoding="utf-8")


def is_complete(folder: Path, entries: Sequence[Entry]) -> bool:
    """Return whether `folder` holds exactly these lists and every clip they name."""
    lists_agree = all(
        (folder / name).is_file() and (folder / name).read_text(encoding="utf-8") == text
        for name, text in list_texts(entries).items()
    )
    return lists_agree and all((folder / video).is_file() for video, _ in entries)
