"""Mistakes in files and flags: one clear message, exit code 2, before torch is imported."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
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
    folder = tmp_path / "data"
    (folder / "videos").mkdir(parents=True)
    names = [f"videos/{name}.mp4" for name in "abc"]
    for name in names:
        write_mp4(folder / name, (np.full((64, 96, 3), 8 * i, np.uint8) for i in range(20)), 8)
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    (folder / "table.csv").write_text("video,caption\n" + "".join(f"{name},a caption\n" for name in names))
    return folder


def run(script: str, data: Path, *flags: str) -> tuple[int, str]:
    """Run a script, which must not import torch; in flags MODEL stands for that for the model, DATA for the folder."""
    module, model_flag = SCRIPTS[script]
    argv = [model_flag, "owner/name", "--data_root", str(data), "--output_dir", str(data.parent / "out")]
    argv += ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "17"]
    argv += [flag.replace("MODEL", model_flag).replace("DATA", str(data)) for flag in flags]
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


def list_tensors_that_do_not_exist(data: Path) -> None:
    entry = {"video_latent": "video_latents/a.pt", "prompt_embed": "prompt_embeds/a.pt"}
    entry["metadata"] = {"num_frames": 17, "height": 64, "width": 96}
    append(data, "data.jsonl", json.dumps(entry) + "\n")


# How the data is spoiled, the flags, and the words of the message; "train: " is for training only.
BAD_DATA: dict[str, tuple[Callable[[Path], None] | None, list[str], list[str]]] = {
    "missing prompts file": (lambda data: (data / "prompts.txt").unlink(), [], ["prompts.txt", "--caption_column"]),
    "missing videos file": (lambda data: (data / "videos.txt").unlink(), [], ["videos.txt", "--video_column"]),
    "differing line counts": (lambda data: append(data, "prompts.txt", "four\n"), [], ["3", "4", "prompts.txt"]),
    "videos that do not exist": (list_two_videos_that_do_not_exist, [], ["x.mp4", "y.mp4", "2 of 5"]),
    "unreadable videos": (break_the_videos, [], ["3 of 3", "a.mp4 (videos.txt:1): file is empty", "b.mp4", "c.mp4"]),
    "an empty prompt": (
        lambda data: (data / "prompts.txt").write_text("one\n\nthree\n"),
        [],
        ["b.mp4 (videos.txt:2): has no caption"],
    ),
    "a CSV without the column": (
        None,
        ["--dataset_file", "DATA/table.csv", "--caption_column", "words"],
        ["table.csv", "'words'", "video, caption", "--caption_column"],
    ),
    "clips too short": (None, ["--frame_buckets", "49"], ["3 of 3", "a.mp4", "20 usable frames", "--frame_buckets"]),
    "train: tensors never prepared": (None, ["--load_tensors"], ["--load_tensors", "prepare_dataset.sh"]),
    "train: missing tensors": (list_tensors_that_do_not_exist, ["--load_tensors"], ["video_latents/a.pt"]),
}
BAD_FLAGS = {
    "a missing data_root": (["--data_root", "nowhere"], ["--data_root", "nowhere"]),
    "a height not divisible by 16": (["--height_buckets", "500"], ["--height_buckets", "500", "496 and 512"]),
    "a frame count that is not 4k or 4k+1": (["--frame_buckets", "47"], ["--frame_buckets", "47", "45 and 48"]),
    "a missing dataset_file": (["--dataset_file", "nowhere.csv"], ["--dataset_file", "nowhere.csv"]),
    "a missing model folder": (["MODEL", "DATA/no-model"], ["MODEL", "no-model"]),
    "an output_dir that cannot be written": (["--output_dir", "DATA/prompts.txt/out"], ["--output_dir"]),
    "train: an unknown optimizer": (["--optimizer", "sgd"], ["--optimizer", "adam, adamw, prodigy, came"]),
}


def cases(mistakes: Iterable[str]) -> list[tuple[str, str]]:
    scripts = {mistake: ["train"] if mistake.startswith("train: ") else SCRIPTS for mistake in mistakes}
    return [(mistake, script) for mistake in mistakes for script in scripts[mistake]]


@pytest.mark.parametrize(("mistake", "script"), cases(BAD_DATA))
def test_bad_data_is_named(data, mistake, script):
    spoil, flags, words = BAD_DATA[mistake]
    if spoil:
        spoil(data)
    code, message = run(script, data, *flags)
    assert code == 2
    busy, message = message.split("\n", maxsplit=1)
    assert busy == "reading the data ..." and message.startswith("error: ")
    assert all(word in message for word in words), message
    assert all(line.startswith("  ") for line in message.splitlines()[1:]), "only a list may follow the line"


@pytest.mark.parametrize(("mistake", "script"), cases(BAD_FLAGS))
def test_bad_flags_are_named_in_one_line(data, mistake, script):
    flags, words = BAD_FLAGS[mistake]
    code, message = run(script, data, *flags)
    assert code == 2
    assert len(message.splitlines()) == 1
    assert all(word.replace("MODEL", SCRIPTS[script][1]) in message for word in words), message


def test_a_finished_run_is_never_overwritten(data):
    result = data.parent / "out" / "pytorch_lora_weights.safetensors"
    result.parent.mkdir()
    result.write_bytes(b"weeks of work")
    code, message = run("train", data)
    assert code == 2
    assert "--output_dir" in message
    assert "--resume_from_checkpoint latest" in message
    assert result.read_bytes() == b"weeks of work"
