"""Read a folder of clips, each with its caption in a .txt file of the same name beside it."""

import glob
import logging
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from cli.types import TABLE_SUFFIXES
from common.errors import UserError, one_line
from common.ranks import launch_rank
from common.remote import RemotePath, fetch_all
from common.text_files import read_utf8
from data.rows import Row, Table
from flags.scores import SCORES_FILE
from video.media import IMAGE_SUFFIXES, is_clip


logger = logging.getLogger(__name__)

_SIDE_NOTES = {"readme", "license", "licence", "copying", "notice", "changelog"}
_SIDE_FILES = {".md", ".html", *TABLE_SUFFIXES, "thumbs.db", "desktop.ini"}  # suffixes and names
COMPANIONS = ("control", "mask")  # columns of clips that belong to a clip frame by frame
_EXAMPLES = 3
_FEWEST_FRAMES = 5  # fewer numbered pictures may be anything


def read_folder(root: Path, captions_file: Path | None = None) -> Table:
    """Read the videos and still images in a folder and its subfolders, sorted by path.

    The columns are video, caption, image, control and mask. `b.png` beside `b.mp4` is that video's first frame,
    `b.control.mp4` its control, `b.mask.mp4` or `b.mask.png` its mask. Hidden files, tables and the like are ignored;
    a warning names other files that cannot be read. Every .txt file needs a clip, except one named like a readme or
    licence at the top level. Numbered frames without captions are one unusable row. Without clips, the UserError says
    what to pass instead. `captions_file` is a table that captions will be written to, possibly in the folder; clips
    then need no captions.
    """
    files = sorted(visible_files(root))
    if not files and isinstance(root, RemotePath):
        raise UserError(f"--data_root: {root} has no files; check the name, and that your credentials may list it")
    groups, unread = _group_files(root, files)
    suffixes = [set(map(_suffix, files)) for files in groups.values()]
    ours = {(root / SCORES_FILE).resolve(), captions_file and captions_file.resolve()}
    tables = [file for file in files if "/" not in file and _suffix(file) in TABLE_SUFFIXES]
    tables = [name for name in tables if (root / name).resolve() not in ours]
    if tables and not any(".txt" in kinds and len(kinds) > 1 for kinds in suffixes):
        raise UserError(
            f"{root} has no clips with captions beside them, but {', '.join(tables)}: pass "
            f"--dataset_file {root / tables[0]}"
        )
    unreadable = list(chain.from_iterable(unread.values()))
    skipped = ", ".join(map(one_line, unreadable[:_EXAMPLES]))
    if len(unreadable) > _EXAMPLES:
        skipped += f" and {len(unreadable) - _EXAMPLES} more"
    if all(kinds == {".txt"} for kinds in suffixes):
        raise UserError(
            f"{root} has nothing that can be read as clips{f' ({skipped} cannot)' if unread else ''}. Put "
            "videos.txt and prompts.txt there, with one path and one caption per line; or clips that each have a .txt "
            "of the same name beside them; or pass a table with --dataset_file "
            f"({', '.join(TABLE_SUFFIXES)}), or a data set with --dataset_name"
        )
    if unread and launch_rank() == 0:
        logger.warning("warning: skipped in %s, because neither a readable clip nor a caption: %s", root, skipped)
    if isinstance(root, RemotePath):
        fetch_all(root / file for file in files if _suffix(file) == ".txt")
    rows = _all_rows(root, groups, unread, captions_needed=captions_file is None)
    return Table(str(root), ("video", "caption", "image", *COMPANIONS), rows, root)


