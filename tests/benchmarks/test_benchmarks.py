"""The benchmarks' rows, their runs on tiny models, and the page with their figures."""

import argparse
import json
import multiprocessing
import os
import threading
from dataclasses import replace

import gpu_block
import gpu_speed
import pytest
import torch
from apart import run_apart, start_method
from gpu_speed import SharedModel
from materials import CONTROL, draw_prepared_clips
from measure_memory import calculate_row, find_rows, measure_rows, row_flags, time_steps
from memory_rows import CHECKPOINTED, ROWS, Row
from report import PAGE, draw_charts, fill_page, measured_cell, peak_parts, read_rows, speed_table

from args import parse_args
from data.buckets import Bucket
from dataset import check_prepared
from forward_pass import gradients, predict
from make_full_size_model import full_size_configs
from memory.activations import checkpoint_activations
from methods.lora import Lora
from models.attention import set_attention
from models.compilation import compile_blocks
from prepared.folder import read_tensor
from prepared.read_index import read_index
from tiny_runs import SIZE, set_up_run


GB = 2**30


def committed_page() -> str:
    return PAGE.read_text(encoding="utf-8")


def speeds() -> tuple[dict, dict]:
    return read_rows("speed_gpu.json"), read_rows("block_gpu.json")


def test_the_committed_page_has_the_committed_figures():
    page = fill_page(committed_page(), read_rows("memory.json"), read_rows("memory_calculated.json"), *speeds())
    assert page == committed_page(), "run `make tables`"


@pytest.mark.parametrize(
    "name", ["2b control LoRA", "2b LoRA, batch 4", "2b full, bf16 weights, 8-bit, step in backward"]
)
def test_the_committed_calculation_is_up_to_date(name):
    row = next(row for row in ROWS if row.name == name)
    assert calculate_row(row) == read_rows("memory_calculated.json")[name], "run `make tables`"


def test_the_flags_of_every_row_are_accepted(tmp_path):
    (tmp_path / CONTROL).touch()
    for row in [row for row in (*ROWS, *gpu_speed.ROWS) if row.method != gpu_speed.PREPARE]:
        flags = row_flags(row, "THUDM/CogVideoX-5b", tmp_path, tmp_path / "out", row.size)
        settings = parse_args(flags, task=row.task, method=row.method)
        assert settings.prepared.load_tensors and settings.training.train_batch_size == row.batch_size


def test_every_row_has_a_calculation_whose_parts_add_up_to_its_peak():
    calculated = read_rows("memory_calculated.json")
    assert list(calculated) == [row.name for row in ROWS]
    for account in calculated.values():
        parts = peak_parts(account)
        assert sum(parts.values()) == account["training"] and min(parts.values()) >= 0


def measured_row(**measured: float) -> dict:
    return {
        "measured": {"seconds a step": 1.84, **measured},
        "device": "NVIDIA H200",
        "date": "2026-11-30",
        "versions": {"torch": "2.11.0", "diffusers": "0.42.1"},
    }


def test_measured_and_calculated_figures_have_separate_columns():
    measured = {
        "5b LoRA": measured_row(**{"training reserved": 18 * GB, "validation reserved": 17 * GB}),
        "2b LoRA": {"failed": "out of memory: Tried to allocate | 2 GB"},
    }
    page = fill_page(committed_page(), measured, read_rows("memory_calculated.json"), {}, {})
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")]
        for line in page.splitlines()[::-1]
        if "|" in line
    }
    assert lines["run"][2:6] == ["published, GB", "measured, GB", "s/step", "calculated, GB"]
    assert lines["5b LoRA"][3:5] == ["18.0 / 18.0", "1.84"]
    assert lines["2b LoRA"][3] == "not measured: out of memory: Tried to allocate / 2 GB"
    assert lines["2b full, AdamW"][3] == "not measured"
    assert "Measured on NVIDIA H200, 2026-11-30, torch 2.11.0, diffusers 0.42.1." in page


def test_a_row_whose_validation_failed_shows_the_training_and_the_reason():
    row = measured_row(**{"training reserved": 18 * GB}) | {"failed": "the validation: OutOfMemoryError"}
    assert measured_cell(row) == "18.0: the validation: OutOfMemoryError"


def test_the_speed_table_has_a_column_for_each_figure():
    memory = {"training allocated": 17 * GB, "training reserved": 18 * GB, "host": 9 * GB}
    rows = {
        "a": {"measured": {"seconds a step": 1.7, "TFLOP/s": 770.0, **memory}},
        "b": {"measured": {"clips/s": 2.5}},
    }
    assert speed_table(rows | {"c": {"failed": "out of memory: x"}}).splitlines() == [
        "| run | seconds a step | TFLOP/s | reserved, GB | clips/s |",
        "| --- | --- | --- | --- | --- |",
        "| a | 1.7 | 770 | 18.0 |  |",
        "| b |  |  |  | 2.5 |",
        "",
        "- c: out of memory: x",
    ]
    assert speed_table({}) == "Not measured on a GPU yet."


def test_charts_are_drawn_of_the_existing_figures(tmp_path):
    calculated = read_rows("memory_calculated.json")
    assert [path.name for path in draw_charts(tmp_path, {}, calculated)] == ["memory_calculated.png"]
    measured = {"5b LoRA": measured_row(**{"training reserved": 18 * GB, "validation reserved": 17 * GB})}
    charts = draw_charts(tmp_path, measured, calculated)
    assert [path.name for path in charts] == ["memory_calculated.png", "memory_measured.png"]
    assert all(path.stat().st_size > 10_000 for path in charts)


