"""Clips are joined with their scores by path, and chosen by a condition."""

from pathlib import Path

import pytest

from clip_lists import write_table
from common.errors import UserError
from data.clips import Clip
from data.rows import DataSource
from planning.keep import keep_clips
from video.probe import VideoInfo


ROWS = [
    {"video": "a.mp4", "motion": "0.1", "sharpness": "50", "sha256": "aa"},
    {"video": "sub/b.mp4", "motion": "2", "sharpness": "", "sha256": ""},
]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_table(tmp_path / "clips/scores.csv", ROWS)
    return tmp_path / "clips"


def keep(folder: Path, condition: str, *videos: Path | str, **source) -> tuple[list[str], list[str], list[str]]:
    """Return the kept clips, and the dropped and unscored ones with their reasons."""
    clips = [Clip(folder / video, "caption", f"list:{number}") for number, video in enumerate(videos, 1)]
    infos = {clip.video: VideoInfo(9, 64, 96, 8.0, sha256=clip.video.stem * 2) for clip in clips}
    kept, *others = keep_clips(clips, infos, DataSource(folder, keep=condition, **source))
    return [clip.video.name for clip in kept], *([one.reason for one in clips] for clips in others)


def error_of(*arguments, **source) -> str:
    with pytest.raises(UserError) as raised:
        keep(*arguments, **source)
    return str(raised.value)


def test_each_clip_is_kept_or_dropped_with_its_scores(folder):
    videos = ("a.mp4", "sub/b.mp4")
    assert keep(folder, "motion > 1", *videos) == (["b.mp4"], ["dropped by --keep: motion is 0.1"], [])
    reason = "dropped by --keep: sharpness is empty, motion is 2"
    assert keep(folder, "sharpness > 40 and motion < 1", *videos) == (["a.mp4"], [reason], [])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".tsv"])
def test_another_table_may_be_named_whose_paths_start_from_its_folder(folder, tmp_path, suffix):
    (folder / "scores.csv").unlink()
    table = write_table(tmp_path / f"mine/rating{suffix}", [{"video": "../clips/a.mp4", "rating": "7.5"}])
    assert keep(folder, "rating > 7", "a.mp4", scores=table)[0] == ["a.mp4"]
    assert "rating" in error_of(folder, "motion > 7", "a.mp4", scores=table)


def test_a_clip_has_the_scores_of_the_file_that_links_lead_to(folder):
    (folder / "a.mp4").touch()
    (folder / "link").symlink_to(folder)
    assert keep(folder, "motion < 1", "link/a.mp4")[0] == ["a.mp4"]


def test_kept_clips_have_their_scores_beside_their_own_columns(folder):
    clip = Clip(folder / "a.mp4", "", "list:1", metadata={"motion": "mine", "camera": "fixed"})
    infos = {clip.video: VideoInfo(9, 64, 96, 8.0, sha256="aa")}
    ((kept,), *_) = keep_clips([clip], infos, DataSource(folder, keep="motion < 1 and sharpness > 1"))
    assert kept.metadata == {"motion": "mine", "camera": "fixed", "sharpness": "50"}


def test_parts_of_one_file_have_their_own_scores(folder):
    parts = [
        {**ROWS[0], "start_frame": str(start), "end_frame": end, "motion": str(start)}
        for start, end in ((0, "9"), (9, ""))
    ]
    write_table(folder / "scores.csv", parts)
    clips = [Clip(folder / "a.mp4", "", end, start_frame=0 if end else 9, end_frame=end) for end in (9, None)]
    infos = {clips[0].video: VideoInfo(20, 64, 96, 8.0, sha256="aa")}
    kept, dropped, unscored = keep_clips(clips, infos, DataSource(folder, keep="motion > 5"))
    assert ([clip.end_frame for clip in kept], len(dropped), unscored) == ([None], 1, [])


def test_clips_without_valid_scores_are_named(folder):
    table = folder / "scores.csv"
    assert keep(folder, "motion > 0", "c.mp4")[2] == [f"has no scores ({table}); run score_clips.py again"]
    write_table(table, [{**ROWS[0], "sha256": "other"}])
    reason = f"has changed since it was scored ({table}); run score_clips.py again"
    assert keep(folder, "motion > 0", "a.mp4")[2] == [reason]


def test_two_rows_for_a_clip_are_refused(folder):
    write_table(folder / "scores.csv", [*ROWS, {**ROWS[0], "motion": "9"}])
    assert error_of(folder, "motion > 1", "a.mp4").endswith(f"a second row for {folder}/a.mp4; remove one of them")


def test_a_clip_that_cannot_be_read_is_bad_for_that_reason_only(folder):
    clip = Clip(folder / "c.mp4", "caption", "list:1")
    source = DataSource(folder, keep="motion > 5")
    assert keep_clips([clip], {clip.video: "file is empty"}, source) == ([clip], [], [])


def test_the_nearest_of_all_columns_is_named(folder):
    message = error_of(folder, "sharpness > 1 and motoin > 2", "a.mp4")
    assert "names 'motoin' (character 19)" in message
    assert message.endswith("did you mean motion? It has motion, sharpness")


def test_what_cannot_be_read_is_named(folder):
    assert "cannot be read at '=' (character 8)" in error_of(folder, "motion =", "a.mp4")
    write_table(folder / "scores.csv", [{**ROWS[0], "motion": "fast"}])
    assert "scores.csv:2: its motion is 'fast', not a number" in error_of(folder, "motion > 1", "a.mp4")
    write_table(folder / "scores.csv", [{"path": "a.mp4", "motion": "1"}])
    assert "has no column 'video'" in error_of(folder, "motion > 1", "a.mp4")
    (folder / "scores.csv").unlink()
    assert f"{folder / 'scores.csv'} does not exist; write it with score_clips.py" in error_of(
        folder, "a > 1", "a.mp4"
    )


def test_a_data_set_without_a_folder_needs_the_table_named(tmp_path):
    with pytest.raises(UserError, match="pass the table as --scores"):
        keep_clips([], {}, DataSource(None, dataset_name="org/name", keep="motion > 1"))
