"""Measure the speed of training, preparation, loading, low-bit steps and starting on this machine.

    make benchmark

The clips are 16 real ones (assets/scripts/make_real_clips.py), the model is a tiny one of the real classes: 4 layers
of 4 heads of 32, a VAE of 0.55 M parameters. Writes the figures as JSON and prints them.

At full size, gpu_speed.py measures.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from torch.optim import Optimizer
from torchao.optim import AdamW8bit

from args import parse_args, parse_prepare_args
from data.buckets import Bucket
from data.sampler import BucketBatchSampler
from dataset import ClipDataset, PreparedDataset, make_loader
from make_real_clips import make_real_clips
from make_tiny_model import make_tiny_model
from optimizers.compiled_adam import compiled_once
from planning.plan import plan_raw_clips, plan_training_data
from preparation.prepare import prepare
from prepared.folder import StoredTensor
from prepared.index import PreparedClip
from prepared.tensor_files import ShardWriter
from run.loop import train
from run.recipe import Recipe
from run.setup import set_up
from run.spec import check_spec


ROOT = Path(__file__).resolve().parent.parent
TRAINING = ROOT / "training"
SMALL = ["--height_buckets", "96", "--width_buckets", "144", "--height", "96", "--width", "144"]
NATIVE = ["--height_buckets", "480", "--width_buckets", "720"]


def seconds(function: Callable[[], object]) -> float:
    """Return the wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_preparation(model: Path, clips: Path, prepared: Path) -> float:
    """Return clips a second from mp4 files to latents and embeddings at 49x96x144, including model loading."""
    flags = ["--model_id", str(model), "--data_root", str(clips), "--output_dir", str(prepared), *SMALL]
    flags += ["--batch_size", "2", "--dataloader_num_workers", "1", "--save_latents_and_embeddings"]
    args = parse_prepare_args(flags)
    data = plan_raw_clips(args.sources, args.clips)
    return len(data.clips) / seconds(lambda: prepare(args, data))


def measure_training(model: Path, prepared: Path, output: Path, steps: int = 100) -> float:
    """Return steps a second of a LoRA of rank 16 on prepared 49x96x144 clips, batch 1, float32, after warm-up."""

    def run(name: str, num_steps: int) -> float:
        flags = ["--pretrained_model_name_or_path", str(model), "--data_root", str(prepared), "--load_tensors"]
        flags += ["--output_dir", str(output / name), "--max_train_steps", str(num_steps), "--rank", "16"]
        flags += ["--lora_alpha", "16", "--train_batch_size", "1", "--seed", "0", "--report_to", "none", *SMALL]
        args = parse_args(flags, task="text-to-video", method="lora")
        prepared_run = set_up(check_spec(Recipe(args, plan_training_data(args))))
        return seconds(lambda: train(prepared_run))

    run("warm-up", 10)
    return steps / run("measured", steps)


def measure_loading(clips: Path, output: Path, num_workers: int, epochs: int = 2) -> float:
    """Return clips a second decoded and resized to 49x480x720 by the training's loader, including worker start."""
    args = parse_prepare_args(["--data_root", str(clips), "--output_dir", str(output), "--model_id", "o/m", *NATIVE])
    data = plan_raw_clips(args.sources, args.clips)
    sampler = BucketBatchSampler(data.buckets, 1, seed=0)
    sampler.total_batches = epochs * sampler.batches_per_epoch
    dataset = ClipDataset(data.clips, reshape_mode=args.clips.video_reshape_mode, random_flip=None, seed=0)
    loader = make_loader(dataset, sampler, num_workers=num_workers)
    return epochs * len(data.clips) / seconds(lambda: [batch.names for batch in loader])