def _group_files(root: Path, files: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return clips, images and captions by their name without suffix, and likewise the files that are none of these.

    A name is the same whether or not an accent is a character of its own.
    """
    groups, unread = {}, {}
    for file in files:
        is_read = _suffix(file) == ".txt" or is_clip(root / file)
        if is_read or not _is_side_file(file):
            name = normalize("NFC", os.path.splitext(file)[0])
            (groups if is_read else unread).setdefault(name, []).append(file)
    return groups, unread


def _all_rows(
    root: Path, groups: dict[str, list[str]], unread: Mapping[str, list[str]], *, captions_needed: bool
) -> Iterator[Row]:
    companions = {
        name: {kind: groups.pop(f"{name}.{kind}") for kind in kinds} for name, kinds in _companions(groups).items()
    }
    alone = [files[0] for files in groups.values() if len(files) == 1] if captions_needed else []
    frames = find_frames(alone)
    of_frames = {file for series in frames for file in series}
    for series in frames:
        # The caption beside a folder of frames has no other clip.
        groups.pop(os.path.dirname(series[0]), None)
        yield Row(str(root), {"video": series[0]}, describe_frames(root, series))
    for name, files in groups.items():
        if files[0] not in of_frames:
            for row in _rows(root, name, files, unread.get(name, ()), captions_needed):
                own = companions.get(name, {})
                several = [kind for kind in own if len(own[kind]) > 1]
                problem = f"has several {several[0]}s beside it: {', '.join(own[several[0]])}" if several else None
                first = {kind: own.get(kind, [None])[0] for kind in COMPANIONS}
                yield replace(row, values={**row.values, **first}, problem=row.problem or problem)


def _companions(groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return what each clip has beside it, by its name: a control, a mask, which have no caption of their own."""

    def is_there(name: str) -> bool:
        own = groups.get(name)
        return bool(own) and not any(_suffix(file) == ".txt" for file in own)

    return {name: [kind for kind in COMPANIONS if is_there(f"{name}.{kind}")] for name in groups}


def visible_files(root: Path) -> Iterator[str]:
    """Yield files as paths below root, without hidden ones. Each folder is read once, even if links form a cycle."""
    if isinstance(root, RemotePath):
        yield from _visible_in_store(root.list_files(remember=True))
        return
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
            if name[0] != ".":
                yield (Path(folder) / name).relative_to(root).as_posix()


def _visible_in_store(files: Sequence[str]) -> Iterator[str]:
    ours = {os.path.dirname(file) for file in files if os.path.basename(file) in ("prepared.json", "plan.csv")} - {""}
    for file in files:
        folders = {str(folder) for folder in PurePosixPath(file).parents}
        if ours.isdisjoint(folders) and not any(part[0] == "." for part in file.split("/")):
            yield file


def _report_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_side_file(file: str) -> bool:
    name = os.path.basename(file).lower()
    return not _SIDE_FILES.isdisjoint((name, _suffix(name))) or os.path.splitext(name)[0] in _SIDE_NOTES


def _rows(root: Path, name: str, files: Sequence[str], unread: Sequence[str], captions_needed: bool) -> Iterator[Row]:
    captions = [file for file in files if _suffix(file) == ".txt"]
    images = [file for file in files if _suffix(file) in IMAGE_SUFFIXES]
    videos = [file for file in files if file not in captions and file not in images]
    if not videos and not images:
        if unread:
            yield Row(captions[0], {"video": unread[0]}, "has a caption, but is not a readable video or image")
        elif name.lower() not in _SIDE_NOTES:
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


def find_frames(files: Iterable[str]) -> list[list[str]]:
    """Return the series of still images whose names differ only in a number, each sorted by this number."""
    series = defaultdict(list)
    for file in files:
        prefix, _, suffix = _parts(file)
        if suffix.lower() in IMAGE_SUFFIXES:
            series[prefix, suffix].append(file)
    ordered = [sorted(one, key=_number) for one in series.values() if len(one) >= _FEWEST_FRAMES]
    return [one for one in ordered if _is_gapless(one) or _is_padded(one)]


def describe_frames(root: Path, series: Sequence[str]) -> str:
    """Return why a series of frames below `root` cannot be used, with the command that makes a clip of it."""
    prefix, first, suffix = _parts(series[0])
    start = os.path.join(root, prefix)
    if _is_gapless(series):
        number = f"%0{len(first)}d" if _is_padded(series) else "%d"
        frames = f"-start_number {_number(series[0])} -i {shlex.quote(start.replace('%', '%%') + number + suffix)}"
    else:  # ffmpeg would stop at the first gap
        frames = f"-pattern_type glob -i {shlex.quote(glob.escape(start) + '*' + suffix)}"
    clip = shlex.quote(start.rstrip("/_-. ") + ".mp4")
    return (
        f"{len(series)} numbered pictures are not a clip; make one, with the frame rate of their video, and move them "
        f"elsewhere: ffmpeg -framerate 8 {frames} -c:v libx264 -crf 12 -pix_fmt yuv444p {clip}"
    )


def describe_folder(folder: Path) -> str | None:
    """Return why a folder that is listed as a clip cannot be used, if it holds numbered frames."""
    if not os.path.isdir(folder):
        return None
    series = next(iter(find_frames(sorted(os.listdir(folder)))), None)
    return series and describe_frames(folder, series)


def _parts(file: str) -> tuple[str, str, str]:
    """Split a name into what is before its last number, the number, and the suffix; without a number all are empty."""
    match = re.fullmatch(r"(.*?)(\d+)(\.\w+)", file)
    return match.groups() if match else ("", "", "")


def _number(file: str) -> int:
    return int(_parts(file)[1])


def _is_gapless(series: Sequence[str]) -> bool:
    return all(_number(later) == _number(earlier) + 1 for earlier, later in pairwise(series))


def _is_padded(series: Sequence[str]) -> bool:
    """Return whether all numbers have the same length."""
    return len({len(_parts(file)[1]) for file in series}) == 1
