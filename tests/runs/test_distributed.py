"""Two processes on one machine, over gloo; training is launched as users launch it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

import cogvideox_text_to_video_lora
import cogvideox_text_to_video_sft
from common.run_folder import LORA_FILE
from forked_ranks import finish
from prepared.read_index import read_index
from repository import TRAINING
from tiny_runs import SIZE, assert_same_weights, curve, short_run_flags, weights_of


SCRIPTS_IN_TURN = Path(__file__).parents[1] / "helpers" / "fsdp_on_cpu.py"
CONFIGS = TRAINING.parent / "accelerate_configs"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LORA, ALL_WEIGHTS = "cogvideox_text_to_video_lora.py", "cogvideox_text_to_video_sft.py"
# 16 samples make batches of 3, 3, 3, 3, 3 and 1: two steps an epoch, where ranks have different numbers of samples and
# the second one accumulates fewer batches. Gradients are clipped to a hundredth.
STEPS = ["--train_batch_size", "3", "--max_train_steps", "4", "--max_grad_norm", "0.01"]
STEPS += ["--optimizer", "adamw", "--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "0"]


def zero(config: str | Path) -> list[str]:
    """Return the launcher for one of our DeepSpeed configurations, or another file."""
    return ["accelerate.commands.launch", "--config_file", str(CONFIGS / config)]


def launch(launcher: Iterable[str], script: str, *flags: str, fails: bool = False) -> str:
    """Run a script on two ranks; returns its output."""
    by_accelerate = "accelerate.commands.launch" in launcher
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(TRAINING / script), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | ({} if by_accelerate else {"ACCELERATE_USE_CPU": "true"}),
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def assert_same_run(output: Path, expected: Path, *, tolerance: float = 1e-5) -> None:
    """Check that losses, gradient norms, learning rates and results are equal up to rounding."""
    for name in ("loss", "grad_norm", "lr"):
        assert curve(output, name) == pytest.approx(curve(expected, name), rel=tolerance), name
    ours, theirs = weights_of(output), weights_of(expected)
    assert ours.keys() == theirs.keys()
    distance = sum((ours[name] - theirs[name]).float().square().sum() for name in ours).sqrt()
    assert distance < 10 * tolerance * sum(theirs[name].float().square().sum() for name in ours).sqrt()


@pytest.fixture(scope="module")
def prepared_by_two(tiny_models, demo_clips, tmp_path_factory) -> tuple[Path, str]:
    """A folder that two ranks prepared, and what they printed."""
    folder = tmp_path_factory.mktemp("prepared-by-two")
    flags = ["--model_id", str(tiny_models("5b")), "--data_root", str(demo_clips), "--output_dir", str(folder / "out")]
    flags += [*SIZE, "--save_latents_and_embeddings"]
    return folder / "out", finish("prepare_dataset", flags, folder / "log.txt", num_ranks=2)


@pytest.fixture(scope="module")
def fixed_flags(prepared_by_two, tiny_models) -> list[str]:
    return [*short_run_flags(tiny_models("5b"), prepared_by_two[0]), "--load_tensors", *STEPS]


@pytest.fixture(scope="module")
def lora_of_one(fixed_flags, tmp_path_factory) -> Path:
    """A LoRA of one process: the batches of a step one after another."""
    from accelerate.state import AcceleratorState

    output = tmp_path_factory.mktemp("one") / "lora"
    more = ["--rank", "4", "--gradient_accumulation_steps", "4", "--output_dir", str(output)]
    cogvideox_text_to_video_lora.main([*fixed_flags, *more])
    AcceleratorState._reset_state(reset_partial_state=True)
    return output


LORA_OF_TWO = ["--rank", "4", "--gradient_accumulation_steps", "2"]


def test_two_ranks_share_the_clips_and_prepare_all_of_them(prepared_by_two):
    folder, output = prepared_by_two
    assert "16/16" in output  # the first rank shows the progress of both
    (encoded,) = re.findall(r"^encoded (\d+) clips", output, flags=re.MULTILINE)
    assert 0 < int(encoded) < 16
    assert output.count("prepared 16 samples") == 1
    assert len(read_index(folder)) == 16


def test_two_ranks_train_validate_and_save_as_one_does(fixed_flags, lora_of_one, tmp_path):
    flags = [*fixed_flags, *LORA_OF_TWO, "--output_dir", str(tmp_path), "--checkpointing_steps", "2"]
    (tmp_path / "validation" / "step-4" / "01-00-b.mp4").mkdir(parents=True)  # in the way of the second rank
    output = launch(TORCHRUN, LORA, *flags, "--num_inference_steps", "1", "--validation_prompt", "a:::b:::c")
    assert "devices     2 x cpu" in output
    assert_same_run(tmp_path, lora_of_one)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    before, after = (tmp_path / "validation" / f"step-{step}" for step in (0, 4))
    names = ["00-00-a.mp4", "01-00-b.mp4", "02-00-c.mp4", "contact_sheet.png"]
    assert sorted(path.name for path in before.iterdir() if path.is_file()) == names
    # A rank that fails neither blocks the others nor ends the run.
    assert sorted(path.name for path in after.iterdir() if path.is_file()) == [names[0], *names[2:], LORA_FILE]
    assert_same_weights(weights_of(after), weights_of(tmp_path))
    assert "warning: validation at step 4 failed, training continues; rank 1: " in output


def test_a_sharded_run_is_that_of_one_process_and_resumes_exactly(fixed_flags, lora_of_one, tiny_models, tmp_path):
    pytest.importorskip("deepspeed")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = [*fixed_flags, *LORA_OF_TWO, "--output_dir"]
    runs = [[*flags, str(whole), "--checkpointing_steps", "3"]]
    runs += [[*flags, str(resumed), "--resume_from_checkpoint", str(whole / "checkpoint-3")]]
    (tmp_path / "runs.json").write_text(json.dumps([(LORA.removesuffix(".py"), run) for run in runs]))
    output = launch(zero("zero2.yaml"), str(SCRIPTS_IN_TURN), str(tmp_path / "runs.json"))
    assert "devices     2 x cpu" in output
    assert_same_run(whole, lora_of_one)
    pipeline = CogVideoXPipeline.from_pretrained(tiny_models("5b"))
    pipeline.load_lora_weights(whole)
    assert pipeline.transformer.peft_config["default_0"].r == 4
    for name in ("loss", "grad_norm", "lr"):
        assert curve(resumed, name) == {4: curve(whole, name)[4]}
    assert_same_weights(weights_of(resumed), weights_of(whole))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, zero("zero2.yaml")], ids=["ddp", "zero2"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_counted(
    fixed_flags, prepared_by_two, tmp_path, launcher
):
    shutil.copytree(prepared_by_two[0], tmp_path / "data")
    shard = next((tmp_path / "data" / "latents").glob("*.safetensors"))
    tensors = load_file(shard)
    name = min(tensors)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, shard)
    flags = [*fixed_flags, *LORA_OF_TWO, "--data_root", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    output = launch(launcher, LORA, *flags)
    # Once in each of two epochs.
    assert output.count("is skipped: its loss is not finite; it trained on ") == 2
    assert name.rpartition(".")[0] in output
    assert "warning: 2 steps were skipped" in output
    rates = [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert list(curve(tmp_path / "out", "lr").values()) == pytest.approx(rates)
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "out").values())


def custom_zero3_config(folder: Path, **changed: object) -> Path:
    """Write an accelerate configuration that names a DeepSpeed one: ZeRO-3 that shards even the smallest weights."""
    zero3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": "auto"}
    config = {"zero_optimization": zero3, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    (folder / "zero3.json").write_text(json.dumps(config | changed))
    text = (CONFIGS / "zero3.yaml").read_text().split("deepspeed_config:")[0]
    text += f"deepspeed_config:\n  deepspeed_config_file: {folder / 'zero3.json'}\nnum_machines: 1\nnum_processes: 2\n"
    (folder / "zero3.yaml").write_text(text)
    return folder / "zero3.yaml"


@pytest.mark.slow
def test_a_lora_on_a_sharded_model_is_that_of_one_process(fixed_flags, lora_of_one, tmp_path):
    pytest.importorskip("deepspeed")
    launcher, whole, resumed = zero(custom_zero3_config(tmp_path)), tmp_path / "whole", tmp_path / "resumed"
    flags = [*fixed_flags, *LORA_OF_TWO, "--gradient_checkpointing", "--output_dir"]
    more = ["--checkpointing_steps", "3", "--validation_steps", "2", "--num_inference_steps", "1"]
    (whole / "validation" / "step-2" / "01-00-b.mp4").mkdir(parents=True)  # in the way of the second rank
    output = launch(launcher, LORA, *flags, str(whole), *more, "--validation_prompt", "a:::b:::c")
    assert ": 16,384 of 1,263,808 parameters" in output
    assert "warning: validation at step 2 failed, training continues; rank 1: " in output
    assert len(list((whole / "validation" / "step-4").glob("*.mp4"))) == 3
    assert_same_weights(weights_of(whole / "validation" / "step-4"), weights_of(whole))
    assert_same_run(whole, lora_of_one)

    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    launch(launcher, LORA, *flags, str(resumed), "--resume_from_checkpoint", "latest")
    assert_same_weights(weights_of(resumed), weights_of(whole))


@pytest.mark.slow
def test_ema_of_a_sharded_run_is_resumed_on_as_many_processes(fixed_flags, tmp_path):
    pytest.importorskip("deepspeed")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = [*fixed_flags, *LORA_OF_TWO, "--use_ema", "--ema_decay", "0.5", "--output_dir"]
    launch(zero("zero2.yaml"), LORA, *flags, str(whole), "--checkpointing_steps", "3")
    last = weights_of(whole / "checkpoint-4")
    assert any(not torch.equal(weights_of(whole)[name], weight) for name, weight in last.items())
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    flags += [str(resumed), "--resume_from_checkpoint", "latest"]
    assert "DeepSpeed was ZeRO-2 on 2 processes, is now off" in launch(TORCHRUN, LORA, *flags, fails=True)
    launch(zero("zero2.yaml"), LORA, *flags)
    assert_same_weights(weights_of(resumed), weights_of(whole))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, zero("zero3.yaml")], ids=["DDP", "ZeRO-3"])
def test_several_processes_do_a_dry_run(fixed_flags, tmp_path, launcher):
    if launcher is not TORCHRUN:
        pytest.importorskip("deepspeed")
    output = launch(launcher, LORA, *fixed_flags, *LORA_OF_TWO, "--output_dir", str(tmp_path / "run"), "--dry_run")
    assert "saving, loading and sampling all work; nothing is kept" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "precision", "tolerance"),
    # A difference in the last digit becomes another number of bf16 here and there, and linear layers of ZeRO-3 round
    # elsewhere. Of weights kept in bf16 only those of linear layers are what autocast would make of float32 ones:
    # norms and biases lose what is small beside them.
    [
        ("zero2_offload.yaml", "no --weights_dtype fp32", 1e-5),
        ("zero2.yaml", "bf16 --weights_dtype fp32", 1e-3),
        ("zero2.yaml", "bf16 --weights_dtype bf16", 3e-2),
        (None, "no --weights_dtype fp32", 1e-5),
        (None, "bf16 --weights_dtype fp32", 1e-2),
        (None, "bf16 --weights_dtype bf16", 3e-2),
    ],
)
def test_sharded_full_fine_tuning_is_that_of_one_process(
    fixed_flags, tmp_path, fresh_accelerator, config, precision, tolerance
):
    pytest.importorskip("deepspeed")
    launcher = zero(config or custom_zero3_config(tmp_path))
    one, whole, resumed = (tmp_path / name for name in ("one", "whole", "resumed"))
    precision, flag, weights = precision.split()
    flags = [*fixed_flags, "--learning_rate", "1e-4", "--mixed_precision", precision]
    cogvideox_text_to_video_sft.main([*flags, "--gradient_accumulation_steps", "4", "--output_dir", str(one)])
    flags += [flag, weights, "--gradient_accumulation_steps", "2", "--output_dir"]
    launch(launcher, ALL_WEIGHTS, *flags, str(whole), "--checkpointing_steps", "3")
    assert_same_run(whole, one, tolerance=tolerance)
    CogVideoXTransformer3DModel.from_pretrained(whole / "transformer")
    saved = weights_of(whole / "checkpoint-4")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    if weights == "bf16":  # the optimizer's, not the rounded ones
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in saved.values())

    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    launch(launcher, ALL_WEIGHTS, *flags, str(resumed), "--resume_from_checkpoint", "latest")
    assert_same_weights(weights_of(resumed), weights_of(whole))
