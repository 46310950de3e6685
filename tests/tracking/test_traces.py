import gzip
import json
import logging

import torch

from tracking.traces import RECORDED, SKIPPED, WARM_UP, profiled


def run(folder, steps: int, first_step: int = 0) -> None:
    with profiled(folder, first_step) as next_step:
        for _ in range(steps):
            torch.ones(4, 4).matmul(torch.ones(4, 4))
            next_step()


def test_some_steps_are_written_as_a_trace_and_its_path_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(tmp_path / "profile", SKIPPED + WARM_UP + RECORDED + 5, first_step=100)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-105-107.json.gz"
    assert f"{file}; open it at https://ui.perfetto.dev" in caplog.text
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert [event.get("name") for event in events].count("aten::matmul") == RECORDED


def test_a_run_that_is_too_short_says_so(tmp_path, caplog):
    run(tmp_path / "profile", SKIPPED)
    assert "--profile: nothing was recorded; it takes at least 7 steps" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_nothing_is_recorded_without_a_folder(tmp_path, caplog):
    run(None, 20)
    assert not caplog.records
