"""What the buttons of the app's page say of mistakes."""

import gradio as gr
import pytest

from studio.actions import Actions
from studio.jobs import Jobs


def test_a_data_set_of_samples_that_is_complete_is_not_sampled_again(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").touch()
    (tmp_path / "samples/model").mkdir(parents=True)
    (tmp_path / "samples/model/00-cat-seed-1.mp4").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gr.Error, match="all videos of samples/model are there already"):
        given = "text only", 3, "canny", []
        Actions(tmp_path, Jobs(tmp_path)).sample("model", "", "cat", *given, 5, 6.0, 1, "--as_dataset")
