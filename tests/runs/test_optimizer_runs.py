"""Runs with optimizers that also average the weights, keep them in bf16, or free the gradients."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cogvideox_text_to_video_lora
import cogvideox_text_to_video_sft
import tiny_runs
from original_folders import write_original_folder
from tiny_runs import assert_same_weights, curve, weights_of


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
BF16 = ("--weights_dtype", "bf16", "--mixed_precision", "bf16", "--use_torchao", "--optimizer", "adamw")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_original_folder(tmp_path_factory.mktemp("data"), 4)


def train(script, model: Path, data: Path, output: Path, *flags: str) -> dict[str, torch.Tensor]:
    common = ("--load_tensors", "--learning_rate", "1e-3", "--max_train_steps", "2", "--checkpointing_steps", "1")
    # torchao compiles its step, which changes nothing in the result and takes long on a CPU.
    with torch.compiler.set_stance("force_eager"):
        return weights_of(tiny_runs.train(script, model, data, output, *common, *flags))


def resume(script, model: Path, data: Path, whole: Path, output: Path, *flags: str) -> dict[str, torch.Tensor]:
    shutil.copytree(whole / "checkpoint-1", output / "checkpoint-1")
    return train(script, model, data, output, "--resume_from_checkpoint", "latest", *flags)


def test_a_schedule_free_run_writes_the_average_and_resumes_from_the_weights(tiny_models, data, tmp_path):
    flags = ("--optimizer", "schedulefree", "--rank", "4", "--report_to", "none")
    script = cogvideox_text_to_video_lora
    whole = train(script, tiny_models("5b"), data, tmp_path / "whole", *flags)
    trained = weights_of(tmp_path / "whole" / "checkpoint-2")
    assert all(not torch.equal(trained[name], whole[name]) for name in whole if "lora_B" in name)
    resumed = resume(script, tiny_models("5b"), data, tmp_path / "whole", tmp_path / "resumed", *flags)
    assert_same_weights(resumed, whole)


def test_bf16_weights_stepped_in_the_backward_pass_resume_bit_for_bit(tiny_models, data, tmp_path, capsys):
    script, model, flags = cogvideox_text_to_video_sft, tiny_models("5b"), (*BF16, "--step_in_backward")
    whole = train(script, model, data, tmp_path / "whole", *flags)
    kept = weights_of(tmp_path / "whole" / "checkpoint-2")
    assert {weight.dtype for weight in kept.values()} == {torch.float32}
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in kept.values())
    assert curve(tmp_path / "whole", "loss")
    with pytest.raises(KeyError):  # unknown
        curve(tmp_path / "whole", "grad_norm")

    assert_same_weights(resume(script, model, data, tmp_path / "whole", tmp_path / "resumed", *flags), whole)
    start = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(not torch.equal(whole[name], start[name]) for name in whole if name.endswith("to_q.weight"))

    with pytest.raises(SystemExit, match="2"):
        resume(script, model, data, tmp_path / "whole", tmp_path / "other")
    assert "--weights_dtype was bf16, is now fp32" in capsys.readouterr().err
