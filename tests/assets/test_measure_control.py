"""The overlap of a drawn video with its control is 1, and falls when the shape is elsewhere."""

import av
import numpy as np
import pytest
from PIL import Image

from clip_files import write_mp4
from make_control_clips import draw_controlled_clips
from measure_control import measure, overlap
from shapes import draw_shape


def test_a_clip_agrees_with_its_control_and_not_with_anothers(tmp_path):
    draw_controlled_clips(tmp_path / "clips", count=2, seed=0)
    (one, other), controls = (sorted((tmp_path / "clips" / kind).iterdir()) for kind in ("videos", "controls"))
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


def test_only_the_last_frames_are_compared_on_request(tmp_path):
    for name, start in (("a", 20), ("b", 60)):  # both end in the middle
        places = [(start + (40 - start) * index / 4, 32, 10) for index in range(5)]
        frames = [draw_shape("square", (255, 255, 255), (0, 0, 0), place, 64, 96) for place in places]
        write_mp4(tmp_path / f"{name}.mp4", frames, 8)
    assert overlap(tmp_path / "a.mp4", tmp_path / "b.mp4") < 0.5
    assert overlap(tmp_path / "a.mp4", tmp_path / "b.mp4", last_frame=True) > 0.95


def test_the_ends_of_a_clip_are_its_first_and_last_frame(tmp_path):
    draw_controlled_clips(tmp_path / "clips", count=1, seed=0)
    with av.open(str(tmp_path / "clips/videos/clip-000.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    for name, frame in (("first", frames[0]), ("last", frames[-1])):
        with Image.open(tmp_path / f"clips/ends/clip-000-{name}.png") as image:
            assert np.abs(np.asarray(image) - frame).mean() < 5
