"""A run is read from its folder, however it ended and whatever damaged its files."""

import math
import subprocess
import sys

import pytest

from common.errors import UserError
from common.run_folder import FACTS_FILE, METRICS_FILE, NOTES_FILE
from drawn_runs import noted, write_rows, write_run
from repository import TRAINING
from results.run_comparison import render_comparison
from results.run_page import render_run
from results.run_record import read_run


def test_the_curves_and_the_best_step_are_those_that_were_logged(tmp_path):
    record = read_run(write_run(tmp_path, {0: 1.0, 20: 0.5, 40: 0.6}, losses=[0.9, math.nan]))
    assert record.curve("validation_loss") == [(0, 1.0), (20, 0.5), (40, 0.6)]
    assert record.curve("loss")[0] == (1, 0.9) and math.isnan(record.curve("loss")[1][1])
    assert (record.best, record.step) == ((20, 0.5), 40)
    assert record.names("memory/") == ["memory/peak_host_gb"]


def test_damaged_lines_are_skipped(tmp_path):
    write_run(tmp_path, losses=[0.5])
    for name in (METRICS_FILE, NOTES_FILE):
        with open(tmp_path / name, "ab") as file:
            file.write(b'[1]\n{"step": "x"}\n{"time": 7, "warning": "no"}\n{"time": "2026-01-02T03:04:05", "w\n\xff\n')
    record = read_run(tmp_path)
    assert record.curve("loss") == [(1, 0.5)] and record.notes == []


def test_facts_of_wrong_types_are_ignored(tmp_path):
    facts = {"summary": [1], "flags": 5, "videos": 3, "total_steps": "x", "given": 1, "versions": [], "start": [1]}
    facts |= {"sample": {}, "publish": [None], "output_dir": 7, "measured": "x", "revision": []}
    write_run(tmp_path, facts=facts, notes=[noted(state="running")], video_steps=(0, 40))
    record = read_run(tmp_path)
    assert record.facts == {}
    assert "40 of 40 steps" in render_run(record, tmp_path) and render_comparison([record] * 2, tmp_path)
    for videos in ([3], [{"prompt": 1, "target": {}}], [{"prompt": "a"}], [{"prompt": "a", "target": {"caption": 1}}]):
        write_rows(tmp_path / FACTS_FILE, [{"videos": videos, "summary": {"data": 1}, "total_steps": 50}])
        assert read_run(tmp_path).facts == {"total_steps": 50}


def test_time_left_and_time_spent(tmp_path):
    notes = [noted(state="running"), noted(20, 5, state="stopped"), noted(20, 10, state="running")]
    record = read_run(write_run(tmp_path, notes=[*notes, noted(40, 12, state="finished")], facts={}))
    assert record.seconds == (5 + 2) * 60
    assert record.seconds_left == (100 - 40) * 3.0
    assert record.state["state"] == "finished"


def test_the_time_of_a_killed_run_ends_with_its_last_news(tmp_path):
    notes = [noted(state="running"), noted(3, 5, warning="news"), noted(2, 30, state="running")]
    record = read_run(write_run(tmp_path, notes=[*notes, noted(40, 32, state="finished")]))
    assert record.seconds == (5 + 2) * 60


def test_videos_after_the_last_step_are_of_before_the_run_was_resumed(tmp_path):
    record = read_run(write_run(tmp_path, facts={}, video_steps=(0, 40, 60)))
    assert [sorted(files) for files in record.videos.values()] == [[0, 40]]


def test_a_run_of_an_earlier_version_has_the_flags_of_its_config(tmp_path):
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text("rank: 8\n")
    assert read_run(tmp_path).flags == {"rank": 8}


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a run: .*metrics\.jsonl"):
        read_run(tmp_path)


def test_torch_is_not_needed_for_the_page():
    code = "import sys, results.run_comparison; print(*sys.modules)"
    options = {"capture_output": True, "text": True, "check": True, "cwd": TRAINING}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert not {"torch", "accelerate", "diffusers", "huggingface_hub"} & set(done.stdout.split())
