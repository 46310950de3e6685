"""The loop weights and logs the losses of a step, and leaves nothing that a process would wait for at its end."""

import json
import multiprocessing
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

import cogvideox_text_to_video_lora
import tiny_runs
from diffusion.randomness import sample_generators
from models.configs import CPU
from run.loop import train
from run.setup import load_batches
from tiny_runs import SIZE, assert_same_weights, set_up_run, weights_of


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_the_data_workers_end_with_the_last_step(tiny_models, prepared_demo, tmp_path):
    data = prepared_demo(*SIZE, "--max_samples", "2", "--save_image_latents")
    flags = ("--max_train_steps", "1", "--dataloader_num_workers", "1", "--rank", "4")
    run = set_up_run("text-to-video", tiny_models("5b"), data, tmp_path / "out", *flags)
    assert train(run) == 1
    assert [child.name for child in multiprocessing.active_children() if "SpawnPool" not in child.name] == []


@pytest.fixture(scope="module")
def two_sets(prepared_demo, demo_clips, tmp_path_factory) -> tuple[Path, Path]:
    """Two prepared clips to train on, and three others for regularization."""
    header, *rows = (demo_clips / "metadata.csv").read_text().splitlines()
    table = tmp_path_factory.mktemp("kept") / "kept.csv"
    table.write_text("\n".join([header, *rows[-3:]]))
    others = ("--dataset_file", str(table))
    return tuple(prepared_demo(*SIZE, "--save_image_latents", *more) for more in (("--max_samples", "2"), others))


def test_a_step_weights_the_losses_of_regularization_and_logs_them_apart(tiny_models, two_sets, tmp_path):
    data, kept = two_sets
    flags = ["--max_train_steps", "1", "--rank", "4", "--gradient_accumulation_steps", "2", "--report_to", "none"]
    flags += ["--regularization_data_root", str(kept), "--regularization_weight", "0.25", "--max_grad_norm", "1e9"]
    run = set_up_run("text-to-video", tiny_models("5b"), data, tmp_path / "out", *flags)
    batches = list(islice(load_batches(run.spec, run.inputs.prompts, run.sampler), 2))
    assert [run.sampler.is_regularization(batch.draws) for batch in batches] == [False, True]
    run.trainable.model.train()
    losses = [run.objective(batch, sample_generators(CPU, run.state.seed, batch.draws)) for batch in batches]
    ((losses[0].sum() + 0.25 * losses[1].sum()) / 2).backward()  # a sample in each
    norm = torch.cat([weight.grad.flatten() for weight in run.trainable.parameters]).norm().item()
    for weight in run.trainable.parameters:
        weight.grad = None
    assert train(run) == 1
    run.spec.accelerator.end_training()
    (logged,) = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    assert logged["loss"] == pytest.approx(losses[0].item())
    assert logged["regularization_loss"] == pytest.approx(losses[1].item())
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_run_with_regularization_resumes_bit_for_bit(tiny_models, two_sets, tmp_path):
    data, kept = two_sets
    flags = ["--load_tensors", "--regularization_data_root", str(kept), "--rank", "4", "--report_to", "none"]
    flags += ["--checkpointing_steps", "3"]
    runs = {name: tmp_path / name for name in ("straight", "resumed")}
    run_to_end = partial(tiny_runs.train, cogvideox_text_to_video_lora, tiny_models("5b"), data)
    run_to_end(runs["straight"], *flags, "--max_train_steps", "6")
    run_to_end(runs["resumed"], *flags, "--max_train_steps", "3")
    (runs["resumed"] / "pytorch_lora_weights.safetensors").unlink()
    run_to_end(runs["resumed"], *flags, "--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    assert_same_weights(weights_of(runs["resumed"]), weights_of(runs["straight"]))
    with pytest.raises(SystemExit, match="2"):
        run_to_end(
            runs["resumed"],
            *(*flags, "--max_train_steps", "9", "--resume_from_checkpoint", "latest"),
            *("--regularization_weight", "2"),
        )
