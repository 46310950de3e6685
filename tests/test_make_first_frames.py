"""make_first_frames.py writes the clips' own pixels, keeps edits, and lists the same clips with images."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import make_first_frames
from data.sources import DataSource, read_clips
from encoded_clips import all_frames, encode, ffmpeg, numbered_frame
from repository import TRAINING


@pytest.fixture
def clips(tmp_path, monkeypatch) -> Path:
    """Two clips and a still image, listed in a table with another column."""
    monkeypatch.setenv("COGVIDEOX_FACTORY_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "clips"
    (folder / "a").mkdir(parents=True)
    encode(folder / "a" / "walk.mp4", frames=20)
    encode(folder / "run.mkv", frames=12)
    Image.fromarray(numbered_frame(200)).save(folder / "still.png")
    write_table(folder, walk={}, run={}, still={})
    return folder


def write_table(folder: Path, **extra: dict) -> None:
    files = {"walk": "a/walk.mp4", "run": "run.mkv", "still": "still.png"}
    lines = []
    for name, values in extra.items():
        usual = {"caption": f"They {name},\nand “so on”.", "camera": "fixed"}
        lines.append(json.dumps({"video": files.get(name, f"{name}.mp4"), **usual, **values}) + "\n")
    (folder / "list.jsonl").write_text("".join(lines))


def run(clips: Path, *flags: str, code: int = 0) -> list[dict]:
    """Make the first frames in "frames" beside the clips; return the table."""
    argv = ["--dataset_file", str(clips / "list.jsonl"), "--output_dir", str(frames_of(clips)), *flags]
    with pytest.raises(SystemExit, match=f"^{code}$") if code else nullcontext():
        make_first_frames.main(argv)
    if code:
        return []
    return [json.loads(line) for line in (frames_of(clips) / "metadata.jsonl").read_text().splitlines()]


def frames_of(clips: Path) -> Path:
    return clips.parent / "frames"


def pixels(image: str) -> np.ndarray:
    assert image.endswith(".png")
    return np.asarray(Image.open(image))


def test_flags_of_a_hub_data_set_need_its_name(clips, capsys):
    run(clips, "--dataset_streaming", code=2)
    assert "--dataset_streaming: no effect without --dataset_name" in capsys.readouterr().err


@pytest.mark.parametrize("skipped", [0, 7])
def test_the_image_is_the_first_frame_that_is_not_skipped(clips, skipped):
    walk, run_, still = run(clips, "--skip_frames_start", str(skipped))
    assert np.array_equal(pixels(walk["image"]), all_frames(clips / "a" / "walk.mp4")[skipped])
    assert np.array_equal(pixels(run_["image"]), all_frames(clips / "run.mkv")[skipped])
    assert np.array_equal(pixels(still["image"]), numbered_frame(200))


def test_the_image_of_a_mirrored_clip_with_wide_pixels_is_the_frame_as_shown(clips):
    write_table(clips, walk={}, shown={"video": "shown.mp4"})
    filters = ["-vf", "setsar=3/2", "-c:v", "libx264", "-qp", "0", clips / "wide.mp4"]
    ffmpeg("-i", clips / "a" / "walk.mp4", "-frames:v", "6", *filters)
    ffmpeg("-display_hflip", "-i", clips / "wide.mp4", "-c", "copy", clips / "shown.mp4")
    walk, shown = (pixels(row["image"]).astype(int) for row in run(clips, "--skip_frames_start", "5"))
    assert shown.shape == (48, 120, 3)
    middles = shown[:, 1::3]  # every second pixel of those stored, in its middle
    assert np.abs(middles - walk[:, ::-1][:, 1::2])[:, 4:-4].mean() < 12


def test_the_printed_flags_read_a_table_of_the_same_clips_with_images(clips, capsys):
    run(clips)
    told = capsys.readouterr().out.split("pass to prepare_dataset.py: ")[1].split()
    assert told == ["--dataset_file", str(frames_of(clips) / "metadata.jsonl"), "--data_root", str(clips)]
    cache = clips.parent / "cache"
    before, _ = read_clips(DataSource(None, clips / "list.jsonl"), cache)
    after, bad = read_clips(DataSource(clips, frames_of(clips) / "metadata.jsonl"), cache)
    assert bad == []
    assert [(clip.video, clip.caption) for clip in after] == [(clip.video, clip.caption) for clip in before]
    assert [clip.metadata for clip in after] == [{"camera": "fixed"}] * 3
    assert all(clip.image.parent == frames_of(clips) for clip in after)


def test_paths_are_absolute(clips, monkeypatch):
    monkeypatch.chdir(clips.parent)
    make_first_frames.main(["--dataset_file", "clips/list.jsonl", "--output_dir", "frames"])
    table = [json.loads(line) for line in Path("frames/metadata.jsonl").read_text().splitlines()]
    paths = [Path(row[name]) for row in table for name in ("video", "image")]
    assert all(path.is_absolute() and path.is_file() for path in paths)


def test_clips_need_no_captions_yet(clips, capsys):
    write_table(clips, walk={"caption": None}, run={})
    assert [row["caption"] for row in run(clips)] == ["", "They run,\nand “so on”."]
    assert "1 of 2 clips have no caption: write it into the table, or" in capsys.readouterr().out
    folder = clips.parent / "folder"
    folder.mkdir()
    encode(folder / "walk.mp4", frames=5)
    make_first_frames.main(["--data_root", str(folder), "--output_dir", str(clips.parent / "more")])
    assert len(list((clips.parent / "more").glob("walk-*.png"))) == 1


@pytest.mark.parametrize("output", [".", "frames", "a", "a/frames", ".."])
def test_a_folder_of_clips_is_refused(clips, capsys, output):
    (clips / "list.jsonl").unlink()
    before = sorted(clips.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        make_first_frames.main(["--data_root", str(clips), "--output_dir", str(clips / output)])
    assert f"pass a folder beside it, such as {clips}-first-frames" in capsys.readouterr().err
    assert sorted(clips.rglob("*")) == before


def test_a_folder_below_that_of_the_table_is_used_if_it_has_no_clips(clips):
    write_table(clips, walk={})
    make_first_frames.main(["--dataset_file", str(clips / "list.jsonl"), "--output_dir", str(clips / "frames")])
    assert len(list((clips / "frames").glob("*.png"))) == 1
    with pytest.raises(SystemExit, match="2"):
        make_first_frames.main(["--dataset_file", str(clips / "list.jsonl"), "--output_dir", str(clips / "a/frames")])


def test_a_clip_with_an_image_keeps_it(clips):
    write_table(clips, walk={"image": "still.png"}, run={})
    walk, run_ = run(clips)
    assert walk["image"] == str(clips / "still.png")
    assert [path.name for path in frames_of(clips).glob("*.png")] == [Path(run_["image"]).name]


def test_an_edited_image_survives_a_second_run(clips):
    image = run(clips)[0]["image"]
    Image.fromarray(numbered_frame(5)).save(image)
    (frames_of(clips) / "metadata.jsonl").unlink()
    assert run(clips)[0]["image"] == image
    assert np.array_equal(pixels(image), numbered_frame(5))


def test_a_changed_clip_gets_a_new_image(clips):
    earlier = run(clips)[0]["image"]
    encode(clips / "a" / "walk.mp4", frames=15, height=64)
    (frames_of(clips) / "metadata.jsonl").unlink()
    later = run(clips)[0]["image"]
    assert later != earlier
    assert pixels(later).shape[0] == 64


def test_clips_of_the_same_name_have_different_images(clips):
    encode(clips / "walk.mp4", frames=10, height=64)
    write_table(clips, walk={}, again={"video": "walk.mp4"})
    one, two = run(clips)
    assert pixels(one["image"]).shape != pixels(two["image"]).shape


def test_an_existing_table_is_not_overwritten(clips, capsys):
    run(clips)
    table = frames_of(clips) / "metadata.jsonl"
    table.write_text("weeks of work")
    run(clips, code=2)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"error: --output_dir: {table} already exists; remove it")
    assert table.read_text() == "weeks of work"


def test_all_unusable_clips_are_listed_before_anything_is_written(clips, capsys):
    write_table(clips, walk={}, gone={}, run={"image": "nowhere.png"})
    run(clips, code=2)
    _, title, *lines = capsys.readouterr().err.splitlines()
    assert title.startswith("error: 2 of 3 clips cannot be used")
    assert "gone.mp4 (list.jsonl:2): does not exist" in lines[0]
    assert "nowhere.png: does not exist" in lines[1]
    assert not frames_of(clips).exists()


def test_unusable_clips_can_be_skipped_and_listed(clips):
    write_table(clips, walk={}, gone={}, run={})
    assert [Path(row["video"]).name for row in run(clips, "--on_bad_clip", "skip")] == ["walk.mp4", "run.mkv"]
    skipped = (frames_of(clips) / "skipped_clips.csv").read_text().splitlines()
    assert skipped == ["clip,source,reason", f"{clips / 'gone.mp4'},list.jsonl:2,does not exist"]


def test_a_first_frame_that_does_not_decode_is_a_bad_clip(clips, capsys):
    encode(clips / "gone.mp4", g="10")
    with av.open(str(clips / "gone.mp4")) as container:
        first = next(container.demux(video=0))
    # The probe decodes only after the last keyframe, so that it finds no damage.
    content = bytearray((clips / "gone.mp4").read_bytes())
    content[first.pos : first.pos + first.size] = bytes(first.size)
    (clips / "gone.mp4").write_bytes(content)
    write_table(clips, walk={}, gone={})

    run(clips, code=2)
    assert f"{clips / 'gone.mp4'} (list.jsonl:2): " in capsys.readouterr().err.splitlines()[-1]
    assert not (frames_of(clips) / "metadata.jsonl").exists()

    assert [Path(row["video"]).name for row in run(clips, "--on_bad_clip", "skip")] == ["walk.mp4"]
    assert "gone.mp4,list.jsonl:2," in (frames_of(clips) / "skipped_clips.csv").read_text()


def test_a_folder_that_cannot_be_written_is_one_line(clips, capsys):
    run(clips, "--output_dir", str(clips / "still.png" / "frames"), code=2)
    _, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --output_dir: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", "frames"], "--data_root or --dataset_file or --dataset_name: required"),
        (["--data_root", "clips"], "--output_dir: required"),
        (["--data_root", "nowhere", "--output_dir", "frames"], "--data_root nowhere is not a folder"),
        (["--data_root", "clips", "--output_dir", "frames", "--id_token", "X"], "--id_token: unknown flag"),
    ],
)
def test_mistakes_in_the_flags_are_one_line_before_torch_is_imported(flags, message):
    code = f"""
import sys, make_first_frames
try:
    make_first_frames.main({flags!r})
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TRAINING, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