def measure_prepared_loading(folder: Path, num_workers: int, num_samples: int = 64, epochs: int = 8) -> float:
    """Return samples a second of bfloat16 latents (49x480x720) and T5-XXL embeddings loaded from shards."""
    names = [f"sample-{number}" for number in range(num_samples)]
    shapes = {("latents", "video_latents"): (32, 13, 60, 90), ("prompt_embeds", "prompt_embeds"): (226, 4096)}
    for (part, kind), shape in shapes.items():
        shards = ShardWriter(folder / part, folder / "staging", [names], [num_samples])
        for batch in chain(*shards.todo(8).values()):
            shards.write({name: {kind: torch.randn(shape).to(torch.bfloat16)} for name in batch})
    latents, embeds = (next((folder / part).iterdir()) for part, _ in shapes)
    clips = [
        PreparedClip(
            name,
            Bucket(49, 480, 720),
            StoredTensor(latents, f"{name}.video_latents"),
            StoredTensor(embeds, f"{name}.prompt_embeds"),
        )
        for name in names
    ]
    sampler = BucketBatchSampler([clip.bucket for clip in clips], 1, seed=0)
    sampler.total_batches = epochs * sampler.batches_per_epoch
    loader = make_loader(PreparedDataset(clips), sampler, num_workers=num_workers)
    return epochs * num_samples / seconds(lambda: [batch.names for batch in loader])


def measure_step_overhead(adam_class: type[Optimizer], num_weights: int = 1024) -> float:
    """Return the microseconds of a step for each weight; all are too small to take time themselves."""
    weights = [torch.nn.Parameter(torch.randn(64)) for _ in range(num_weights)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = adam_class(weights)
    optimizer.step()  # compiles
    return min(seconds(optimizer.step) for _ in range(5)) / num_weights * 1e6


def measure_help() -> float:
    """Return the seconds until the T2V LoRA script has shown its help, the best of three."""
    command = [sys.executable, str(TRAINING / "cogvideox_text_to_video_lora.py"), "--help"]
    return min(seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(3))


def measure_complete_run(model: Path, prepared: Path, output: Path, steps: int = 40) -> float:
    """Return the seconds of a run of the T2V LoRA script, from `accelerate launch` to the LoRA on disk."""
    accelerate = Path(sys.executable).with_name("accelerate")
    config = "single_gpu" if torch.cuda.is_available() else "cpu"
    command = [str(accelerate), "launch", "--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    command += [str(TRAINING / "cogvideox_text_to_video_lora.py"), "--pretrained_model_name_or_path", str(model)]
    command += ["--data_root", str(prepared), "--load_tensors", "--output_dir", str(output), "--rank", "16"]
    command += ["--lora_alpha", "16", "--train_batch_size", "1", "--max_train_steps", str(steps), "--seed", "0"]
    command += ["--report_to", "none", *SMALL]
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_file", type=Path, default=ROOT / "benchmarks" / "speed.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = make_tiny_model("5b", root / "model", height=96, width=144, num_frames=49)
        make_real_clips(root / "clips")
        figures = {
            "raw clips/s at 49x480x720, 0 workers": measure_loading(root / "clips", root / "unused", 0),
            "raw clips/s at 49x480x720, 2 workers": measure_loading(root / "clips", root / "unused", 2),
            "prepared samples/s loaded at 49x480x720, 0 workers": measure_prepared_loading(root / "shards", 0),
            "prepared samples/s loaded at 49x480x720, 2 workers": measure_prepared_loading(root / "shards", 2),
            "prepared clips/s at 49x96x144": measure_preparation(model, root / "clips", root / "prepared"),
            "training steps/s at 49x96x144": measure_training(model, root / "prepared", root / "output"),
            "microseconds a weight of torchao's 8-bit AdamW": measure_step_overhead(AdamW8bit),
            "microseconds a weight of it, compiled once": measure_step_overhead(compiled_once(AdamW8bit)),
            "seconds of a complete run of 40 steps": measure_complete_run(model, root / "prepared", root / "complete"),
            "seconds until --help": measure_help(),
        }
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    args.output_file.write_text(
        json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n", encoding="utf-8"
    )
    for name, value in figures.items():
        print(f"{name:52} {value:7.2f}")


if __name__ == "__main__":
    main()
