"""The app stays inside its root."""

import os

import pytest

from common.errors import UserError
from studio.places import inside, list_data, list_media, list_runs, list_videos


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    (root / "clips").mkdir(parents=True)
    (tmp_path / "secret.txt").touch()
    (root / "out").symlink_to(tmp_path)
    (root / "clips/in.txt").touch()
    (root / "link.txt").symlink_to(root / "clips/in.txt")
    return root


OUTSIDE = ["..", "clips/../../secret.txt", "clips/../clips", "/etc/passwd", "out/secret.txt", "a\0b"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_that_leads_out_of_the_root_is_refused(root, path):
    with pytest.raises(UserError, match="is not inside"):
        inside(root, path)


@pytest.mark.parametrize("path", ["clips/in.txt", "link.txt", "clips/new", "..hidden"])
def test_a_path_in_the_root_is_resolved(root, path):
    assert inside(root, path) == (root / path).resolve()
    assert inside(root, root / path) == (root / path).resolve()


def test_data_sets_and_runs_are_listed_without_results_and_hidden_or_linked_folders(root):
    data = "clips/a.mp4 clips/sub/b.mp4 .hidden/c.mp4 lists/videos.txt table.csv clips/scores.csv"
    results = "prepared/plan.csv prepared/d.mp4 run/checkpoint-1/x run/e.mp4 run/pytorch_lora_weights.safetensors"
    for file in f"{data} {results}".split():
        (root / file).parent.mkdir(exist_ok=True, parents=True)
        (root / file).touch()
    assert list_data(root) == ["clips", "lists", "table.csv"]
    assert list_runs(root) == ["run"]
    (root / "clips/b.PNG").touch()
    assert list_media(root, are_videos=False) == ["clips/b.PNG"]
    assert list_media(root, are_videos=True) == ["clips/a.mp4", "clips/sub/b.mp4", "prepared/d.mp4", "run/e.mp4"]


def test_files_that_vanish_while_they_are_listed_are_left_out(root, monkeypatch):
    for age, name in enumerate("ab"):
        (root / f"{name}.mp4").touch()
        os.utime(root / f"{name}.mp4", (100 - age, 100 - age))
    (root / "gone.mp4").symlink_to("nowhere")
    assert list_videos(root) == [root / "a.mp4", root / "b.mp4"]
    monkeypatch.setattr(os, "walk", lambda root: [(root / "gone", [], ["pytorch_lora_weights.safetensors"])])
    assert list_runs(root) == []
