"""The configuration that a run writes repeats it exactly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

import cogvideox_text_to_video_lora
from args import parse_args
from cli.schema import flag_values
from common.run_folder import CONFIG_FILE
from memory.settings import memory_settings_of, with_memory
from results.publish import PRIVATE
from run.config import render_config, split_flags
from tiny_runs import run_flags


LORA = "pytorch_lora_weights.safetensors"
TOKEN = "hf_" + "Secret0" * 5


@pytest.fixture
def run(tiny_models, demo_clips, fresh_accelerator):
    def run(output: Path, *flags: str) -> dict[str, torch.Tensor]:
        """Return the trained weights of a run with these flags."""
        AcceleratorState._reset_state(reset_partial_state=True)
        few = ("--max_samples", "2", "--train_batch_size", "1", "--rank", "4")
        argv = ["--output_dir", str(output)]
        if "--config" not in flags:
            argv = run_flags(tiny_models("5b"), demo_clips, output, *few)
        cogvideox_text_to_video_lora.main([*argv, *flags])
        return load_file(output / LORA)

    return run


def test_the_configuration_repeats_a_run_bit_for_bit(run, tmp_path):
    first = run(
        tmp_path / "first",
        *("--max_train_steps", "2", "--memory_budget_gb", "64", "--random_flip", "0.5", "--caption_dropout", "0.5"),
    )
    drawn = yaml.safe_load((tmp_path / "first" / CONFIG_FILE).read_text())
    assert isinstance(drawn["seed"], int)
    assert "memory_budget_gb" not in drawn
    assert drawn["mixed_precision"] == "no"
    again = run(tmp_path / "again", "--config", str(tmp_path / "first" / CONFIG_FILE))
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_resumed_run_keeps_its_first_configuration(run, tmp_path, capfd):
    steps = ("--max_train_steps", "1", "--seed", "3")
    run(tmp_path, *steps)
    began = (tmp_path / CONFIG_FILE).read_text()
    resume = ("--resume_from_checkpoint", "latest")
    run(tmp_path, *steps, *resume)
    assert not list(tmp_path.glob("config-step-*"))  # the flags did not change
    run(tmp_path, "--max_train_steps", "2", *resume, "--config", str(tmp_path / CONFIG_FILE))
    with pytest.raises(SystemExit):
        run(tmp_path, "--max_train_steps", "1", *resume)
    assert not (tmp_path / "config-step-2.yaml").exists()  # which a launcher would continue with
    assert (tmp_path / CONFIG_FILE).read_text() == began
    assert "other flags than before: --max_train_steps; noted in config-step-1.yaml" in capfd.readouterr().err
    assert "ANOTHER_FOLDER\n" in began
    noted = (tmp_path / "config-step-1.yaml").read_text()
    assert f"ANOTHER_FOLDER --resume_from_checkpoint {tmp_path}/checkpoint-1\n" in noted
    went_on = yaml.safe_load(noted)
    assert went_on == yaml.safe_load(began) | {"max_train_steps": 2}

    for text in ("- a list", "rank: [", "rank: \xff"):  # edited by someone
        (tmp_path / "config-step-1.yaml").write_bytes(text.encode("latin-1"))
        run(tmp_path, "--max_train_steps", "2", *steps[2:], *resume)
        assert (
            "config-step-1.yaml is not a list of flags any more; they are noted in config-step-2"
            in capfd.readouterr().err
        )
        (tmp_path / "config-step-2.yaml").unlink()


def parsed(*flags: str, method: str = "lora"):
    required = ["--pretrained_model_name_or_path", "a/b", "--data_root", "."]
    return parse_args([*required, *flags], task="text-to-video", method=method)


def written(args) -> str:
    """Return the configuration of a run with these flags."""
    return render_config(*split_flags(args, seed=7), ["a title"])


def reread(text: str, folder: Path, method: str = "lora"):
    """Return the settings of a script with only that file."""
    (folder / "again.yaml").write_text(text, encoding="utf-8")
    return parse_args(["--config", str(folder / "again.yaml")], task="text-to-video", method=method)


@pytest.mark.parametrize(
    "flags",
    [
        ("--height", "64", "--width", "96", "--fps", "8"),
        ("--validation_prompt", "- \U0001f407 'a' \"b\": c # d\nnext line:::兔子 \x85", "--validation_steps", "5"),
        ("--learning_rate", "1e-5", "--frame_buckets", "17", "49", "81", "--no-validate_first"),
        ("--lora_target_modules", "to_q", "--id_token", "no", "--weight_decay", "0.1"),
        ("--optimizer", "prodigy", "--learning_rate", "1", "--mixed_precision", "no"),
    ],
)
def test_the_configuration_reads_as_the_same_flags(tmp_path, flags):
    args = parsed(*flags)
    again = reread(written(args), tmp_path)
    assert again.given == args.given | {"seed", "mixed_precision", "config"}
    assert flag_values(again) == flag_values(args) | {"seed": 7, "mixed_precision": "no"}
    assert again.validation == args.validation


@pytest.mark.parametrize(
    ("method", "chosen"),
    [
        ("lora", {"gradient_checkpointing": True, "offload_checkpoints": True, "quantize_base": "int8"}),
        ("lora", {"gradient_checkpointing": True, "checkpoint_every": 2}),
        ("sft", {"weights_dtype": "bf16", "use_8bit": True, "use_torchao": True, "step_in_backward": True}),
    ],
)
def test_chosen_memory_settings_are_written_like_passed_flags(tmp_path, method, chosen):
    args = parsed("--memory_budget_gb", "20", "--optimizer", "adamw", "--mixed_precision", "bf16", method=method)
    args = with_memory(args, replace(memory_settings_of(args), **chosen))
    again = reread(written(args), tmp_path, method)
    assert (again.memory.memory_budget_gb, again.optimizer.max_grad_norm) == (None, args.optimizer.max_grad_norm)
    assert memory_settings_of(again) == memory_settings_of(args)
    assert chosen.keys() <= again.given


def test_defaults_are_written_as_comments(tmp_path):
    comments = [line[2:] for line in written(parsed("--rank", "8")).splitlines() if line.startswith("# ")]
    values = yaml.safe_load("\n".join(comments[2:]))
    assert (values["learning_rate"], values["lora_alpha"], values["long_clips"]) == (1e-4, 64, "spread")
    assert not {"rank", "seed", "hub_token"} & values.keys()


def test_no_token_is_written_and_a_repeated_run_uploads_nothing(tmp_path):
    text = written(
        parsed("--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "me/it", "--id_token", f"a {TOKEN}")
    )
    assert TOKEN not in text
    assert "hub_token" not in text
    again = reread(text, tmp_path)
    assert (again.hub.push_to_hub, again.hub.hub_model_id) == (False, None)


def test_the_configuration_is_not_uploaded():
    files = [CONFIG_FILE, "config-step-12.yaml", "transformer/config.json"]
    assert list(filter_repo_objects(files, ignore_patterns=list(PRIVATE))) == ["transformer/config.json"]
