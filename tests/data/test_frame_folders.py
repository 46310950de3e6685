"""Numbered frames are found, and the command that makes a clip of them reads them all in order."""

import shlex
from pathlib import Path

import av
import pytest
from PIL import Image

from data.frame_folders import describe_folder, describe_frames, find_frames


def write_frames(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate(names):
        Image.new("L", (16, 16), 10 * shade).save(folder / name)
    return folder


def shades_of(command: str) -> list[int]:
    """Return the grey of each frame that FFmpeg reads with the input options of a command."""
    words = shlex.split(command)
    options = {words[at][1:]: words[at + 1] for at in range(words.index("-framerate"), words.index("-i"), 2)}
    with av.open(words[words.index("-i") + 1], format="image2", options=options) as container:
        return [int(frame.to_ndarray(format="gray")[0, 0]) for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        ([f"{number:04}.png" for number in range(8, 14)], ""),
        ([f"take 1%_{number}.png" for number in range(8, 14)], "take 1%"),
        ([f"{number:03}.png" for number in range(95, 125, 5)], ""),
    ],
)
def test_the_command_reads_all_frames_in_their_order(tmp_path, names, prefix):
    folder = write_frames(tmp_path / "my [clip]", *names)
    reason = describe_folder(folder)
    assert reason.startswith("6 numbered pictures are not a clip; make one")
    command = reason[reason.index("ffmpeg") :]
    assert shades_of(command) == [0, 10, 20, 30, 40, 50]
    clip = folder / f"{prefix}.mp4" if prefix else tmp_path / "my [clip].mp4"
    assert shlex.split(command)[-1] == str(clip)


def test_other_folders_and_files_are_no_frames(tmp_path):
    assert describe_folder(write_frames(tmp_path / "few", "1.png", "2.png")) is None
    assert describe_folder(write_frames(tmp_path / "named", *(f"{letter}.png" for letter in "abcdef"))) is None
    assert describe_folder(tmp_path / "few" / "1.png") is None
    assert find_frames(f"{number}.png" for number in (1, 5, 10, 20, 50, 100)) == []


def test_each_series_of_a_folder_is_found_sorted_by_number():
    files = [f"{name}{number}.jpg" for name in ("a", "sub/b") for number in range(12)]
    series = find_frames(sorted(files))
    assert series == [files[:12], files[12:]]
    assert describe_frames(Path("clips"), series[1]).endswith("clips/sub/b.mp4")
