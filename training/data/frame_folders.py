"""Find folders of numbered frames, which are not clips, and say how to make clips of them."""

import glob
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from data.media_cache import IMAGE_SUFFIXES


_FEWEST_FRAMES = 5  # fewer numbered pictures may be anything


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
