"""Runs with tiny models: their flags and their results."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file


SIZE = ["--height", "64", "--width", "96", "--frame_buckets", "17", "--max_num_frames", "17"]


def train(script: ModuleType, model: Path, data: Path, output: Path, *flags: str) -> Path:
    """Run a training script in this process; returns the folder of the run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--pretrained_model_name_or_path", str(model), "--data_root", str(data), "--output_dir", str(output)]
    script.main([*argv, *SIZE, "--train_batch_size", "1", "--seed", "0", *flags])
    return output


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the LoRA or the full weights in the folder of a run or checkpoint."""
    files = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("transformer/*.safetensors")]
    assert files
    return {name: weight for file in files for name, weight in load_file(file).items()}


def assert_same_weights(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that weights are equal bit for bit."""
    assert weights.keys() == expected.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, expected[name])] == []