def test_rows_run_one_after_another_and_failures_are_recorded(tmp_path):
    good = Row("good", "5b", "lora", CHECKPOINTED, "control-to-video", is_sampled=False, steps=(1, 1))
    rows = [Row("refused", "5b", "lora", ("--rank", "0")), good]
    output = tmp_path / "out" / "memory.json"
    measure_rows(rows, tmp_path, output, tiny=True, limits=(None, 600))
    results = json.loads(output.read_text())["rows"]
    assert results["refused"]["failed"] == "the flags were refused"
    assert results["good"]["measured"]["seconds a step"] > 0 and results["good"]["measured"]["host"] > 1e7
    assert len(results["good"]["step_seconds"]) == 2
    assert results["good"]["settings"]["gradient_checkpointing"] and results["good"]["facts"]["size"] == [17, 64, 96]
    # No time is left for another row; earlier measurements stay.
    measure_rows([good], tmp_path, output, tiny=True, limits=(1e-9, 600))
    assert json.loads(output.read_text())["rows"] == results
    # A failure does not replace it either.
    measure_rows([replace(good, flags=("--rank", "0"))], tmp_path, output, tiny=True, limits=(None, 600))
    assert json.loads(output.read_text())["rows"] == results


def test_every_timed_step_trains(tiny_models, prepared_demo, fresh_accelerator, tmp_path):
    data = prepared_demo(*SIZE, "--max_samples", "2")
    run = set_up_run("text-to-video", tiny_models("5b"), data, tmp_path / "out", "--max_train_steps", "2")
    assert len(time_steps(run, 2)) == 2
    assert run.throughput.latest.tflops > 0  # of the last step


def test_runs_share_a_loaded_model_in_its_state_after_loading(tiny_models, monkeypatch):
    monkeypatch.setattr(SharedModel, "_loaded", {})  # not kept for other tests
    source = SharedModel(str(tiny_models("5b")))
    transformer = source.load_transformer(torch.float32)
    names, expected = list(transformer.state_dict()), predict(transformer)
    Lora(4, 4).attach(transformer)
    set_attention(transformer)
    checkpoint_activations(transformer, "all-but-attention")
    compile_blocks(transformer, num_sizes=1, backend="aot_eager")
    assert gradients(transformer) and list(transformer.state_dict()) != names
    assert source.load_transformer(torch.float32) is transformer
    assert list(transformer.state_dict()) == names and torch.equal(predict(transformer), expected)


def test_ways_to_compute_a_block_are_compared(tmp_path):
    int8 = gpu_block.BlockRow("int8", scope="all-but-attention", base="int8")
    refused = gpu_block.BlockRow("refused", backend="sage")
    rows = [gpu_block.LIBRARY, replace(gpu_block.OURS, is_compiled=True), int8, refused]
    gpu_block.measure_blocks(rows, tmp_path, tmp_path / "block.json", tiny=True)
    results = json.loads((tmp_path / "block.json").read_text())["rows"]
    for name in ("library", "ours", "int8"):
        measured = results[name]["measured"]
        assert 0.99 < measured["gradient's cosine"] < 1.01, name
        assert 0 < measured["forward, ms"] < measured["ms"] and len(results[name]["calls"]) == gpu_block.CALLS
        assert any("attention" in kernel for kernel, _, _ in results[name]["kernels"]), name
    assert results["refused"]["failed"].startswith("UserError: --attention_backend sage: ")


def die() -> dict:
    os._exit(3)


def wait_without_limit() -> dict:
    threading.Event().wait()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_function_runs_in_a_separate_process(start):
    assert run_apart(os.getppid, start=start) == os.getpid()


def test_a_process_that_dies_or_hangs_has_no_result():
    assert run_apart(die, start="fork") == {"failed": "the process was killed"}
    assert run_apart(wait_without_limit, seconds=0.1, start="fork") == {"failed": "no result in 0.1 s"}
    assert run_apart(int, "x", start="fork")["failed"].startswith("ValueError: invalid literal")
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_processes_are_forks():
    assert start_method() == "fork"


def test_random_clips_have_the_shapes_of_the_released_models(tmp_path):
    configs = full_size_configs("5b")
    draw_prepared_clips(configs, tmp_path / "prepared", Bucket(49, 480, 720), count=2)
    clips = read_index(tmp_path / "prepared")
    check_prepared(clips, configs)
    assert [clip.bucket for clip in clips] == [Bucket(49, 480, 720)] * 2
    latents, others = (read_tensor(clip.video_latents) for clip in clips)
    assert (latents.shape, latents.dtype) == ((32, 13, 60, 90), torch.bfloat16)
    assert read_tensor(clips[0].prompt_embeds).shape == (226, 4096)
    assert not torch.equal(latents, others)


def test_an_unknown_row_is_named(capsys):
    with pytest.raises(SystemExit):
        find_rows(argparse.ArgumentParser(), ROWS, ["5b LoRa"])
    assert "--only: there is no row 5b LoRa; rows are 5b LoRA; " in capsys.readouterr().err
    assert [row.name for row in find_rows(argparse.ArgumentParser(), ROWS, ["2b LoRA"])] == ["2b LoRA"]
