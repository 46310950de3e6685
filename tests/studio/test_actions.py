"""What the buttons of the app's page say of mistakes."""

import gradio as gr
import pytest

from studio.actions import Actions
from studio.jobs import Jobs


def test_a_field_is_needed_only_where_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    actions = Actions(tmp_path, Jobs(tmp_path))

    def preview(given, latents, control):
        training = "fp32", "fit the card", 2, 1e-4, "out"
        return actions.preview("train", "m", "clips", given, latents, control, "", 64, 96, 17, *training, "", "")

    assert preview("first K frames", None, "tile").startswith("# K: nothing is chosen")
    assert preview("control video", 3, None).startswith("# control: nothing is chosen")
    assert preview("text only", None, None).startswith("cd ")


def test_a_data_set_of_samples_that_is_complete_is_not_sampled_again(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").touch()
    (tmp_path / "samples/model").mkdir(parents=True)
    (tmp_path / "samples/model/00-cat-seed-1.mp4").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gr.Error, match="all videos of samples/model are there already"):
        given = "text only", 3, "canny", []
        Actions(tmp_path, Jobs(tmp_path)).sample("model", "", "cat", *given, 5, 6.0, 1, "--as_dataset")
