"""The overlap of a drawn video with its control is 1, and falls when the shape is elsewhere."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_files import write_mp4
from make_control_clips import draw_controlled_clips
from measure_control import measure, overlap, read_frames, silhouettes
from shapes import draw_shape


def test_a_clip_agrees_with_its_control_and_not_with_anothers(tmp_path):
    draw_controlled_clips(tmp_path / "clips", count=2, seed=0)
    (one, other), controls = (sorted((tmp_path / "clips" / kind).glob("*.mp4")) for kind in ("videos", "controls"))
    assert overlap(one, controls[0]) > 0.9
    assert overlap(one, controls[1]) < 0.5
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, (base, trained) in enumerate(((other, one), (one, other))):
        (videos / f"{number}-base.mp4").write_bytes(base.read_bytes())
        (videos / f"{number}.mp4").write_bytes(trained.read_bytes())
    measured = measure(videos, tmp_path / "clips/controls")
    assert measured["videos"] == 2 and measured["trained"] > 0.9 > 0.5 > measured["base"]
    with pytest.raises(FileExistsError):
        draw_controlled_clips(tmp_path / "clips", count=2, seed=0)


def test_the_overlap_is_the_intersection_over_the_union(tmp_path):
    for name, x in (("a", 30), ("b", 40)):  # squares of 20 x 20, half a side apart
        frame = draw_shape("square", (255, 255, 255), (0, 0, 0), (x, 32, 10), 64, 96)
        write_mp4(tmp_path / f"{name}.mp4", [frame] * 5, 8)
    assert overlap(tmp_path / "a.mp4", tmp_path / "b.mp4") == pytest.approx(1 / 3, abs=0.03)


def test_frames_before_the_first_one_to_compare_are_left_out(tmp_path):
    for name, start in (("a", 20), ("b", 60)):  # both end in the middle
        places = [(start + (40 - start) * index / 4, 32, 10) for index in range(5)]
        frames = [draw_shape("square", (255, 255, 255), (0, 0, 0), place, 64, 96) for place in places]
        write_mp4(tmp_path / f"{name}.mp4", frames, 8)
    assert overlap(tmp_path / "a.mp4", tmp_path / "b.mp4") < 0.5
    assert overlap(tmp_path / "a.mp4", tmp_path / "b.mp4", first=-1) > 0.95


def test_masked_and_given_pixels_are_compared_separately(tmp_path):
    for name, places in (("clip", (20, 76)), ("video", (20, 60))):  # the same on the left, apart on the right
        pair = [draw_shape("square", (255, 255, 255), (0, 0, 0), (x, 32, 8), 64, 96) for x in places]
        write_mp4(tmp_path / f"{name}.mp4", [np.maximum(*pair), np.zeros_like(pair[0])], 8)
    Image.fromarray(np.tile(np.repeat(np.uint8([0, 255]), 48), (64, 1))).save(tmp_path / "clip.mask.png")
    video, clip = tmp_path / "video.mp4", tmp_path / "clip.mp4"
    assert overlap(video, clip, masked=False) > 0.95
    assert overlap(video, clip, masked=True) < 0.05
    assert overlap(video, clip) == pytest.approx(1 / 3, abs=0.05)


def test_a_mask_hides_the_middle_of_a_straight_way(tmp_path):
    draw_controlled_clips(tmp_path / "clips", count=6, seed=0, straight=True)
    masks = (tmp_path / "clips/masks.txt").read_text().split()
    clips = [silhouettes(tmp_path / "clips/videos" / Path(mask).name.replace(".mask.png", ".mp4")) for mask in masks]
    for mask, clip in zip(masks, clips, strict=True):
        with Image.open(tmp_path / "clips" / mask) as image:
            hidden = (clip & (np.asarray(image) == 255)).sum(axis=(1, 2)) / clip.sum(axis=(1, 2))
        assert hidden[8] > 0.7 and max(hidden[0], hidden[-1]) < 0.3
    moves = {
        tuple(np.sign(np.subtract(*(np.argwhere(clip[at]).mean(axis=0).round() for at in (-1, 0))))) for clip in clips
    }
    assert len(moves) > 2 and all(0 in move for move in moves)


def test_the_ends_and_the_start_of_a_clip_are_its_frames(tmp_path):
    draw_controlled_clips(tmp_path / "clips", count=1, seed=0, start_frames=5)
    frames, start = (read_frames(tmp_path / f"clips/{name}/clip-000.mp4") for name in ("videos", "starts"))
    assert len(start) == 5 and np.abs(start - frames[:5]).mean() < 5
    for name, frame in (("first", frames[0]), ("last", frames[-1])):
        with Image.open(tmp_path / f"clips/ends/clip-000-{name}.png") as image:
            assert np.abs(np.asarray(image) - frame).mean() < 5
