"""What contradicts a launch by DeepSpeed is said in one line, before anything is imported."""

import json
import re
from pathlib import Path

import pytest

from args import parse_args
from checks.deepspeed import describe_division, zero_stage


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Make this process one of two that were launched with DeepSpeed, of this stage or configuration."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def launch(config: int | dict) -> None:
        if isinstance(config, int):
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(config))
            return
        (tmp_path / "zero.json").write_text(json.dumps(config))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))

    return launch


def parse(folder: Path, method: str, *flags: str):
    fixed = ["--pretrained_model_name_or_path", "o/m", "--data_root", str(folder), "--output_dir", str(folder / "o")]
    return parse_args([*fixed, "--optimizer", "adamw", *flags], task="text-to-video", method=method)


ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("config", "method", "flags", "words"),
    [
        (0, "lora", "", "--config_file: ZeRO stage 0 divides nothing; use 2 or 3"),
        (2, "sft", "--mixed_precision fp16", "--mixed_precision fp16: .*use bf16"),
        (2, "lora", "--optimizer prodigy", "--optimizer prodigy: .*use --optimizer adamw"),
        (2, "lora", "--optimizer muon", "--optimizer muon: .*use --optimizer adamw"),
        (2, "sft", "--use_8bit", "--use_8bit: .*omit it .OPTIMIZER_FLAGS="),
        (2, "sft", "--weights_dtype bf16 --use_torchao --mixed_precision bf16", "--use_torchao: .*omit it"),
        (2, "sft", "--weights_dtype bf16", "--weights_dtype bf16: .*use --mixed_precision bf16"),
        (2, "lora", "--context_parallel_size 2", "--context_parallel_size: not with DeepSpeed"),
        (2, "lora", "--memory_budget_gb 24", "--memory_budget_gb: .*omit it"),
        (2, "lora", "--quantize_base int8", "--quantize_base int8: DeepSpeed cannot shard quantized"),
        (3, "lora", "--adapter lokr", "--adapter lokr: DeepSpeed cannot shard weights that peft multiplies"),
        (2, "sft", "--use_ema --mixed_precision bf16 --weights_dtype bf16", "--use_ema: .*--weights_dtype fp32"),
        (3, "lora", "--use_ema", "--use_ema: .*omit it"),
        (3, "lora", "--compile", "--compile: .*use ZeRO-2"),
        (3, "lora", "--enable_model_cpu_offload", "--enable_model_cpu_offload: .*use ZeRO-2"),
        ({}, "lora", "", "deepspeed_config_file '.*zero.json' is not a DeepSpeed configuration"),
        (ZERO2 | {"gradient_clipping": 0.5}, "lora", "", "is 0.5, but --max_grad_norm is 1; remove it there"),
        (ZERO2 | {"gradient_accumulation_steps": 2}, "lora", "", "is 2, but --gradient_accumulation_steps is 1"),
        (ZERO2 | {"train_batch_size": 2}, "lora", "--train_batch_size 4", "is 2, but .* is 8; remove it there"),
        (ZERO2 | {"optimizer": {"type": "Adam"}}, "lora", "", "DeepSpeed's optimizer .* --optimizer; remove it"),
        (ZERO2 | {"scheduler": {"type": "WarmupLR"}}, "lora", "", "DeepSpeed's scheduler .* --lr_scheduler; remove"),
        (ZERO2 | {"bf16": {"enabled": True}}, "lora", "", "DeepSpeed's bf16 is not --mixed_precision no"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_refused(launched, tmp_path, capsys, config, method, flags, words):
    launched(config)
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(tmp_path, method, *flags.split())
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert re.search(words, line), line


@pytest.mark.parametrize(
    ("config", "method", "flags"),
    [
        (2, "lora", "--use_ema --mixed_precision bf16 --compile"),
        (2, "sft", "--use_ema --mixed_precision bf16"),
        (3, "sft", "--mixed_precision bf16 --weights_dtype bf16 --gradient_checkpointing"),
        (ZERO2 | {"gradient_clipping": "auto", "train_micro_batch_size_per_gpu": 4}, "lora", "--train_batch_size 4"),
        (ZERO2 | {"bf16": {"enabled": True}}, "sft", "--mixed_precision bf16"),
    ],
)
def test_what_goes_with_deepspeed_passes(launched, tmp_path, config, method, flags):
    launched(config)
    parse(tmp_path, method, *flags.split())


def test_what_the_yaml_says_of_a_step_must_be_what_the_flags_say(launched, tmp_path, capsys, monkeypatch):
    launched(2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.3")
    parse(tmp_path, "lora", "--max_grad_norm", "0.3")
    with pytest.raises(SystemExit):
        parse(tmp_path, "lora")
    assert "DeepSpeed's gradient_clipping is 0.3, but --max_grad_norm is 1" in capsys.readouterr().err


def test_a_checkpoint_knows_how_it_is_divided(launched):
    assert (zero_stage(), describe_division()) == (2, "ZeRO-2 on 2 processes")
    launched({"zero_optimization": {"stage": 3}})
    assert (zero_stage(), describe_division()) == (3, "ZeRO-3 on 2 processes")


def test_without_deepspeed_nothing_is_divided(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert (zero_stage(), describe_division()) == (0, False)
