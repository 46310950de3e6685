"""A script's steps are timed from outside, and the page's commands pass flags that exist."""

import json
import sys
import time

import step_times
import torch

from args import parse_args, parse_prepare_args
from doc_pages import PROGRAMS, marked_blocks, noted_calls, read_page, script_flags


BLOCKS = marked_blocks(read_page("benchmarks/peers.md"))
SCRIPT = """
import sys, torch
from beside import RATE
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=RATE)
torch.cuda.synchronize()
for _ in range(int(sys.argv[1])):
    weight.sum().backward()
    optimizer.step()
"""


def test_a_script_that_knows_nothing_of_it_is_timed(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("RATE = 0.1")
    (tmp_path / "script.py").write_text(SCRIPT)
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["step_times.py", str(results), "mine", str(tmp_path / "script.py"), "14"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("STARTED", str(time.time() - 100))
    for name in ("synchronize", "reset_peak_memory_stats", "reset_accumulated_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    step_times.main()
    figures = json.loads(results.read_text())
    assert (figures["name"], figures["steps"]) == ("mine", 14)
    assert figures["seconds from launch to LoRA"] > figures["seconds to the first step"] > 100
    assert figures["steps/s"] > 0 and 0.05 < figures["peak GB"] < 100


def test_the_commands_of_the_page_pass_flags_that_exist(tmp_path, tiny_models):
    (tmp_path / "tiny-5b").symlink_to(tiny_models("5b"))
    for name in ("clips", "prepared"):
        (tmp_path / name).mkdir()
    *_, prepare = noted_calls(BLOCKS["make"], tmp_path, PROGRAMS | {"git": "#!/bin/sh\n"}, PEERS=str(tmp_path))
    parse_prepare_args(script_flags(prepare))
    calls = noted_calls(BLOCKS["run"], tmp_path, PEERS=str(tmp_path))
    names = [call[call.index("benchmarks/step_times.py") + 2] for call in calls]
    assert names == ["ours", "diffusers", "factory"] * 3
    flags = script_flags(calls[0])[3:]
    assert parse_args(flags, task="text-to-video", method="lora").training.max_train_steps == 60
