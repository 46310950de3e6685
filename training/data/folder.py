"""Read a folder of clips, each with its caption in a .txt file of the same name beside it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import UserError
from common.text_files import read_utf8
from data.media_cache import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from data.rows import Row, Table
from flags.types import TABLE_SUFFIXES


_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES | {".txt"}
_SIDE_NOTES = {"readme", "license", "licence", "copying", "notice", "changelog"}


def read_folder(root: Path, captions_file: Path | None = None) -> Table:
    """Read the videos and still images in a folder and its subfolders, sorted by path: video, caption and image.

    `b.png` beside `b.mp4` is that video's first frame. Hidden files are ignored. Every .txt file needs a clip, except
    one named like a readme or licence at the top level. Without clips, the UserError says what to pass instead.
    `captions_file` is a table that captions will be written to, possibly in the folder; clips then need no captions.
    """
    groups: dict[str, list[str]] = {}
    for file in sorted(_visible_files(root)):
        groups.setdefault(os.path.splitext(file)[0], []).append(file)
    suffixes = [set(map(_suffix, files)) for files in groups.values()]
    tables = sorted(name for name in os.listdir(root) if _suffix(name) in TABLE_SUFFIXES and name[0] != ".")
    if captions_file is not None:
        tables = [name for name in tables if (root / name).resolve() != captions_file.resolve()]
    if tables and not any(".txt" in kinds and len(kinds) > 1 for kinds in suffixes):
        raise UserError(
            f"{root} has no clips with captions beside them, but {', '.join(tables)}: pass "
            f"--dataset_file {root / tables[0]}"
        )
    if all(kinds == {".txt"} for kinds in suffixes):
        raise UserError(
            f"{root} has nothing that can be read as clips. Put videos.txt and prompts.txt there, with one path and "
            "one caption per line; or clips that each have a .txt of the same name beside them; or pass a table with "
            f"--dataset_file ({', '.join(TABLE_SUFFIXES)}), or a data set with --dataset_name"
        )
    rows = (row for name, files in groups.items() for row in _rows(root, name, files, captions_file is None))
    return Table(str(root), ("video", "caption", "image"), rows, root)


def _visible_files(root: Path) -> Iterator[str]:
    """Yield clips and captions as paths below root. Each folder is read once, even if links form a cycle."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_report_folder):
        # An earlier preparation or dry run wrote a folder with one of these files.
        is_ours = folder != str(root) and not {"prepared.json", "plan.csv"}.isdisjoint(names)
        place = os.path.realpath(folder)
        if is_ours or place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in names:
            if name[0] != "." and _suffix(name) in _SUFFIXES:
                yield (Path(folder) / name).relative_to(root).as_posix()


def _report_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _rows(root: Path, name: str, files: Sequence[str], captions_needed: bool) -> Iterator[Row]:
    videos, images, captions = (
        [file for file in files if _suffix(file) in kinds] for kinds in (VIDEO_SUFFIXES, IMAGE_SUFFIXES, {".txt"})
    )
    if not videos and not images:
        if name.lower() not in _SIDE_NOTES:
            yield Row(str(root), {"video": captions[0]}, "has no clip of the same name beside it")
        return
    first_frames = images if videos else []
    source, caption, problem = str(root), None, None
    if captions_needed and not captions:
        problem = f"has no caption file {Path(name).name}.txt beside it"
    elif len(first_frames) > 1:
        problem = f"has several images for its first frame beside it: {', '.join(first_frames)}"
    elif captions:
        source = captions[0]
        try:
            caption = read_utf8(root / source).replace("\r\n", "\n")
        except UserError as error:
            problem = str(error)
    for clip in videos or images:
        yield Row(source, {"video": clip, "image": next(iter(first_frames), None), "caption": caption}, problem)
