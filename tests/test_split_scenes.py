"""split_scenes.py: clips have exactly the frames of their scenes, as shown, and a run continues what is not done."""

import csv
import resource
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import split_scenes
from args import parse_prepare_args
from encoded_clips import ENCODINGS, all_frames, encode, ffmpeg, numbered_frame, numbers_of
from make_footage import make_footage
from planning.plan import plan_raw_clips
from video.io import read_frames
from video.probe import probe_video


SEED = 2
NUM_FRAMES = 8 * 24
UNCUT = ["--detector", "content", "--threshold", "255", "--min_seconds", "0.4", "--max_seconds", "0.9"]
UNCUT += ["--margin_frames", "0"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COGVIDEOX_FACTORY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Two drawn films of eight seconds, with scenes.csv."""
    folder = tmp_path_factory.mktemp("drawn") / "films"
    make_footage(folder, 2, 8 / 60, seed=SEED)
    return folder


@pytest.fixture(scope="module")
def split_once(films, tmp_path_factory) -> Path:
    """The output folder of these films."""
    out = tmp_path_factory.mktemp("split") / "out"
    split_scenes.main(["--data_root", str(films), "--output_dir", str(out)])
    return out


@pytest.fixture
def out(split_once, tmp_path) -> Path:
    return shutil.copytree(split_once, tmp_path / "out")


def run(root: Path, out: Path, *flags: str, code: int = 0) -> list[dict]:
    """Split footage; return the table of clips."""
    with pytest.raises(SystemExit, match=f"^{code}$") if code else nullcontext():
        split_scenes.main(["--data_root", str(root), "--output_dir", str(out), *flags])
    return table_of(out) if not code else []


def table_of(out: Path, name: str = "clips.csv") -> list[dict]:
    with open(out / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def truth(films: Path) -> list[tuple[str, int, int]]:
    with open(films / "scenes.csv", newline="") as file:
        return [(row["film"], int(row["start"]), int(row["end"])) for row in csv.DictReader(file)]


def states(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}


def test_each_scene_becomes_a_clip_of_exactly_its_frames(films, out):
    rows = table_of(out)
    found = [(Path(row["source"]).name, int(row["source_start"]), int(row["source_end"])) for row in rows]
    last = NUM_FRAMES
    planned = [(film, start + 2 * (start > 0), end - 2 * (end < last)) for film, start, end in truth(films)]
    assert found == [(film, start, end) for film, start, end in planned if end - start >= 60]
    for row, (_, start, end) in zip(rows, found, strict=True):
        clip, source = all_frames(out / row["video"]), all_frames(Path(row["source"]))[start:end]
        assert len(clip) == end - start
        assert np.abs(clip.astype(int) - source).mean() < 4
    skipped = table_of(out, "skipped_scenes.csv")
    assert len(rows) + len(skipped) == len(planned)
    sheets = [Image.open(sheet) for sheet in (out / "sheets").iterdir()]
    assert sum((sheet.height - 44) // 172 for sheet in sheets) == len(rows)


def test_the_summary_counts_clips_and_skipped_scenes(films, out, capsys):
    run(films, out)
    shown = capsys.readouterr().out
    cuts, clips = len(truth(films)) - 2, len(table_of(out))
    assert "2 of 2 films are done already" in shown
    assert f"2 films of 0:00:16, {cuts} cuts: {clips} clips of 0:00:1" in shown
    assert f"skipped scenes: {len(table_of(out, 'skipped_scenes.csv'))} too short" in shown


@pytest.mark.parametrize("name", ["open groups", "AVI", "transport stream", "VP8", "odd size"])
def test_frames_are_exact_in_every_encoding(tmp_path, name):
    file, options = ENCODINGS[name]
    (tmp_path / "films").mkdir()
    encode(tmp_path / "films" / file, **options)
    rows = run(tmp_path / "films" / file, tmp_path / "out", *UNCUT)
    numbers = [numbers_of(all_frames(tmp_path / "out" / row["video"])) for row in rows]
    assert numbers == [list(range(20)), list(range(20, 40)), list(range(40, 60))]


def test_clips_look_and_move_as_the_toolkit_shows_the_footage(tmp_path):
    times = [number * 40 + (number % 3) * 10 for number in range(60)]
    encode(tmp_path / "plain.mp4", times=times)
    as_is = ["-fps_mode", "passthrough", "-c:v", "libx264", "-qp", "0"]
    ffmpeg("-i", tmp_path / "plain.mp4", "-vf", "setsar=3/2", *as_is, tmp_path / "wide.mp4")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "wide.mp4", "-c", "copy", tmp_path / "film.mov")
    film = tmp_path / "film.mov"
    assert probe_video(film).rotation and probe_video(film).corrections and probe_video(film).frame_times
    row, *_ = run(film, tmp_path / "out", *UNCUT)
    clip, (start, end) = tmp_path / "out" / row["video"], (int(row["source_start"]), int(row["source_end"]))
    shown = read_frames(film, range(start, end))
    assert all_frames(clip).shape == shown.shape
    assert np.abs(all_frames(clip).astype(int) - shown).mean() < 4
    info = probe_video(clip)
    assert (info.rotation, info.corrections) == (0, ())
    assert np.abs(np.subtract(info.frame_times, probe_video(film).part(start, end).frame_times)).max() <= 1000


def test_interlaced_footage_is_deinterlaced(tmp_path):
    encode(tmp_path / "plain.mp4")
    interlaced = ["-vf", "tinterlace=interleave_top", "-flags", "+ildct+ilme", "-c:v", "libx264", "-x264opts", "tff=1"]
    ffmpeg("-i", tmp_path / "plain.mp4", *interlaced, tmp_path / "film.mp4")
    row, *_ = run(tmp_path / "film.mp4", tmp_path / "out", *UNCUT)
    shown = read_frames(tmp_path / "film.mp4", range(int(row["source_end"])))
    assert probe_video(tmp_path / "film.mp4").corrections
    assert np.abs(all_frames(tmp_path / "out" / row["video"]).astype(int) - shown).mean() < 4


def test_black_bars_are_cropped_and_black_scenes_skipped(tmp_path, capsys):
    parts = ["color=black:s=96x64:r=25:d=1", "testsrc=s=96x36:r=25:d=1"]
    inputs = [word for part in parts for word in ("-f", "lavfi", "-i", part)]
    ffmpeg(*inputs, "-filter_complex", "[1]pad=96:64:0:14[b];[0][b]concat", "-c:v", "libx264", tmp_path / "film.mp4")
    flags = ["--min_seconds", "0.5", "--margin_frames", "0"]
    (row,) = run(tmp_path / "film.mp4", tmp_path / "out", *flags, "--crop_bars")
    assert (row["height"], row["width"]) == ("32", "96")
    picture = read_frames(tmp_path / "film.mp4", range(25, 50))[:, 16:48]
    assert np.abs(all_frames(tmp_path / "out" / row["video"]).astype(int) - picture).mean() < 5
    assert [row["reason"] for row in table_of(tmp_path / "out", "skipped_scenes.csv")] == ["black"]
    assert "skipped scenes: 1 black" in capsys.readouterr().out


def test_a_run_continues_with_what_is_missing(films, out, capsys):
    rows, table = table_of(out), (out / "clips.csv").read_bytes()
    # As if killed in the second film, before its last clip.
    last = out / rows[-1]["video"]
    last.unlink()
    (out / "clips.csv").unlink()
    half = last.with_name(f".0123.partial.{last.name}")
    half.touch()
    next((out / "sources").glob("film-01-*")).unlink()
    before = states(out)
    before.pop(half.name)
    run(films, out)
    assert "1 of 2 films are done already" in capsys.readouterr().out
    after = states(out)
    assert after.keys() - before.keys() == {last.name}
    assert not half.exists()
    assert before.items() <= after.items()
    assert (out / "clips.csv").read_bytes() == table


def test_more_footage_is_added_and_removed_clips_stay_removed(films, out, tmp_path, capsys):
    rows = table_of(out)
    (out / rows[0]["video"]).unlink()
    more = shutil.copytree(films, tmp_path / "more")
    shutil.copy(more / "film-00.mp4", more / "copy.mp4")
    encode(more / "new.mp4", fps=25)
    assert run(more, out) == [
        *rows[1:],
        *[row for row in table_of(out) if Path(row["source"]).name == "new.mp4"],
    ]
    assert "film-00.mp4 is a copy of" in capsys.readouterr().out


def test_several_processes_write_the_same_clips(films, out, tmp_path):
    rows = run(films, tmp_path / "two", "--num_workers", "2")
    assert rows == table_of(out)
    for row in rows:  # the bits depend on the threads of the encoder
        clips = [all_frames(folder / row["video"]).astype(int) for folder in (tmp_path / "two", out)]
        assert np.abs(np.subtract(*clips)).mean() < 3


def test_other_flags_in_the_same_folder_are_refused(films, out, capsys):
    run(films, out, "--threshold", "2.5")  # the usual one, spelt out
    run(films, out, "--min_seconds", "1", code=2)
    expected = f"--output_dir: {out} has clips made with --min_seconds 2.5, not 1.0; pass the same flags"
    assert expected in capsys.readouterr().err


def test_flags_that_gave_no_clip_can_be_changed(films, tmp_path, capsys):
    run(films, tmp_path / "out", "--min_seconds", "50", "--max_seconds", "100", code=2)
    assert "lower --min_seconds" in capsys.readouterr().err
    assert run(films, tmp_path / "out")


def test_an_edited_table_is_not_replaced(films, out, capsys):
    table = out / "clips.csv"
    edited = table.read_text().splitlines(keepends=True)[:-1]
    table.write_text("".join(edited))
    run(films, out, code=2)
    assert f"--output_dir: {table} was edited or is not the table of split_scenes.py" in capsys.readouterr().err
    assert table.read_text() == "".join(edited)


def test_the_list_is_read_as_clips_of_these_frames(films, tmp_path, capsys):
    rows = run(films, tmp_path / "out", "--list")
    assert not (tmp_path / "out/clips").exists()
    assert list((tmp_path / "out/sheets").iterdir())
    flags = capsys.readouterr().out.split("prepare with: ")[1].split()
    with open(tmp_path / "out/clips.csv", newline="") as file:
        table = [row | {"caption": f"scene {number}"} for number, row in enumerate(csv.DictReader(file))]
    with open(tmp_path / "out/captioned.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    flags[1] = str(tmp_path / "out/captioned.csv")
    settings = parse_prepare_args([*flags, "--output_dir", str(tmp_path / "p"), "--fps", "8", "--frame_buckets", "17"])
    data = plan_raw_clips(settings.sources, settings.clips)
    assert data.bad == []
    assert [(sample.frame_indices[0], sample.info.num_frames) for sample in data.clips] == [
        (int(row["start_frame"]), int(row["end_frame"]) - int(row["start_frame"])) for row in rows
    ]
    assert all(sample.shown_fps == 8 for sample in data.clips)
    sample = data.clips[-1]
    truth = all_frames(sample.clip.video)[list(sample.frame_indices)]
    assert (read_frames(sample.clip.video, sample.frame_indices, seekable=sample.info.seekable) == truth).all()


def test_footage_that_cannot_be_read_is_named(films, tmp_path, capsys):
    films = shutil.copytree(films, tmp_path / "films")
    (films / "broken.mp4").write_bytes(b"no video")
    Image.fromarray(numbered_frame(3)).save(films / "cover.png")  # beside a film, and ignored
    run(films, tmp_path / "out", code=2)
    error = capsys.readouterr().err
    assert (
        f"1 of 3 clips cannot be used; fix or remove them, or skip them with --on_bad_clip skip:\n  {films}" in error
    )
    assert not (tmp_path / "out").exists()
    rows = run(films, tmp_path / "out", "--on_bad_clip", "skip")
    assert len({row["source"] for row in rows}) == 2
    assert "broken.mp4" in (tmp_path / "out/skipped_clips.csv").read_text()


def test_a_film_that_does_not_decode_does_not_stop_the_others(films, tmp_path, capsys):
    films = shutil.copytree(films, tmp_path / "films")
    content = bytearray((films / "film-00.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 9000] = bytes(9000)
    (films / "film-00.mp4").write_bytes(content)
    run(films, tmp_path / "out", "--on_bad_clip", "error", code=2)
    shown = capsys.readouterr()
    assert "film-00.mp4" in shown.err and "--on_bad_clip skip" in shown.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_root", "films"], "--output_dir: required"),
        (["--data_root", "gone", "--output_dir", "out"], "--data_root: gone does not exist"),
        (["--data_root", "films", "--output_dir", "films/out"], "--output_dir: films/out is in --data_root"),
        (["--data_root", "films", "--output_dir", "out", "--max_seconds", "3"], "--max_seconds: 3 is less than twice"),
        (["--data_root", "films", "--output_dir", "out", "--list", "--crop_bars"], "--crop_bars: not possible with"),
        (["--data_root", "films", "--output_dir", "films.txt/out"], "--output_dir: '"),
        (["--data_root", "films", "--output_dir", "out"], "--data_root: films has no videos"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    (tmp_path / "films/notes.txt").touch()
    (tmp_path / "films.txt").touch()
    with pytest.raises(SystemExit, match=r"^2$"):
        split_scenes.main(flags)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_footage_without_a_long_scene_is_an_error_with_the_reasons(films, tmp_path, capsys):
    run(films, tmp_path / "out", "--min_seconds", "20", "--max_seconds", "40", code=2)
    shown = capsys.readouterr()
    assert "error: there are no clips: see" in shown.err and "lower --min_seconds" in shown.err
    assert len(table_of(tmp_path / "out", "skipped_scenes.csv")) == len(truth(films))


def test_a_full_disk_is_one_line_and_the_next_run_continues(films, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        run(films, tmp_path / "out", code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "finished work is kept: run again" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob(".*.partial.*"))
    for row in run(films, tmp_path / "out"):
        assert len(all_frames(tmp_path / "out" / row["video"])) == int(row["source_end"]) - int(row["source_start"])
