"""The frames that a result was trained on are found in the folder of its run."""

from pathlib import Path

import pytest

from common.run_folder import CONFIG_TITLE
from results.trained_frames import find_trained_frames, note_trained_frames


@pytest.fixture
def run(tmp_path) -> Path:
    """A run on both ends of videos, in whose folder a result of another run is."""
    folder = tmp_path / "run"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "base").mkdir()
    note_trained_frames(folder, "first,last")
    return folder


def test_they_are_those_of_the_run_of_a_result_or_of_a_base_that_is_the_pipeline_of_a_run(run, monkeypatch):
    assert find_trained_frames([str(run), None], None) == ("first,last", str(run))
    assert find_trained_frames([], str(run / "pipeline")) == ("first,last", str(run / "pipeline"))
    assert find_trained_frames([], str(run / "base")) is find_trained_frames(["owner/lora"], "owner/model") is None
    monkeypatch.chdir(run / "pipeline")
    assert find_trained_frames([], ".") == ("first,last", ".")


def test_other_frames_than_the_first_override_and_a_file_of_the_user_says_nothing(run, tmp_path):
    first, foreign = tmp_path / "first", tmp_path / "foreign"
    for folder, text in ((first, f"# {CONFIG_TITLE} on a day\nseed: 1\n"), (foreign, "condition_frames: first:3\n")):
        folder.mkdir()
        (folder / "config.yaml").write_text(text)
    assert find_trained_frames([str(first)], None) == ("first", str(first))
    assert find_trained_frames([str(first), str(run)], None) == ("first,last", str(run))
    assert find_trained_frames([str(foreign)], None) is None
