"""The overlap of a drawn video with its control is 1, and falls when the shape is elsewhere."""

import pytest

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
