"""That the training loop does not wait for the device at each step, by what it does on the CPU and on a GPU."""

import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prepare_dataset
from args import parse_args
from data.plan import plan_training_data
from run.loop import train
from run.recipe import Recipe
from run.setup import set_up
from run.spec import check_spec


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SIZE = ["--height", "64", "--width", "96", "--frame_buckets", "17", "--max_num_frames", "17"]


@pytest.fixture(scope="module")
def prepared(tiny_models, demo_clips, tmp_path_factory) -> Path:
    """The demo clips, prepared with their first frames."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare_dataset.main(
        [
            *("--model_id", str(tiny_models("5b-i2v")), "--data_root", str(demo_clips), "--output_dir", str(folder)),
            *(*SIZE, "--save_latents_and_embeddings", "--save_image_latents", "--num_image_latents", "1"),
        ]
    )
    return folder


def run(model: Path, data: Path, output: Path, steps: int, *flags: str) -> None:
    """Train with everything that draws, weighs and averages; values are fetched once, at the end."""
    args = parse_args(
        [
            *("--pretrained_model_name_or_path", str(model), "--data_root", str(data), "--load_tensors", *SIZE),
            *("--output_dir", str(output), "--max_train_steps", str(steps), "--logging_steps", "100"),
            *("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--gradient_checkpointing"),
            *("--caption_dropout", "0.5", "--noised_image_dropout", "0.5", "--stratified_timesteps"),
            *("--timestep_sampling", "logit_normal", "--snr_gamma", "5", "--use_ema", "--lora_dropout", "0.1"),
            *("--rank", "4", "--lora_alpha", "4"),
            *("--optimizer", "adamw", "--seed", "0", "--report_to", "none", *flags),
        ],
        task="image-to-video",
        method="lora",
    )
    train(set_up(check_spec(Recipe(args, plan_training_data(args)))))


class FetchedNumbers(TorchDispatchMode):
    """Counts how often a number is taken out of a tensor, which makes the CPU wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_step_takes_a_number_out_of_a_tensor(tiny_models, prepared, tmp_path):
    counts = []
    for steps in (1, 3):
        with FetchedNumbers() as fetched:  # but for those of files, which are read in a process of their own
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
    assert waits[0] == waits[1]  # starting, the first steps and the log's fetch at the end: not once a step
