"""The command line: names, defaults and aliases as users know them, and one clear line for every mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from args import parse_args, parse_prepare_args
from checks.files import check_files
from common.errors import UserError
from flags.data import SourceFlags
from flags.schema import flag_values
from flags.settings import TrainingSettings
from flags.types import TABLE_SUFFIXES
from repository import TRAINING


BUCKETS = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)

DATA_DEFAULTS = {
    "dataset_file": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "dataset_split": "train",
    "dataset_streaming": False,
    "dataset_mix": None,
    "max_samples": None,
    "on_bad_clip": "error",
    "allow_outside_paths": False,
    "video_column": "video",
    "image_column": None,
    "id_token": None,
    "height_buckets": BUCKETS,
    "width_buckets": BUCKETS,
    "frame_buckets": (49,),
    "random_flip": None,
    "dataloader_num_workers": 0,
    "pin_memory": False,
    "height": 480,
    "width": 720,
    "video_reshape_mode": "center",
    "fps": None,
    "max_num_frames": 49,
    "skip_frames_start": 0,
    "skip_frames_end": 0,
    "long_clips": "spread",
    "hold_last_frame": False,
    "revision": None,
    "variant": None,
    "cache_dir": None,
}

TRAINING_DEFAULTS = DATA_DEFAULTS | {
    "caption_column": "text",
    "load_tensors": False,
    "ignore_prepared_mismatch": False,
    "validation_prompt": None,
    "validation_dataset_file": None,
    "validation_images": None,
    "validation_prompt_separator": ":::",
    "num_validation_videos": 1,
    "validation_epochs": None,
    "validation_steps": None,
    "validate_first": False,
    "num_inference_steps": 50,
    "guidance_scale": 6.0,
    "use_dynamic_cfg": False,
    "enable_model_cpu_offload": False,
    "seed": None,
    "rank": 64,
    "lora_alpha": 64,
    "mixed_precision": None,
    "train_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "checkpoint_minutes": None,
    "max_bad_steps": 10,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-4,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "enable_slicing": False,
    "enable_tiling": False,
    "noised_image_dropout": 0.05,
    "ignore_learned_positional_embeddings": False,
    "dry_run": False,
    "caption_dropout": 0.0,
    "timestep_sampling": "uniform",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "stratified_timesteps": False,
    "snr_gamma": None,
    "use_ema": False,
    "ema_decay": 0.9999,
    "optimizer": "adam",
    "use_8bit": False,
    "use_4bit": False,
    "use_fp8": False,
    "use_torchao": False,
    "beta1": 0.9,
    "beta2": 0.95,
    "beta3": None,
    "prodigy_decouple": False,
    "weight_decay": 1e-4,
    "epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "prodigy_use_bias_correction": False,
    "prodigy_safeguard_warmup": False,
    "use_cpu_offload_optimizer": False,
    "offload_gradients": False,
    "step_in_backward": False,
    "checkpoint_scope": "block",
    "checkpoint_every": 1,
    "offload_checkpoints": False,
    "text_encoder_8bit": False,
    "auto_fit": False,
    "memory_budget_gb": None,
    "compile": False,
    "attention_backend": None,
    "validation_attention_backend": None,
    "context_parallel_size": 1,
    "profile": False,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "logging_steps": 10,
    "allow_tf32": False,
    "nccl_timeout": 600,
    "report_to": "tensorboard",
}

METHOD_DEFAULTS = {
    "lora": {
        "lora_target_modules": ("to_q", "to_k", "to_v", "to_out.0"),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "lora_weights": None,
        "quantize_base": "none",
        "stream_blocks": False,
    },
    "sft": {"save_pipeline": False, "weights_dtype": "fp32"},
}
# Parts of the toolkit ask for these without asking for the method.
PREPARE_DEFAULTS = DATA_DEFAULTS | {
    "model_id": "THUDM/CogVideoX-2b",
    "caption_column": "caption",
    "save_image_latents": False,
    "num_image_latents": 1,
    "layout": "files",
    "shard_size_mb": 1024,
    "dry_run": False,
    "max_sequence_length": 226,
    "target_fps": 8,
    "save_latents_and_embeddings": False,
    "use_slicing": False,
    "use_tiling": False,
    "batch_size": 1,
    "num_decode_threads": 0,
    "dtype": "fp32",
    "seed": 42,
    "num_artifact_workers": 4,
    "text_encoder_8bit": False,
}

ALIASES = [
    ("--adam_beta1", "beta1"),
    ("--adam_beta2", "beta2"),
    ("--adam_weight_decay", "weight_decay"),
    ("--adam_epsilon", "epsilon"),
]

BAD_TRAINING_FLAGS = [
    ("--dataset_file a.csv --dataset_name org/name", "--dataset_name", "--dataset_file already names the data"),
    ("--dataset_streaming", "--dataset_streaming", "no effect without --dataset_name"),
    ("--dataset_config_name x", "--dataset_config_name", "no effect without --dataset_name"),
    ("--dataset_mix mix.json", "--data_root", "each entry of --dataset_mix names its own"),
    ("--fps 8 --long_clips spread", "--long_clips spread", "omit --fps"),
    ("--long_clips last", "--long_clips", "spread, first, split"),
    ("--on_bad_clip ignore", "--on_bad_clip", "error, skip"),
    ("--max_samples 0", "--max_samples", "1 or more"),
    ("--height_buckets 500", "--height_buckets", "nearest valid sizes are 496 and 512"),
    ("--width_buckets 480 728", "--width_buckets", "728 is not divisible by 16; nearest valid sizes are 720 and 736"),
    ("--height 8", "--height", "nearest valid size is 16"),
    ("--width 721", "--width", "720 and 736"),
    ("--height 500 --width 720", "--height:", "496 and 512"),
    ("--frame_buckets 50", "--frame_buckets", "nearest valid counts are 49 and 52"),
    ("--frame_buckets 2", "--frame_buckets", "1 and 4"),
    ("--max_num_frames 51", "--max_num_frames", "49 and 52"),
    ("--frame_buckets 81 85", "--frame_buckets", "--max_num_frames 85"),
    ("--frame_buckets", "--frame_buckets", "at least one"),
    ("--height_buckets wide", "--height_buckets", "'wide' is not a whole number"),
    ("--rank 0", "--rank", "1 or more"),
    ("--lora_alpha 0", "--lora_alpha", "above 0"),
    ("--lora_dropout 1", "--lora_dropout", "not including, 1"),
    ("--lora_target_modules", "--lora_target_modules", "at least one"),
    ("--lora_target_modules to_q all-linear", "--lora_target_modules", "all-linear already includes the others"),
    ("--lora_weights nowhere", "--lora_weights", "no file 'nowhere'"),
    ("--lora_weights clips", "--lora_weights", "no file 'clips/pytorch_lora_weights.safetensors'"),
    ("--lora_weights first.png", "--lora_weights", "'first.png' is not a .safetensors file"),
    ("--save_pipeline", "--save_pipeline", "unknown flag"),
    ("--train_batch_size 0", "--train_batch_size", "1 or more"),
    (f"--seed {2**32}", "--seed", f"4294967296 is too large; pass a whole number up to {2**32 - 1}"),
    ("--num_inference_steps 2000", "--num_inference_steps", "2000 is too large; pass a whole number up to 1000"),
    ("--validation_prompt \udcb0", "--validation_prompt", "the text is not UTF-8"),
    ("--train_batch_size 1.5", "--train_batch_size", "not a whole number"),
    ("--gradient_accumulation_steps -1", "--gradient_accumulation_steps", "1 or more"),
    ("--max_train_steps 0", "--max_train_steps", "1 or more"),
    ("--num_train_epochs 0", "--num_train_epochs", "1 or more"),
    ("--checkpointing_steps 0", "--checkpointing_steps", "1 or more"),
    ("--checkpoints_total_limit 0", "--checkpoints_total_limit", "1 or more"),
    ("--checkpoint_minutes 0", "--checkpoint_minutes", "above 0"),
    ("--max_bad_steps 0", "--max_bad_steps", "1 or more"),
    ("--nccl_timeout 0", "--nccl_timeout", "1 or more"),
    ("--logging_steps 0", "--logging_steps", "1 or more"),
    ("--num_inference_steps 0", "--num_inference_steps", "1 or more"),
    ("--dataloader_num_workers -1", "--dataloader_num_workers", "0 or more"),
    ("--lr_warmup_steps -1", "--lr_warmup_steps", "0 or more"),
    ("--skip_frames_start -1", "--skip_frames_start", "0 or more"),
    ("--random_flip 1.5", "--random_flip", "from 0 to 1"),
    ("--noised_image_dropout -0.1", "--noised_image_dropout", "from 0 to 1"),
    ("--fps 0", "--fps", "above 0"),
    ("--fps inf", "--fps", "above 0"),
    ("--learning_rate -1", "--learning_rate", "0 or more"),
    ("--learning_rate nan", "--learning_rate", "out of range"),
    ("--learning_rate fast", "--learning_rate", "'fast' is not a number"),
    ("--beta1 1", "--beta1", "not including, 1"),
    (
        "--optimizer sgd",
        "--optimizer",
        "invalid choice 'sgd'; choose from adam, adamw, prodigy, came, schedulefree, muon",
    ),
    ("--lr_scheduler step", "--lr_scheduler", "cosine_with_restarts"),
    ("--mixed_precision fp8", "--mixed_precision", "no, fp16, bf16"),
    ("--video_reshape_mode crop", "--video_reshape_mode", "center, random, none"),
    ("--report_to mlflow", "--report_to", "tensorboard, wandb, trackio, comet_ml, all, none"),
    ("--use_8bit --use_4bit --use_torchao", "--use_8bit and --use_4bit", "omit the other"),
    ("--use_4bit", "--use_4bit", "add --use_torchao"),
    ("--use_8bit --optimizer came", "--use_8bit", "use --optimizer adamw"),
    ("--use_4bit --use_torchao --optimizer prodigy", "--use_4bit", "use --optimizer adamw"),
    ("--use_cpu_offload_optimizer --optimizer came", "--use_cpu_offload_optimizer", "use --optimizer adamw"),
    ("--use_cpu_offload_optimizer --use_8bit", "--use_cpu_offload_optimizer", "add --use_torchao"),
    ("--use_cpu_offload_optimizer --mixed_precision fp16", "--use_cpu_offload_optimizer", "bf16"),
    ("--use_fp8", "--use_fp8", "add --use_torchao"),
    ("--use_fp8 --use_4bit --use_torchao", "--use_4bit and --use_fp8", "omit the other"),
    ("--step_in_backward --optimizer muon", "--step_in_backward", "use --optimizer adamw"),
    ("--step_in_backward --use_cpu_offload_optimizer", "--step_in_backward", "use --offload_gradients"),
    ("--step_in_backward --gradient_accumulation_steps 2", "--step_in_backward", "--gradient_accumulation_steps 1"),
    ("--step_in_backward --mixed_precision fp16", "--step_in_backward", "bf16"),
    ("--step_in_backward --max_grad_norm 1", "--max_grad_norm", "unknown with --step_in_backward"),
    ("--max_grad_norm -1", "--max_grad_norm", "0 or more"),
    ("--optimizer schedulefree --use_ema", "--use_ema", "use --optimizer adamw"),
    ("--optimizer schedulefree --beta1 0", "--beta1", "pass more than 0"),
    ("--offload_gradients", "--offload_gradients", "add --use_cpu_offload_optimizer"),
    (
        "--use_cpu_offload_optimizer --offload_gradients --gradient_accumulation_steps 2",
        "--offload_gradients",
        "--gradient_accumulation_steps 1",
    ),
    ("--beta3 0.99", "--beta3", "prodigy or came"),
    ("--prodigy_decouple", "--prodigy_decouple", "--optimizer prodigy"),
    ("--prodigy_use_bias_correction", "--prodigy_use_bias_correction", "--optimizer prodigy"),
    ("--prodigy_safeguard_warmup --optimizer came", "--prodigy_safeguard_warmup", "--optimizer prodigy"),
    ("--hub_token secret", "--hub_token", "add --push_to_hub"),
    ("--hub_model_id me/mine", "--hub_model_id", "add --push_to_hub"),
    ("--validation_steps 10", "--validation_steps", "add --validation_prompt"),
    ("--validation_epochs 1", "--validation_epochs", "add --validation_prompt"),
    ("--validate_first", "--validate_first", "add --validation_prompt or --validation_dataset_file"),
    ("--validation_prompt cat:::", "--validation_prompt", "prompt 2 of 2 is empty"),
    ("--validation_prompt cat --validation_prompt_separator=", "--validation_prompt_separator", "empty"),
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint", "no folder 'nowhere'"),
    ("--dataset_file nowhere.csv", "--dataset_file", "no file 'nowhere.csv'"),
    ("--validation_dataset_file nowhere.csv", "--validation_dataset_file", "no file 'nowhere.csv'"),
    ("--validation_dataset_file clips", "--validation_dataset_file", "no file 'clips'"),
    ("--validation_dataset_file file", "--validation_dataset_file", ".csv, .tsv, .jsonl, .json, .parquet"),
    ("--data_root nowhere", "--data_root", "no folder 'nowhere'"),
    ("--data_root=", "--data_root", "empty"),
    ("--data_root", "--data_root", "expected one argument"),
    ("--pretrained_model_name_or_path my-model", "--pretrained_model_name_or_path", "THUDM/CogVideoX-5b"),
    ("--pretrained_model_name_or_path ./models/mine", "--pretrained_model_name_or_path", "no folder"),
    ("--pretrained_model_name_or_path /models", "--pretrained_model_name_or_path", "no folder '/models'"),
    ("--pretrained_model_name_or_path a/b/c", "--pretrained_model_name_or_path", "no folder 'a/b/c'"),
    ("--learning-rate 1e-3", "--learning-rate", "did you mean --learning_rate?"),
    ("--lerning_rate=1e-3", "--lerning_rate", "did you mean --learning_rate?"),
    ("--gradient_checkpoint", "--gradient_checkpoint", "did you mean --gradient_checkpointing?"),
    ("--xyzzy", "--xyzzy", "unknown flag"),
    ("--validation_prompt a cat", "'cat'", "quotes"),
]

BAD_PREPARE_FLAGS = [
    ("--model_id nowhere", "--model_id", "no folder 'nowhere'"),
    ("--pretrained_model_name_or_path ./nowhere", "--model_id", "no folder './nowhere'"),
    ("--height_buckets 500", "--height_buckets", "496 and 512"),
    ("--frame_buckets 81", "--frame_buckets", "--max_num_frames 81"),
    ("--max_num_frames 51", "--max_num_frames", "49 and 52"),
    ("--batch_size 0", "--batch_size", "1 or more"),
    ("--target_fps 0", "--target_fps", "1 or more"),
    ("--max_sequence_length 0", "--max_sequence_length", "1 or more"),
    ("--num_decode_threads -1", "--num_decode_threads", "0 or more"),
    ("--dtype fp8", "--dtype", "fp32, fp16, bf16"),
    ("--dataset_file nowhere.csv", "--dataset_file", "no file 'nowhere.csv'"),
    ("--rank 4", "--rank", "unknown flag"),
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with clips/, model/ (whole), half/ (no model_index.json), first.png and file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    for folder in ("clips", "model", "half"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "first.png").touch()
    (tmp_path / "file").touch()
    return tmp_path


def settings(*flags: str, task: str = "text-to-video", method: str = "lora") -> TrainingSettings:
    required = ["--pretrained_model_name_or_path", "THUDM/CogVideoX-5b", "--data_root", "clips"]
    return parse_args([*required, *flags], task=task, method=method)


def train(*flags: str, **script: str) -> SimpleNamespace:
    """The values of the flags of a training script by name."""
    return SimpleNamespace(**flag_values(settings(*flags, **script)))


def prepare(*flags: str) -> SimpleNamespace:
    return SimpleNamespace(**flag_values(parse_prepare_args(["--data_root", "clips", "--output_dir", "out", *flags])))


def error_of(call: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """The stderr of a call that must leave with code 2, one line and nothing on stdout."""
    with pytest.raises(SystemExit) as leaving:
        call()
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


def help_of(call: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as leaving:
        call()
    assert leaving.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("task", ["text-to-video", "image-to-video"])
@pytest.mark.parametrize("method", ["lora", "sft"])
def test_training_defaults_are_the_documented_ones(task: str, method: str) -> None:
    expected = TRAINING_DEFAULTS | METHOD_DEFAULTS["lora"] | METHOD_DEFAULTS["sft"]
    expected |= {
        "pretrained_model_name_or_path": "THUDM/CogVideoX-5b",
        "data_root": "clips",
        "output_dir": f"cogvideox-{method}",
        "tracker_name": f"cogvideox-{method}",
    }
    assert vars(train(task=task, method=method)) == expected


def test_preparation_defaults_are_the_documented_ones() -> None:
    assert vars(prepare()) == PREPARE_DEFAULTS | {"data_root": "clips", "output_dir": "out"}


def test_defaults_give_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    train()
    prepare()
    assert capsys.readouterr() == ("", "")


def test_an_unknown_task_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="task"):
        train(task="text-to-image")


def test_a_launcher_of_the_original_scripts_parses() -> None:
    line = """--caption_column prompts.txt --video_column videos.txt --id_token BW_STYLE --height_buckets 480
        --width_buckets 720 --frame_buckets 49 --dataloader_num_workers 8 --pin_memory
        --validation_prompt_separator ::: --num_validation_videos 1 --validation_epochs 10 --seed 42 --rank 128
        --lora_alpha 128 --mixed_precision bf16 --output_dir out --max_num_frames 49 --train_batch_size 1
        --max_train_steps 3000 --checkpointing_steps 1000
        --gradient_accumulation_steps 1 --gradient_checkpointing --learning_rate 0.001 --lr_scheduler
        cosine_with_restarts --lr_warmup_steps 400 --lr_num_cycles 1 --enable_slicing --enable_tiling --optimizer adamw
        --beta1 0.9 --beta2 0.95 --weight_decay 0.001 --max_grad_norm 1.0 --allow_tf32 --report_to wandb
        --nccl_timeout 1800"""
    args = train("--validation_prompt", "BW_STYLE a cat:::BW_STYLE a dog", *line.split())
    assert (args.rank, args.lr_scheduler, args.frame_buckets) == (128, "cosine_with_restarts", (49,))


@pytest.mark.parametrize(("alias", "destination"), ALIASES)
def test_an_alias_sets_the_same_destination(alias: str, destination: str) -> None:
    assert getattr(train(alias, "0.25"), destination) == 0.25


def test_instance_data_root_is_data_root() -> None:
    flags = ["--pretrained_model_name_or_path", "a/b", "--instance_data_root", "clips"]
    assert parse_args(flags, task="text-to-video", method="lora").sources.data_root == "clips"


def test_prodigy_beta3_is_beta3() -> None:
    args = train("--prodigy_beta3", "0.5", "--optimizer", "prodigy", "--learning_rate", "1")
    assert args.beta3 == 0.5


def test_use_8bit_adam_is_use_8bit() -> None:
    assert train("--use_8bit_adam").use_8bit


def test_pretrained_model_name_or_path_is_model_id_in_preparation() -> None:
    assert prepare("--pretrained_model_name_or_path", "model").model_id == "model"


@pytest.mark.parametrize(("flags", "named", "advice"), BAD_TRAINING_FLAGS, ids=[bad[0] for bad in BAD_TRAINING_FLAGS])
def test_a_bad_training_flag_is_one_line_that_names_it(
    flags: str, named: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(lambda: train(*flags.split()), capsys)
    assert named in message
    assert advice in message


@pytest.mark.parametrize(("flags", "named", "advice"), BAD_PREPARE_FLAGS, ids=[bad[0] for bad in BAD_PREPARE_FLAGS])
def test_a_bad_preparation_flag_is_one_line_that_names_it(
    flags: str, named: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(lambda: prepare(*flags.split()), capsys)
    assert named in message
    assert advice in message


def test_missing_required_flags_are_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(lambda: parse_args([], task="text-to-video", method="lora"), capsys)
    assert "--pretrained_model_name_or_path, --data_root or --dataset_file or --dataset_name" in message


def test_preparation_requires_an_output_dir(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(lambda: parse_prepare_args(["--data_root", "clips"]), capsys)
    assert "--output_dir: required" in message


def test_long_clips_follow_from_fps_where_nothing_is_said() -> None:
    assert train().long_clips == "spread"
    assert train("--fps", "8").long_clips == "first"
    assert train("--fps", "8", "--long_clips", "split").long_clips == "split"


def test_the_layout_is_that_of_shards_where_there_are_latents(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare().layout == "files"
    assert prepare("--save_latents_and_embeddings").layout == "shards"
    assert prepare("--save_latents_and_embeddings", "--layout", "files").layout == "files"
    assert "--layout shards: no effect without latents" in error_of(lambda: prepare("--layout", "shards"), capsys)


def test_only_shards_have_room_for_several_image_latents(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = ("--save_latents_and_embeddings", "--save_image_latents")
    assert prepare(*tensors).num_image_latents == 4
    assert prepare(*tensors, "--layout", "files").num_image_latents == 1
    flags = (*tensors, "--layout", "files", "--num_image_latents", "2")
    assert "--num_image_latents: --layout files stores only one" in error_of(lambda: prepare(*flags), capsys)


def test_flags_that_contradict_the_preparation_are_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_with = {"id_token": "BW", "fps": None, "height_buckets": [480]}
    (workplace / "clips" / "prepared.json").write_text(json.dumps({"flags": made_with}))
    train("--load_tensors", "--id_token", "BW", "--height_buckets", "480", "--frame_buckets", "45")
    message = error_of(lambda: train("--load_tensors", "--id_token", "XY", "--fps", "8"), capsys)
    assert "--id_token was 'BW', is now 'XY'" in message
    assert "--fps was None, is now 8.0" in message
    assert "height_buckets" not in message


def test_a_misspelt_required_flag_is_not_called_missing(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--pretrained_model_name_or_path", "a/b", "--data_rot", "clips"]
    message = error_of(lambda: parse_args(flags, task="text-to-video", method="lora"), capsys)
    assert "--data_rot: unknown flag; did you mean --data_root?" in message


def test_a_value_with_a_line_break_still_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--rank" in error_of(lambda: train("--rank", "a\nb"), capsys)


@pytest.mark.parametrize("count", ["1", "4", "5", "8", "48", "49"])
def test_frame_counts_that_the_vae_takes_whole_are_accepted(count: str) -> None:
    assert train("--frame_buckets", count, "--max_num_frames", count).frame_buckets == (int(count),)


def test_frame_buckets_above_the_maximum_are_left_out_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--frame_buckets", "17", "49", "81").frame_buckets == (17, 49)
    assert capsys.readouterr().err == "warning: --frame_buckets 81 not used: longer than --max_num_frames 49\n"


@pytest.mark.parametrize("parse", [train, prepare])
def test_height_and_width_alone_become_the_only_bucket(parse: Callable[..., SimpleNamespace]) -> None:
    args = parse("--height", "256", "--width", "384")
    assert (args.height_buckets, args.width_buckets, args.height, args.width) == ((256,), (384,), 256, 384)


def test_height_and_width_equal_to_their_defaults_become_the_only_bucket_too() -> None:
    args = train("--height", "480", "--width", "720")
    assert (args.height_buckets, args.width_buckets) == ((480,), (720,))


def test_height_without_width_leaves_the_buckets_alone() -> None:
    args = train("--height", "256")
    assert (args.height_buckets, args.width_buckets, args.height, args.width) == (BUCKETS, BUCKETS, 256, 720)


def test_a_bucket_list_wins_over_height_and_width() -> None:
    args = train("--height", "256", "--width", "384", "--height_buckets", "480", "512")
    assert (args.height_buckets, args.width_buckets) == ((480, 512), BUCKETS)


def test_choices_are_lowercased() -> None:
    assert train("--optimizer", "AdamW").optimizer == "adamw"


def test_a_learning_rate_of_zero_is_allowed_without_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--learning_rate", "0").learning_rate == 0
    assert capsys.readouterr().err == ""


def test_a_low_lora_learning_rate_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    train("--learning_rate", "1e-5")
    message = capsys.readouterr().err
    assert message.startswith("warning: --learning_rate 1e-05 ")
    assert "1e-4 to 1e-3" in message


def test_a_low_learning_rate_is_fine_for_full_fine_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    train("--learning_rate", "1e-5", method="sft")
    assert capsys.readouterr().err == ""


def test_a_low_learning_rate_is_not_judged_when_it_will_be_scaled(capsys: pytest.CaptureFixture[str]) -> None:
    train("--learning_rate", "1e-5", "--scale_lr")
    assert capsys.readouterr().err == ""


def test_prodigy_is_warned_about_the_learning_rate_of_adam(capsys: pytest.CaptureFixture[str]) -> None:
    train("--optimizer", "prodigy")
    assert "warning: --learning_rate 0.0001 is low for prodigy" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--rank", "--lora_alpha"])
def test_a_lora_flag_is_accepted_with_a_warning_in_full_fine_tuning(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(flag, "64", method="sft")
    assert capsys.readouterr().err == f"warning: {flag} has no effect on full fine-tuning\n"


@pytest.mark.parametrize("name", METHOD_DEFAULTS["lora"])
def test_full_fine_tuning_does_not_know_what_a_lora_alone_has(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--{name}: unknown flag" in error_of(lambda: train(f"--{name}", method="sft"), capsys)


def test_the_lora_to_start_from_is_a_file_or_the_one_in_a_folder(workplace: Path) -> None:
    (workplace / "clips" / "pytorch_lora_weights.safetensors").touch()
    (workplace / "mine.safetensors").touch()
    assert train("--lora_weights", "mine.safetensors").lora_weights == "mine.safetensors"
    assert train("--lora_weights", "clips").lora_weights == "clips/pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    "flags",
    [
        ["--noised_image_dropout", "0.05"],
        ["--ignore_learned_positional_embeddings"],
        ["--validation_images", "no-such.png"],
    ],
    ids=lambda flags: flags[0],
)
def test_an_image_flag_is_accepted_with_a_warning_in_text_to_video(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train(*flags)
    assert capsys.readouterr().err == f"warning: {flags[0]} has no effect on text-to-video training\n"


def test_torchao_alone_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    train("--use_torchao")
    assert "warning: --use_torchao has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--dataset_file", "--dataset_name", "--max_samples"])
def test_a_flag_on_raw_clips_is_warned_about_where_data_was_prepared(
    flag: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "1").touch()
    train("--load_tensors", flag, "1")
    assert capsys.readouterr().err.startswith(f"warning: {flag} has no effect with --load_tensors: ")


def test_epochs_are_warned_about_where_steps_say_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    train("--num_train_epochs", "3", "--max_train_steps", "3")
    assert capsys.readouterr().err.startswith("warning: --num_train_epochs has no effect: --max_train_steps sets")
    train("--num_train_epochs", "3")
    assert capsys.readouterr().err == ""


def test_only_the_first_process_of_a_launch_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    train("--learning_rate", "1e-5")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "flags",
    [
        "--use_8bit",
        "--use_8bit --use_torchao --optimizer adamw",
        "--use_4bit --use_torchao",
        "--use_fp8 --use_torchao --step_in_backward",
        "--use_cpu_offload_optimizer --offload_gradients",
        "--optimizer schedulefree --lr_scheduler constant_with_warmup",
        "--optimizer muon",
        "--optimizer came --beta3 0.9999",
        "--optimizer prodigy --learning_rate 1 --prodigy_decouple --prodigy_use_bias_correction",
        "--push_to_hub --hub_token secret --hub_model_id me/mine",
    ],
)
def test_sensible_combinations_pass_silently(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    train(*flags.split())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", ["--use_cpu_offload_optimizer", "--step_in_backward"])
def test_several_processes_are_refused_where_gradients_are_not_averaged(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        train(flag)
    assert f"{flag}: takes gradients before processes average them; launch one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--optimizer muon --use_torchao", "--weights_dtype bf16: muon does not round stochastically"),
        (
            "--optimizer adamw",
            "--weights_dtype bf16: only torchao's optimizers round stochastically; add --use_torchao",
        ),
        ("--optimizer adam --use_torchao", "use --optimizer adamw or add --use_8bit"),
        ("--use_8bit --use_torchao --mixed_precision no", "use --mixed_precision bf16"),
        ("--use_8bit --use_torchao --use_ema", "--use_ema: bf16 would round away"),
    ],
)
def test_bf16_weights_are_refused_with_what_would_lose_updates(
    flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train("--weights_dtype", "bf16", *flags.split(), method="sft")
    assert words in capsys.readouterr().err


def test_gradients_are_not_clipped_when_steps_are_in_the_backward_pass() -> None:
    assert train("--step_in_backward").max_grad_norm == 0
    assert train("--step_in_backward", "--max_grad_norm", "0").max_grad_norm == 0


def test_a_falling_rate_with_a_schedule_free_optimizer_gets_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    train("--optimizer", "schedulefree", "--lr_scheduler", "cosine")
    assert capsys.readouterr().err.startswith("warning: --lr_scheduler cosine is not needed with schedulefree")


def test_the_first_validation_is_before_training_unless_switched_off(workplace: Path) -> None:
    (workplace / "held-out.csv").touch()
    assert train().validate_first is False
    for validated in (["--validation_prompt", "a cat"], ["--validation_dataset_file", "held-out.csv"]):
        assert train(*validated).validate_first is True
        assert train(*validated, "--validate_first").validate_first is True
        assert train(*validated, "--no-validate_first").validate_first is False
    assert train("--no-validate_first").validate_first is False


def test_a_validation_set_can_be_scheduled_without_prompts(workplace: Path) -> None:
    (workplace / "held-out.csv").touch()
    assert train("--validation_dataset_file", "held-out.csv", "--validation_steps", "10").validation_steps == 10


def test_validation_prompts_are_split_and_stripped() -> None:
    validation = settings("--validation_prompt", " a cat ::: a dog", "--validation_steps", "5").validation
    assert validation.prompts == ("a cat", "a dog")
    assert validation.validation_prompt == " a cat ::: a dog"


def test_validation_prompts_follow_the_separator() -> None:
    validation = settings("--validation_prompt", "a:::b|c", "--validation_prompt_separator", "|").validation
    assert validation.prompts == ("a:::b", "c")


def test_validation_images_are_split_and_may_be_urls() -> None:
    args = settings(
        "--validation_prompt",
        "a cat:::a dog",
        "--validation_images",
        "first.png ::: https://example.org/dog.png",
        task="image-to-video",
    )
    assert args.validation.images == ("first.png", "https://example.org/dog.png")


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--validation_prompt", "a cat"], "0 for 1"),
        (["--validation_prompt", "a:::b", "--validation_images", "first.png"], "1 for 2"),
        (["--validation_images", "first.png"], "1 for 0"),
        (["--validation_prompt", "a", "--validation_images", "no-such.png"], "no file 'no-such.png'"),
    ],
)
def test_image_to_video_validation_needs_one_existing_image_per_prompt(
    flags: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(lambda: train(*flags, task="image-to-video"), capsys)
    assert "--validation_images" in message
    assert advice in message


@pytest.mark.parametrize("model", ["THUDM/CogVideoX-5b", "model", "./model", "some.org/name-1.5"])
def test_hub_ids_and_whole_local_folders_are_models(model: str) -> None:
    assert train("--pretrained_model_name_or_path", model).pretrained_model_name_or_path == model


def test_a_folder_without_model_index_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(lambda: train("--pretrained_model_name_or_path", "half"), capsys)
    assert "--pretrained_model_name_or_path: no model_index.json in 'half'" in message


def test_a_file_named_like_a_hub_id_is_no_model(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "half" / "weights.safetensors").touch()
    message = error_of(lambda: train("--pretrained_model_name_or_path", "half/weights.safetensors"), capsys)
    assert "--pretrained_model_name_or_path: no folder" in message


def test_a_tilde_means_the_home_folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workplace))
    assert train("--pretrained_model_name_or_path", "~/model").pretrained_model_name_or_path == f"{workplace}/model"


def test_a_dataset_file_inside_data_root_is_suggested(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "clips" / "data.csv").touch()
    message = error_of(lambda: train("--dataset_file", "data.csv"), capsys)
    assert f"did you mean '{os.path.join('clips', 'data.csv')}'?" in message


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_a_validation_set_is_any_table_that_training_reads(suffix: str, workplace: Path) -> None:
    (workplace / f"held-out{suffix}").touch()
    assert train("--validation_dataset_file", f"held-out{suffix}").validation_dataset_file == f"held-out{suffix}"


def test_latest_needs_no_folder() -> None:
    assert train("--resume_from_checkpoint", "latest").resume_from_checkpoint == "latest"


def test_a_checkpoint_is_found_by_its_path(workplace: Path) -> None:
    (workplace / "elsewhere").mkdir()
    assert train("--resume_from_checkpoint", "elsewhere").resume_from_checkpoint == "elsewhere"


def test_a_checkpoint_is_found_by_its_name_inside_the_output_folder(workplace: Path) -> None:
    (workplace / "out" / "checkpoint-5").mkdir(parents=True)
    (workplace / "out" / "checkpoint-5" / "manifest.json").write_text("{}")
    args = train("--output_dir", "out", "--resume_from_checkpoint", "checkpoint-5")
    assert args.resume_from_checkpoint == os.path.join("out", "checkpoint-5")


@pytest.mark.parametrize("folder", ["file", "file/below", "file/below/deeper", "dangling/below"])
def test_an_output_folder_that_cannot_be_made_is_refused(
    folder: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "dangling").symlink_to("no-such-target")
    message = error_of(lambda: train("--output_dir", folder), capsys)
    assert "--output_dir" in message
    assert "is not a folder" in message


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder that even root cannot write to")
def test_an_output_folder_that_cannot_be_written_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--output_dir: cannot write to '/proc'" in error_of(lambda: train("--output_dir", "/proc/out"), capsys)


def test_the_checks_leave_nothing_behind(workplace: Path) -> None:
    before = sorted(workplace.rglob("*"))
    train("--output_dir", "new/deeper/out")
    assert sorted(workplace.rglob("*")) == before


def test_check_files_reports_to_python_callers_with_a_user_error() -> None:
    with pytest.raises(UserError, match="--model_id: no folder 'nowhere'"):
        check_files("nowhere", SourceFlags(data_root="clips"), "out", model_flag="--model_id")


def test_training_help_mentions_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    names = set(vars(train())) - METHOD_DEFAULTS["sft"].keys()
    aliases = {alias.removeprefix("--") for alias, _ in ALIASES}
    aliases |= {"instance_data_root", "prodigy_beta3", "use_8bit_adam"}
    shown = help_of(lambda: train("--help"), capsys)
    assert [name for name in names | aliases if f"--{name} " not in shown.replace(",", " ").replace("\n", " ")] == []


def test_preparation_help_mentions_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    names = set(vars(prepare()))
    shown = help_of(lambda: parse_prepare_args(["--help"]), capsys)
    assert [name for name in names if f"--{name} " not in shown.replace(",", " ").replace("\n", " ")] == []


@pytest.mark.parametrize("task", ["text-to-video", "image-to-video"])
def test_help_names_the_task(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"CogVideoX {task} model" in help_of(lambda: train("--help", task=task), capsys)


OURS = {"args", "checks", "common", "data", "flags", "video"}


def test_only_the_standard_library_is_imported() -> None:
    code = (
        "import sys; from args import parse_args\n"
        "try: parse_args(['--help'], task='text-to-video', method='lora')\n"
        "except SystemExit: pass\n"
        f"ours = {OURS!r}\n"
        "tops = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(tops - sys.stdlib_module_names - ours - {'__main__'}), file=sys.stderr)"
    )
    # -I -S: no site-packages, whose .pth files import third-party modules of their own.
    folder = str(TRAINING)
    code = f"import sys; sys.path.insert(0, {folder!r})\n" + code
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
