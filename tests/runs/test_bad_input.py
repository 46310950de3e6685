"""Mistakes in files and flags: one clear message, exit code 2, before torch is imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clip_files import write_mp4
from repository import TRAINING


SCRIPTS = {
    "train": ("cogvideox_text_to_video_lora", "--pretrained_model_name_or_path"),
    "prepare": ("prepare_dataset", "--model_id"),
}


@pytest.fixture
def data(tmp_path) -> Path:
    """Three good clips and their lists."""
    folder = tmp_path / "data"
    (folder / "videos").mkdir(parents=True)
    names = [f"videos/{name}.mp4" for name in "abc"]
    for name in names:
        frames = (np.full((64, 96, 3), 8 * i, np.uint8) for i in range(20))
        write_mp4(folder / name, frames, 8)
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    (folder / "table.csv").write_text("video,caption\n" + "".join(f"{name},a caption\n" for name in names))
    return folder


def run(script: str, data: Path, *flags: str, model: str = "owner/name", output: str | None = None) -> tuple[int, str]:
    """Run a script in a child process; returns exit code and stderr. Fails if torch was imported."""
    module, model_flag = SCRIPTS[script]
    argv = [model_flag, model, "--data_root", str(data), "--output_dir", output or str(data.parent / "out")]
    argv += ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "17", *flags]
    code = f"""
import sys, {module} as script
try:
    script.main({argv!r})
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TRAINING, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() == "False"
    return done.returncode, done.stderr


def remove(data: Path, name: str) -> None:
    (data / name).unlink()


def append(data: Path, name: str, text: str) -> None:
    with open(data / name, "a", encoding="utf-8") as file:
        file.write(text)


def list_two_videos_that_do_not_exist(data: Path) -> None:
    append(data, "videos.txt", "videos/x.mp4\nvideos/y.mp4\n")
    append(data, "prompts.txt", "four\nfive\n")


def break_the_videos(data: Path) -> None:
    content = (data / "videos/b.mp4").read_bytes()
    (data / "videos/a.mp4").write_bytes(b"")
    (data / "videos/b.mp4").write_bytes(content[: len(content) // 2])
    (data / "videos/c.mp4").write_bytes(np.random.default_rng(0).bytes(5000))


def empty_a_prompt(data: Path) -> None:
    (data / "prompts.txt").write_text("one\n\nthree\n")


BAD_DATA: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "missing prompts file": (lambda data: remove(data, "prompts.txt"), [], ["prompts.txt", "--caption_column"]),
    "missing videos file": (lambda data: remove(data, "videos.txt"), [], ["videos.txt", "--video_column"]),
    "differing line counts": (lambda data: append(data, "prompts.txt", "four\n"), [], ["3", "4", "prompts.txt"]),
    "videos that do not exist": (list_two_videos_that_do_not_exist, [], ["x.mp4", "y.mp4", "2 of 5"]),
    "unreadable videos": (break_the_videos, [], ["3 of 3", "a.mp4 (videos.txt:1): file is empty", "b.mp4", "c.mp4"]),
    "an empty prompt": (empty_a_prompt, [], ["b.mp4 (videos.txt:2): has no caption"]),
    "a CSV without the column": (
        lambda data: None,
        ["--dataset_file", "DATA/table.csv", "--caption_column", "words"],
        ["table.csv", "'words'", "video, caption", "--caption_column"],
    ),
    "clips too short": (
        lambda data: None,
        ["--frame_buckets", "49"],
        ["3 of 3", "a.mp4", "20 usable frames", "--frame_buckets"],
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("mistake", BAD_DATA)
def test_bad_data_is_named(data, script, mistake):
    spoil, flags, words = BAD_DATA[mistake]
    spoil(data)
    code, message = run(script, data, *(flag.replace("DATA", str(data)) for flag in flags))
    assert code == 2
    assert message.startswith("error: ")
    assert all(word in message for word in words), message
    assert all(line.startswith("  ") for line in message.splitlines()[1:]), "only a list may follow the line"


BAD_FLAGS = {
    "a missing data_root": (["--data_root", "nowhere"], ["--data_root", "nowhere"]),
    "a height not divisible by 16": (["--height_buckets", "500"], ["--height_buckets", "500", "496 and 512"]),
    "a frame count that is not 4k or 4k+1": (["--frame_buckets", "47"], ["--frame_buckets", "47", "45 and 48"]),
    "a missing dataset_file": (["--dataset_file", "nowhere.csv"], ["--dataset_file", "nowhere.csv"]),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("mistake", BAD_FLAGS)
def test_bad_flags_are_named_in_one_line(data, script, mistake):
    flags, words = BAD_FLAGS[mistake]
    code, message = run(script, data, *flags)
    assert code == 2
    assert len(message.splitlines()) == 1
    assert all(word in message for word in words), message


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_model_folder_is_named(data, script):
    code, message = run(script, data, model=str(data / "no-model"))
    assert code == 2
    assert SCRIPTS[script][1] in message
    assert "no-model" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_output_dir_that_cannot_be_written_is_named(data, script):
    code, message = run(script, data, output=str(data / "prompts.txt" / "out"))
    assert code == 2
    assert "--output_dir" in message
    assert len(message.splitlines()) == 1


def test_an_unknown_optimizer_is_named_with_the_known_ones(data):
    code, message = run("train", data, "--optimizer", "sgd")
    assert code == 2
    assert "--optimizer" in message
    assert "adam, adamw, prodigy, came" in message


def test_training_on_tensors_that_were_never_prepared_says_what_to_run(data):
    code, message = run("train", data, "--load_tensors")
    assert code == 2
    assert "--load_tensors" in message
    assert "prepare_dataset.sh" in message


def test_missing_files_of_an_index_are_listed(data):
    entry = {"video_latent": "video_latents/a.pt", "prompt_embed": "prompt_embeds/a.pt"}
    entry["metadata"] = {"num_frames": 17, "height": 64, "width": 96}
    append(data, "data.jsonl", json.dumps(entry) + "\n")
    code, message = run("train", data, "--load_tensors")
    assert code == 2
    assert "video_latents/a.pt" in message


def test_a_finished_run_is_never_overwritten(data, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "pytorch_lora_weights.safetensors").write_bytes(b"weeks of work")
    code, message = run("train", data, output=str(output))
    assert code == 2
    assert "--output_dir" in message
    assert "--resume_from_checkpoint latest" in message
    assert (output / "pytorch_lora_weights.safetensors").read_bytes() == b"weeks of work"
