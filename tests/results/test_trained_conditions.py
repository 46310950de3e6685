"""What a result was given in training is found in the folder of its run."""

from pathlib import Path

import pytest

from common.run_folder import CONFIG_TITLE
from results.trained_conditions import (
    TrainedConditions,
    find_trained_conditions,
    note_trained_conditions,
    takes_control,
)
from video.frames import Cut


ENDS = TrainedConditions("first,last")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run on both ends of videos, in whose folder a result of another run is."""
    folder = tmp_path / "run"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "base").mkdir()
    note_trained_conditions(folder, ENDS)
    return folder


def test_they_are_those_of_the_run_of_a_result_or_of_a_base_that_is_the_pipeline_of_a_run(run, monkeypatch):
    assert find_trained_conditions([str(run), None], None) == (ENDS, str(run))
    assert find_trained_conditions([], str(run / "pipeline")) == (ENDS, str(run / "pipeline"))
    for results, base in (([], str(run / "base")), (["owner/lora"], "owner/model")):
        assert find_trained_conditions(results, base) == (None, None)
    monkeypatch.chdir(run / "pipeline")
    assert find_trained_conditions([], ".") == (ENDS, ".")


def test_they_are_found_through_a_link_and_from_inside_the_run(run, tmp_path, monkeypatch):
    (tmp_path / "best").symlink_to(run / "pipeline")
    (run / "elsewhere").symlink_to(tmp_path)
    for result in (tmp_path / "best", run / "elsewhere"):
        assert find_trained_conditions([str(result)], None) == (ENDS, str(result))
    monkeypatch.chdir(run / "pipeline")
    assert find_trained_conditions(["."], None) == (ENDS, ".")
    assert takes_control(".") is False and takes_control("owner/lora") is None  # not in the working folder


def test_the_control_and_the_cut_of_a_run_are_read_and_of_a_merged_result_too(run, tmp_path):
    style, control, merged = (tmp_path / name for name in ("style", "control", "merged"))
    for folder, text in ((style, "fps: 16\n"), (control, "fps: 8\nskip_frames_end: 2\n# compute_control: null\n")):
        folder.mkdir()
        (folder / "config.yaml").write_text(f"# {CONFIG_TITLE} on a day\n{text}")
    found = TrainedConditions(takes_control=True, cut=Cut(fps=8, skip_frames_end=2))
    assert find_trained_conditions([str(style), str(control)], None) == (found, str(control))
    merged.mkdir()
    note_trained_conditions(merged, found)
    assert find_trained_conditions([str(style)], str(merged)) == (found, str(merged))


@pytest.mark.parametrize("line", ["compute_control: depth", "fps: fast", "fps: -1", "long_clips: [first]"])
def test_a_file_with_other_values_than_a_run_writes_says_nothing(tmp_path, line):
    (tmp_path / "config.yaml").write_text(f"# {CONFIG_TITLE} on a day\n{line}\n")
    assert find_trained_conditions([str(tmp_path)], None) == (None, None)


def test_other_frames_than_the_first_override_and_a_file_of_the_user_says_nothing(run, tmp_path):
    first, foreign = tmp_path / "first", tmp_path / "foreign"
    for folder, text in ((first, f"# {CONFIG_TITLE} on a day\nseed: 1\n"), (foreign, "condition_frames: first:3\n")):
        folder.mkdir()
        (folder / "config.yaml").write_text(text)
    assert find_trained_conditions([str(first)], None) == (TrainedConditions(), str(first))
    assert find_trained_conditions([str(first), str(run)], None) == (ENDS, str(run))
    assert find_trained_conditions([str(foreign)], None) == (None, None)
