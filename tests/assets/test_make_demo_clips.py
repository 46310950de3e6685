"""The drawn demo clips: frames match their captions."""

import csv
import math
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ImageColor

import make_demo_clips as make_demo_clips_script
import make_style_clips
import make_tiny_model
from clip_files import new_folder, write_mp4
from encoded_clips import all_frames
from make_demo_clips import make_demo_clips, plan_scenes


SHAPE_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
BACKGROUND_COLOURS = {name: name for name in ("white", "black", "grey", "beige")}
BACKGROUND_COLOURS |= {"light blue": "lightblue", "dark green": "darkgreen", "navy blue": "navy"}
# Part of the area of the box around it that a shape fills.
FILLED = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5}


@pytest.fixture(scope="module")
def clips(demo_clips) -> list[tuple[Path, str]]:
    return make_demo_clips(demo_clips, count=16)


def nearest(rgb: np.ndarray, names: dict[str, str]) -> str:
    return min(names, key=lambda name: np.abs(rgb - np.array(ImageColor.getrgb(names[name]))).sum())


def find_shape(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    background = np.median(np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]]), axis=0)
    return background, np.abs(frame.astype(int) - background).sum(axis=2) > 100


def centre(mask: np.ndarray) -> np.ndarray:
    """(y, x) of the centre of gravity, as fractions of the picture."""
    return np.argwhere(mask).mean(axis=0) / mask.shape


def test_there_are_as_many_clips_as_asked_for_and_the_lists_agree(demo_clips, clips):
    videos = (demo_clips / "videos.txt").read_text().splitlines()
    prompts = (demo_clips / "prompts.txt").read_text().splitlines()
    with (demo_clips / "metadata.csv").open(newline="") as file:
        rows = [(row["video"], row["caption"]) for row in csv.DictReader(file)]
    assert len(clips) == 16
    assert rows == list(zip(videos, prompts, strict=True))
    assert [(demo_clips / video, prompt) for video, prompt in rows] == clips
    assert sorted((demo_clips / "videos").iterdir()) == [path for path, _ in clips]


def test_sizes_lengths_and_frame_rates_differ(clips):
    sizes, lengths, rates, formats = set(), set(), set(), set()
    for path, _ in clips:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            sizes.add((stream.height, stream.width))
            rates.add(stream.average_rate)
            formats.add((stream.codec_context.name, stream.pix_fmt))
            lengths.add(sum(1 for _ in container.decode(video=0)))
    assert sizes == {(128, 192), (144, 208), (96, 160), (192, 128), (128, 128)}
    assert len(lengths) == 7
    assert (min(lengths), max(lengths)) == (49, 81)
    assert rates == {8, 16, 24, 25}
    assert formats == {("h264", "yuv420p")}


def test_colours_and_shapes_are_those_of_the_captions(clips):
    for path, caption in clips:
        words = caption.removeprefix("an ").removeprefix("a ").split()
        frame = all_frames(path)[0]
        background, mask = find_shape(frame)
        assert nearest(np.median(frame[mask], axis=0), {name: name for name in SHAPE_COLOURS}) == words[0], caption
        assert f"over a plain {nearest(background, BACKGROUND_COLOURS)} background" in caption
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        filled = mask.sum() / box
        assert min(FILLED, key=lambda shape: abs(FILLED[shape] - filled)) == words[1], caption


def test_motions_are_those_of_the_captions_and_plainly_visible(clips):
    seen = set()
    for path, caption in clips:
        frames = all_frames(path)
        first, last = find_shape(frames[0])[1], find_shape(frames[-1])[1]
        down, right = centre(last) - centre(first)
        growth = last.sum() / first.sum()
        steps = {
            "from left to right": right > 0.5 and abs(down) < 0.03,
            "from right to left": right < -0.5 and abs(down) < 0.03,
            "from top to bottom": down > 0.5 and abs(right) < 0.03,
            "from bottom to top": down < -0.5 and abs(right) < 0.03,
            "from the top left to the bottom right": down > 0.5 and right > 0.5,
            "from the bottom left to the top right": down < -0.5 and right > 0.5,
            "grows in the middle": growth > 4,
            "shrinks in the middle": growth < 1 / 4,
        }
        (said,) = [motion for motion in steps if motion in caption]
        assert [motion for motion, happened in steps.items() if happened] == [said], caption
        seen.add(said)
    assert seen == set(steps)


@pytest.mark.parametrize("seed", range(5))
def test_no_caption_comes_twice(seed):
    assert len({scene.caption for scene in plan_scenes(100, seed)}) == 100


def test_a_smaller_count_gives_the_first_of_the_same_scenes_and_another_seed_others():
    assert plan_scenes(5, seed=3) == plan_scenes(9, seed=3)[:5]
    assert plan_scenes(5, seed=3) != plan_scenes(5, seed=4)


def test_the_same_seed_gives_the_same_bytes(clips, tmp_path):
    for (path, caption), (other, same) in zip(make_demo_clips(tmp_path / "again", count=2), clips, strict=False):
        assert path.read_bytes() == other.read_bytes()
        assert caption == same


def test_a_second_run_says_so_and_touches_nothing(demo_clips, clips, capsys):
    before = {path: path.stat().st_mtime_ns for path in demo_clips.rglob("*")}
    make_demo_clips(demo_clips, count=16)
    assert "there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in demo_clips.rglob("*")} == before


@pytest.mark.parametrize(
    ("script", "flags"),
    [(make_demo_clips_script, []), (make_style_clips, []), (make_tiny_model, ["--kind", "5b"])],
    ids=["demo", "style", "model"],
)
def test_a_folder_with_anything_else_is_refused_in_one_line(tmp_path, monkeypatch, capsys, script, flags):
    (tmp_path / "prompts.txt").write_text("mine\n")
    monkeypatch.setattr(sys, "argv", ["script.py", *flags, "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert f"error: {tmp_path} already holds something else" in capsys.readouterr().err.splitlines()[-1]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("prompts.txt", "mine\n")]


def test_an_interrupted_folder_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "folder") as folder:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_of_frames_leaves_no_clip(tmp_path):
    def frames():
        yield np.zeros((32, 48, 3), dtype=np.uint8)
        raise ValueError("broken source")

    with pytest.raises(ValueError, match="broken source"):
        write_mp4(tmp_path / "clip.mp4", frames(), fps=8)
    assert list(tmp_path.iterdir()) == []


def test_a_fractional_frame_rate_is_kept(tmp_path):
    write_mp4(tmp_path / "clip.mp4", [np.zeros((32, 48, 3), dtype=np.uint8)] * 5, fps=Fraction(30000, 1001))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
