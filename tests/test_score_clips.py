"""score_clips.py measures clips into a table that --keep chooses by, and into a page."""

import csv
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_dataset
import score_clips
from args import parse_prepare_args, parse_score_args
from clip_lists import write, write_table
from common.errors import UserError
from data.buckets import Bucket
from data.clips import Clip, ClipSample
from footage.score_page import decile_rows
from footage.scoring import Measures
from footage.scoring import score_clips as score_clips_in_processes
from onnx_models import mean_model
from planning.plan import plan_raw_clips
from repository import TRAINING
from video.io import write_video
from video.probe import VideoInfo


HEIGHT, WIDTH = 96, 144


def picture(seed: int) -> np.ndarray:
    """Smooth coloured noise, uint8 [H, 2 W, 3]."""
    cells = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 8, WIDTH // 4, 3), np.uint8)
    return np.asarray(Image.fromarray(cells).resize((2 * WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def pan(seed: int, pixels: int, frames: int = 17) -> list[np.ndarray]:
    """Move over a picture by some pixels a frame."""
    return [picture(seed)[:, i * pixels : i * pixels + WIDTH] for i in range(frames)]


@pytest.fixture
def clips(tmp_path, monkeypatch) -> Path:
    """A pan at 2 pixels a frame, the same at half size, a photograph as a clip, and a picture; without captions."""
    monkeypatch.setenv("COGVIDEOX_FACTORY_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "clips"
    folder.mkdir()
    write_video(folder / "pan.mp4", pan(0, 2), 8)
    smaller = [np.asarray(Image.fromarray(frame).resize((WIDTH // 2, HEIGHT // 2))) for frame in pan(0, 2)]
    write_video(folder / "pan-small.mp4", smaller, 8)
    write_video(folder / "photo.mp4", pan(1, 0), 8)
    Image.fromarray(pan(2, 0, 1)[0]).save(folder / "picture.png")
    return folder


def score(folder: Path, *flags: str, code: int = 0) -> dict[str, dict[str, str]]:
    """Score a folder in this process; return the rows of its table by clip."""
    with pytest.raises(SystemExit, match=f"^{code}$") if code else nullcontext():
        score_clips.main(["--data_root", str(folder), "--num_workers", "1", *flags])
    return rows_of(folder / "scores.csv")


def rows_of(table: Path) -> dict[str, dict[str, str]]:
    if not table.exists():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {row["video"]: row for row in csv.DictReader(file)}


def test_every_clip_has_its_scores(clips, capsys):
    rows = score(clips)
    assert list(rows) == ["pan-small.mp4", "pan.mp4", "photo.mp4", "picture.png"]
    speed = 100 * 2 * 8 / np.hypot(HEIGHT, WIDTH)
    for name in ("pan.mp4", "pan-small.mp4"):
        assert float(rows[name]["motion"]) == pytest.approx(speed, rel=0.1)
    assert float(rows["photo.mp4"]["motion"]) < 0.1
    assert [row["still"] for row in rows.values()] == ["0", "0", "1", ""]
    assert rows["picture.png"]["motion"] == ""
    assert [(row["group"], row["duplicate"]) for row in rows.values()] == [
        ("1", "1"),
        ("1", "0"),
        ("", "0"),
        ("", "0"),
    ]
    shown = [rows["pan.mp4"][name] for name in ("frames", "seconds", "fps", "height", "width", "black")]
    assert shown == ["17", "2.125", "8", "96", "144", "0"]
    luma = picture(0)[:, :WIDTH].astype(float) @ (0.299, 0.587, 0.114)
    assert float(rows["pan.mp4"]["exposure"]) == pytest.approx(luma.mean(), rel=0.05)
    assert "text" not in rows["pan.mp4"]
    assert f"prepare_dataset.py --data_root {clips} --keep 'motion > 0.2" in capsys.readouterr().out


def test_the_printed_command_reads_the_same_clips():
    flags = ["--dataset_file", "films.csv", "--caption_column", "words", "--allow_outside_paths"]
    command = score_clips.keep_command(parse_score_args(flags), Path("scores.csv"))
    assert f"prepare_dataset.py {' '.join(flags)} --keep" in command


def test_clips_that_did_not_change_are_not_measured_again(clips):
    first = score(clips)
    damaged = clips / "photo.mp4"
    times = damaged.stat().st_atime_ns, damaged.stat().st_mtime_ns
    damaged.write_bytes(bytes(damaged.stat().st_size))
    os.utime(damaged, ns=times)
    assert score(clips) == first  # although the file cannot be decoded
    os.utime(damaged)
    assert score(clips, "--on_bad_clip", "skip").keys() == first.keys() - {"photo.mp4"}


def test_scores_that_are_asked_for_later_are_added(clips, tmp_path):
    first = score(clips)
    model = mean_model(tmp_path / "mean.onnx")
    rows = score(clips, "--text", "--aesthetic_model", str(model))
    for name, row in rows.items():
        assert {column: row[column] for column in first[name]} == first[name]
        assert float(row["aesthetic"]) == pytest.approx(float(row["exposure"]) / 255, abs=0.1)
        assert float(row["text"]) == 0


def test_a_clip_that_does_not_decode_is_named_and_the_others_are_scored(clips, capsys):
    write(clips / "empty.mp4", b"")
    assert score(clips, code=2) == {}
    assert "empty.mp4" in capsys.readouterr().err
    assert len(score(clips, "--on_bad_clip", "skip")) == 4


def test_skipped_frames_are_not_measured(clips):
    titles = [np.zeros_like(frame) for frame in pan(0, 0, 8)]
    write_video(clips / "titled.mp4", [*titles, *pan(3, 2)], 8)
    assert float(score(clips)["titled.mp4"]["black"]) > 0
    assert score(clips, "--skip_frames_start", "8")["titled.mp4"]["black"] == "0"


def test_a_table_of_the_user_is_not_overwritten(clips, capsys):
    table = write_table(clips / "scores.csv", [{"video": "pan.mp4", "sha256": "", "my_rating": "5"}])
    score(clips, code=2)
    assert "has the columns my_rating, so score_clips.py did not write it" in capsys.readouterr().err
    assert "my_rating" in table.read_text()


def test_the_page_contains_a_picture_of_every_clip_and_what_thresholds_keep(clips):
    score(clips)
    page = (clips / "scores.html").read_text(encoding="utf-8")
    assert all(f"</strong> {name}</figcaption>" in page for name in ("pan.mp4", "photo.mp4", "picture.png"))
    assert page.count("data:image/jpeg") > 8
    assert page.count("<svg") == 6  # motion, still, sharpness, exposure, clipping, black
    assert "motion &gt; " in page and "group 1, duplicate 1" in page


def test_deciles_say_how_many_clips_a_threshold_keeps():
    rows = decile_rows(range(1, 101), "motion")
    assert rows[0] == ("motion > 10.9", "90 (90%)", "10 (10%)")
    assert rows[-1] == ("motion > 90.1", "10 (10%)", "90 (90%)")
    assert decile_rows([0] * 50, "black") == [("black > 0", "0 (0%)", "0 (0%)")]


def prepare_flags(clips: Path, *flags: str) -> list[str]:
    places = ["--model_id", "org/name", "--data_root", str(clips), "--output_dir", str(clips.parent / "out")]
    return [*places, "--height_buckets", "96", "--width_buckets", "144", "--frame_buckets", "1", "17", *flags]


def test_preparation_keeps_what_fulfils_the_condition(clips):
    for name in ("pan", "pan-small", "photo", "picture"):
        write(clips / f"{name}.txt", name)
    score(clips)
    settings = parse_prepare_args(prepare_flags(clips, "--keep", "duplicate == 0 and (motion > 1 or frames == 1)"))
    data = plan_raw_clips(settings.sources, settings.clips)
    assert data.captions == ["pan", "picture"]
    assert [clip.reason.split(":")[0] for clip in data.dropped] == ["dropped by --keep"] * 2
    assert (data.bad, data.num_listed) == ([], 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "motion >"], '--keep: "motion >" cannot be read at its end (character 9)'),
        (["--keep", "motino > 1"], "did you mean motion?"),
        (["--keep", "motion > 99"], "--keep drops all 4 clips"),
        (["--scores", "scores.csv"], "--scores: no effect without --keep"),
    ],
)
def test_a_condition_that_cannot_be_used_is_refused_before_anything_loads(clips, capsys, flags, message):
    for name in ("pan", "pan-small", "photo", "picture"):
        write(clips / f"{name}.txt", name)
    score(clips)
    with pytest.raises(SystemExit, match=r"^2$"):
        prepare_dataset.main(prepare_flags(clips, *flags))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_root", "clips", "--output_file", "scores.txt"], "--output_file: scores.txt must end in .csv"),
        (["--dataset_name", "org/name"], "--output_file: required with --dataset_name"),
        (["--data_root", "clips", "--keep", "motion > 1"], "--keep: unknown flag"),
        (["--data_root", "clips", "--duplicate_bits", "33"], "--duplicate_bits: 33 is too large"),
    ],
)
def test_flags_are_checked(capsys, flags, message):
    with pytest.raises(SystemExit, match=r"^2$"):
        parse_score_args(flags)
    assert message in capsys.readouterr().err


def start(folder: Path) -> subprocess.Popen:
    argv = [sys.executable, TRAINING / "score_clips.py", "--data_root", folder, "--num_workers", "2"]
    return subprocess.Popen(argv, start_new_session=True, stderr=subprocess.PIPE, text=True)


def num_scored(cache: Path) -> int:
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{cache}/files.sqlite?mode=ro", uri=True)) as facts:
        return facts.execute("SELECT COUNT(*) FROM facts WHERE kind LIKE 'scores %'").fetchone()[0]
    return 0


@pytest.mark.slow
def test_a_killed_run_in_several_processes_continues(clips, tmp_path):
    for number in range(30):
        (clips / f"copy-{number}.mp4").write_bytes((clips / "pan.mp4").read_bytes())
    killed = start(clips)
    while not num_scored(tmp_path / "cache"):
        assert killed.poll() is None, killed.stderr.read()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (clips / "scores.csv").exists()
    done = num_scored(tmp_path / "cache")
    assert 0 < done < 34
    finished = start(clips)
    finished.communicate()
    assert finished.returncode == 0
    assert num_scored(tmp_path / "cache") == 34
    rows = rows_of(clips / "scores.csv")
    assert len({row["motion"] for name, row in rows.items() if name.startswith("copy")}) == 1
    assert score(clips) == rows  # in one process


def test_the_clips_that_a_dead_process_worked_on_are_named(tmp_path):
    os.mkfifo(tmp_path / "waits.mp4")  # a worker that opens it waits until it is killed
    sample = ClipSample(Clip(tmp_path / "waits.mp4", "", ""), VideoInfo(9, 96, 144, 8.0), Bucket(1, 16, 16), (0,))

    def kill_worker() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.1)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_worker)
    killer.start()
    with pytest.raises(UserError, match=r"a process died while it scored one of these clips(.|\n)*waits\.mp4"):
        score_clips_in_processes([sample] * 4, Measures(), (0, 0), num_workers=2)
    killer.join()
