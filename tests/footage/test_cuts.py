"""The cuts of drawn films are found at their exact frames, and nothing else is taken for one."""

import numpy as np
import pytest

from clip_files import write_mp4
from encoded_clips import encode, ffmpeg
from footage.cuts import make_detector, survey_video
from make_footage import FPS, draw_shot, plan_film
from video.probe import probe_video


def survey(path, detector="adaptive", threshold=2.5, every=12):
    return survey_video(path, probe_video(path), make_detector(detector, threshold), glance_every=every)


def test_a_film_with_fades_and_fast_motion_is_cut_at_its_cuts_only(film):
    path, shots = film
    assert {"fast", "fade"} <= {shot.kind for shot in shots}
    assert survey(path).cuts == [shot.start for shot in shots[1:]]


@pytest.mark.parametrize(("seed", "frame"), [(0, 6280), (4, 6920)])
def test_hues_in_the_dark_are_no_cuts(tmp_path, seed, frame):
    # Fades in which PySceneDetect alone finds two cuts each.
    shot = next(shot for shot in plan_film(14400, seed) if shot.start <= frame < shot.end)
    write_mp4(tmp_path / "fade.mp4", draw_shot(shot), FPS)
    assert survey(tmp_path / "fade.mp4", threshold=2.5).cuts == []


def test_scenes_of_a_few_frames_are_told_apart(tmp_path):
    colours = ["red", "white", "navy", "yellow"]
    inputs = [word for colour in colours for word in ("-f", "lavfi", "-i", f"color={colour}:s=64x48:r=25:d=0.2")]
    ffmpeg(*inputs, "-filter_complex", "concat=n=4", "-c:v", "libx264", tmp_path / "short.mp4")
    assert survey(tmp_path / "short.mp4", "content", 27.0).cuts == [5, 10, 15]


def test_frames_are_counted_not_timed(tmp_path):
    times = [*range(0, 400, 40), *range(1000, 11000, 1000)]  # milliseconds
    clip = encode(tmp_path / "slow.mp4", frames=20, times=times)
    # Between 15 and 16, five of eight bars change; elsewhere at most four.
    assert survey(clip, "content", 30.0).cuts == [16]


def test_a_glance_has_the_brightest_value_of_each_row_and_column_as_shown(tmp_path):
    box = "drawbox=x=8:y=4:w=16:h=10:color=white:t=fill"
    lossless = ["-frames:v", "5", "-c:v", "libx264", "-qp", "0"]
    ffmpeg("-f", "lavfi", "-i", "color=black:s=64x32", "-vf", f"{box},setsar=2", *lossless, tmp_path / "wide.mp4")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "wide.mp4", "-c", "copy", tmp_path / "upright.mp4")
    glances = survey(tmp_path / "upright.mp4", every=2).glances
    assert [glance.index for glance in glances] == [0, 2, 4]
    rows, columns = glances[0].rows, glances[0].columns
    assert (len(rows), len(columns)) == (128, 32)
    bright_rows, bright_columns = np.flatnonzero(rows > 200), np.flatnonzero(columns > 200)
    # Stretched to twice the width and turned left, the 16 columns from 8 on are the 32 rows up to 128 - 2 * 8.
    assert abs(bright_rows[0] - 80) <= 1 and abs(bright_rows[-1] - 111) <= 1
    assert bright_columns.tolist() == list(range(4, 14))


def test_damage_is_named_with_the_frame(film, tmp_path):
    path, _ = film
    content = bytearray(path.read_bytes())
    info = probe_video(path)
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4: (cannot be decoded after \d+ frames|has \d+ frames instead of)"):
        survey_video(tmp_path / "cut.mp4", info, make_detector("adaptive", 3.0), glance_every=12)
