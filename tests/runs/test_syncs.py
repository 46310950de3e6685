"""The training loop does not wait for the device at each step, checked on the CPU and on a GPU."""

import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from run.loop import train
from tiny_runs import SIZE, set_up_run


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def prepared(prepared_demo) -> Path:
    return prepared_demo(*SIZE, "--max_samples", "8", "--save_image_latents", kind="5b-i2v")


def run(model: Path, data: Path, output: Path, steps: int, *flags: str) -> None:
    """Train with all random, weighting and averaging options; values are fetched once, at the end."""
    options = ["--max_train_steps", str(steps), "--logging_steps", "100", "--optimizer", "adamw", "--rank", "4"]
    options += ["--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--gradient_checkpointing"]
    options += ["--caption_dropout", "0.5", "--noised_image_dropout", "0.5", "--stratified_timesteps", "--use_ema"]
    options += ["--timestep_sampling", "logit_normal", "--snr_gamma", "5", "--lora_dropout", "0.1", *flags]
    train(set_up_run("image-to-video", model, data, output, *options))


class FetchedNumbers(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_step_reads_a_number_from_a_tensor(tiny_models, prepared, tmp_path):
    counts = []
    for steps in (1, 3):
        with FetchedNumbers() as fetched:  # except for files, which are read in a worker
            run(tiny_models("5b-i2v"), prepared, tmp_path / str(steps), steps, "--dataloader_num_workers", "1")
        counts.append(fetched.count)
    assert counts[0] == counts[1]


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(tiny_models, prepared, tmp_path):
    waits = []
    for steps in (2, 6):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                flags = ("--mixed_precision", "bf16", "--pin_memory")
                run(tiny_models("5b-i2v"), prepared, tmp_path / str(steps), steps, *flags)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
        waits.append(sorted(places))
    assert waits[0] == waits[1]  # at the start, in the first steps and for the log at the end: not once a step
