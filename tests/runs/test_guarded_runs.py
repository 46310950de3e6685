"""Failures outside of training do not end a run, or end it with a few lines; tokens are never shown.

Each test provokes one in a full run of the script.
"""

import ast
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import wandb
from accelerate.tracking import TensorBoardTracker
from safetensors.torch import load_file

import cogvideox_text_to_video_lora
import dataset
from models.source import ModelSource
from repository import TRAINING
from results import publish
from tiny_runs import SIZE, short_run_flags


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
TOKEN = "hf_" + "Secret0" * 5


@pytest.fixture(scope="module")
def prepared(prepared_demo) -> Path:
    """Two of the demo clips, prepared with the tiny 5b model."""
    return prepared_demo(*SIZE, "--max_samples", "2")


@pytest.fixture
def train(tiny_models, tmp_path, monkeypatch):
    """Run the script for two steps in this process, its flags on the command line as well; returns its folder."""

    def run(data: Path, *flags: str, code: int = 0) -> Path:
        output = tmp_path / "out"
        argv = [
            *short_run_flags(tiny_models("5b"), data),
            "--output_dir",
            str(output),
            "--rank",
            "4",
            "--lora_alpha",
            "4",
        ]
        argv += ["--max_train_steps", "2", "--lr_warmup_steps", "0", *flags]
        monkeypatch.setattr("sys.argv", ["train.py", *argv])
        with pytest.raises(SystemExit, match=str(code)) if code else nullcontext():
            cogvideox_text_to_video_lora.main(argv)
        return output

    return run


def last_error(capsys) -> list[str]:
    """Return the lines of stderr from "error: " on."""
    err = capsys.readouterr().err
    return err[err.rindex("error: ") :].splitlines()


def test_trackers_and_an_upload_that_fail_leave_the_result_and_nothing_shows_the_token(
    train, prepared, monkeypatch, capfd
):
    def fail(*arguments, **options):
        raise ConnectionError(f"refused {TOKEN}")

    wandb.teardown()
    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    monkeypatch.setattr(TensorBoardTracker, "finish", fail)
    monkeypatch.setattr(publish, "whoami", lambda token: {"name": "me"})
    monkeypatch.setattr(publish, "create_repo", fail)
    flags = ["--load_tensors", "--report_to", "all", "--checkpointing_steps", "1", "--validation_steps", "1"]
    flags += ["--validation_prompt", "a circle", "--num_inference_steps", "1", "--no-validate_first"]
    output = train(prepared, *flags, "--push_to_hub", "--hub_token", TOKEN)
    wandb.teardown()

    shown = "".join(capfd.readouterr())
    assert load_file(output / "pytorch_lora_weights.safetensors")
    assert "warning: tensorboard failed (ConnectionError: refused (hidden)); training continues" in shown
    assert "error: the result was not uploaded (ConnectionError: refused (hidden))" in shown
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {"trainer_state.json", "hparams.yml", "README.md"} - {path.name for path in files} == {"README.md"}
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in shown


def test_an_upload_that_would_fail_ends_the_run_before_a_model_is_loaded(train, prepared, capsys, monkeypatch):
    for load in ("load_transformer", "load_text_pipeline", "load_vae"):
        monkeypatch.setattr(ModelSource, load, lambda *_, **__: pytest.fail("a model was loaded"))
    for dry_run in ([], ["--dry_run"]):
        output = train(prepared, "--load_tensors", "--push_to_hub", "--hub_token", TOKEN, *dry_run, code=2)
        (line,) = last_error(capsys)
        assert line.startswith("error: --push_to_hub: the upload to 'out' would fail: ")
        assert not output.exists()


def test_a_data_worker_that_is_killed_ends_the_run_with_its_clip(train, demo_clips, capsys, monkeypatch):
    read, doomed = dataset.read_frames, "clip-001"

    def read_or_die(path, *arguments, **options):
        if doomed in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, *arguments, **options)

    monkeypatch.setattr(dataset, "read_frames", read_or_die)
    flags = ["--dataloader_num_workers", "1", "--report_to", "none", "--max_samples", "2", "--height_buckets", "64"]
    train(demo_clips, *flags, "--width_buckets", "96", code=2)
    line, *_ = last_error(capsys)  # and the rest of the progress bar
    assert line.startswith(f"error: a data worker died (Killed) while reading {demo_clips}/videos/{doomed}.mp4 (")
    assert "lower --dataloader_num_workers" in line


def test_a_full_gpu_ends_the_run_with_the_remaining_ways_to_save_memory(train, prepared, capsys, monkeypatch):
    def full(self, *arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has no more.")

    monkeypatch.setattr(torch.Tensor, "backward", full)
    flags = ["--load_tensors", "--report_to", "none", "--gradient_checkpointing", "--mixed_precision", "bf16"]
    train(prepared, *flags, code=2)
    title, now, *savings = last_error(capsys)
    assert title.startswith("error: out of GPU memory (OutOfMemoryError: CUDA out of memory. Tried to allocate 20")
    assert now.strip().startswith("now: 1 x 17x64x96 takes ")
    assert any("--quantize_base int8" in line and "less (calculated, not measured)" in line for line in savings)


def test_no_file_that_is_read_can_run_code():
    """No module unpickles or evaluates files, or lets a library do so."""
    unsafe = {"weights_only": False, "trust_remote_code": True, "allow_pickle": True}
    for file in sorted(TRAINING.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            where = f"{file.name}:{node.lineno}: {name}"
            assert not any(word in given and given[word] is value for word, value in unsafe.items()), where
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"), where
            assert name != "torch.load" or given.get("weights_only") is True, where
