"""Runs with tiny models: their flags and their results."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from accelerate.state import AcceleratorState
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from args import parse_args
from data.buckets import Bucket
from planning.plan import plan_training_data
from run.recipe import Recipe
from run.setup import Run, set_up
from run.spec import check_spec


SIZE = ["--height", "64", "--width", "96", "--frame_buckets", "17", "--max_num_frames", "17"]


def short_run_flags(model: Path, data: Path) -> list[str]:
    folders = ["--pretrained_model_name_or_path", str(model), "--data_root", str(data)]
    return [*folders, *SIZE, "--train_batch_size", "1", "--seed", "0"]


def run_flags(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """Return the flags of a run on the demo clips without trackers, and `more`."""
    flags = ["--pretrained_model_name_or_path", str(model), "--data_root", str(data), "--output_dir", str(output)]
    return [*flags, "--caption_column", "prompts.txt", "--report_to", "none", *SIZE, *more]


def train(script: ModuleType, model: Path, data: Path, output: Path, *flags: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main([*short_run_flags(model, data), "--output_dir", str(output), *flags])
    return output


def set_up_run(task: str, model: Path, data: Path, output: Path, *flags: str) -> Run:
    """Set up a run of a LoRA on prepared data, as its script does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = [*short_run_flags(model, data), "--output_dir", str(output), "--load_tensors", "--report_to", "none"]
    settings = parse_args([*argv, *flags], task=task, method="lora")
    return set_up(check_spec(Recipe(settings, plan_training_data(settings))))


def recipe_of(task: str, model: Path, data: Path, *flags: str, method: str = "lora") -> Recipe:
    """The settings and data of a run on raw clips."""
    settings = parse_args([*run_flags(model, data, Path("out")), *flags], task=task, method=method)
    return Recipe(settings, plan_training_data(settings))


def sample_latents(pipeline: CogVideoXPipeline, size: Bucket, **options) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"num_frames": size.num_frames, "height": size.height, "width": size.width}
    return pipeline(**sizes, output_type="latent", **options).frames


def curve(run: Path, name: str) -> dict[int, float]:
    (folder,) = (path for path in (run / "logs").iterdir() if path.is_dir())
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    files = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("transformer/*.safetensors")]
    assert files
    return {name: weight for file in files for name, weight in load_file(file).items()}


def assert_same_weights(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, expected[name])] == []
