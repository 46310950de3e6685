"""The command line has its documented names, defaults and aliases, and reports every mistake in one clear line."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from args import parse_args, parse_prepare_args
from checks.files import check_files
from cli.foreign import ADVICE, OURS
from cli.schema import flag_values
from cli.types import TABLE_SUFFIXES
from common.errors import UserError
from flags.data import SourceFlags
from flags.settings import TrainingSettings
from repository import TRAINING


BUCKETS = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)

UNSET_DATA = """
    dataset_file dataset_name dataset_config_name dataset_mix max_samples image_column id_token random_flip fps
    keep scores shuffle_tags control_column compute_control mask_column
    revision variant cache_dir
"""
OFF_IN_TRAINING = """
    load_tensors ignore_prepared_mismatch validate_first use_dynamic_cfg enable_model_cpu_offload
    gradient_checkpointing scale_lr enable_slicing enable_tiling ignore_learned_positional_embeddings dry_run
    stratified_timesteps use_ema use_8bit use_4bit use_fp8 use_torchao prodigy_decouple
    prodigy_use_bias_correction prodigy_safeguard_warmup use_cpu_offload_optimizer offload_gradients
    step_in_backward offload_checkpoints text_encoder_8bit auto_fit compile profile push_to_hub allow_tf32
"""
UNSET_IN_TRAINING = """
    validation_prompt validation_dataset_file validation_images validation_controls validation_epochs validation_steps
    seed mixed_precision max_train_steps checkpoints_total_limit checkpoint_minutes resume_from_checkpoint snr_gamma
    regularization_data_root
    max_tokens_per_batch beta3 memory_budget_gb attention_backend validation_attention_backend hub_token hub_model_id
"""
OFF_IN_PREPARATION = """
    save_image_latents save_control_latents dry_run save_latents_and_embeddings use_slicing text_encoder_8bit
"""

DATA_DEFAULTS = {
    **dict.fromkeys(UNSET_DATA.split(), None),
    **dict.fromkeys(
        ("dataset_streaming", "allow_outside_paths", "pin_memory", "hold_last_frame", "caption_per_line", "use_masks"),
        False,
    ),
    **dict.fromkeys(("height_buckets", "width_buckets"), BUCKETS),
    "frame_buckets": (49,),
    **yaml.safe_load("""{
        dataset_split: train, on_bad_clip: error, video_column: video, dataloader_num_workers: 0, height: 480,
        width: 720, video_reshape_mode: center, max_num_frames: 49, skip_frames_start: 0, skip_frames_end: 0,
        long_clips: spread, cache_limit_gb: 100.0
    }"""),
}

TRAINING_DEFAULTS = DATA_DEFAULTS | {
    **dict.fromkeys(OFF_IN_TRAINING.split(), False),
    **dict.fromkeys(UNSET_IN_TRAINING.split(), None),
    **yaml.safe_load("""{
        caption_column: text, validation_prompt_separator: ":::", num_validation_videos: 1, num_inference_steps: 50,
        validation_fraction: 0.05, sampling_scheduler: model, sampling_cache: none,
        guidance_scale: 6.0, rank: 64, lora_alpha: 64, train_batch_size: 4, num_train_epochs: 1,
        checkpointing_steps: 500, max_bad_steps: 10, gradient_accumulation_steps: 1, learning_rate: 0.0001,
        lr_scheduler: constant, lr_warmup_steps: 500, lr_num_cycles: 1, lr_power: 1.0, noised_image_dropout: 0.05,
        condition_frames: first,
        caption_dropout: 0.0, timestep_sampling: uniform, logit_mean: 0.0, logit_std: 1.0, ema_decay: 0.9999,
        mask_background_weight: 0.0,
        optimizer: adam, beta1: 0.9, beta2: 0.95, weight_decay: 0.0001, epsilon: 0.00000001, max_grad_norm: 1.0,
        checkpoint_scope: block, checkpoint_every: 1, context_parallel_size: 1, logging_dir: logs, logging_steps: 10,
        nccl_timeout: 600, report_to: tensorboard, regularization_weight: 1.0
    }"""),
}

METHOD_DEFAULTS = {
    "lora": {
        **dict.fromkeys(("use_rslora", "use_dora", "stream_blocks"), False),
        "lora_target_modules": ("to_q", "to_k", "to_v", "to_out.0"),
        **{"lora_dropout": 0.0, "lora_weights": None, "quantize_base": "none", "adapter": "lora", "lokr_factor": 8},
    },
    "sft": {"save_pipeline": False, "save_validation_weights": False, "weights_dtype": "fp32"},
}

PREPARE_DEFAULTS = DATA_DEFAULTS | {
    **dict.fromkeys(OFF_IN_PREPARATION.split(), False),
    **yaml.safe_load("""{
        model_id: THUDM/CogVideoX-2b, caption_column: caption, num_image_latents: 1, layout: files,
        shard_size_mb: 1024, max_sequence_length: 226, target_fps: 8, batch_size: 1, num_decode_threads: 0,
        dtype: fp32, seed: 42, num_artifact_workers: 4, use_tiling: null, condition_frames: first
    }"""),
}

ALIASES = [
    ("--adam_beta1 0.25", "--beta1 0.25"),
    ("--adam_beta2 0.25", "--beta2 0.25"),
    ("--adam_weight_decay 0.25", "--weight_decay 0.25"),
    ("--adam_epsilon 0.25", "--epsilon 0.25"),
    ("--optimizer came --prodigy_beta3 0.25", "--optimizer came --beta3 0.25"),
    ("--instance_data_root model", "--data_root model"),
    ("--use_8bit_adam", "--use_8bit"),
]
ROUNDED = "--weights_dtype bf16 --use_torchao --use_8bit"
AT_LEAST_ONE = """
    rank max_samples train_batch_size max_train_steps num_train_epochs checkpointing_steps checkpoints_total_limit
    max_bad_steps nccl_timeout logging_steps num_inference_steps
"""
AT_LEAST_ZERO = ("dataloader_num_workers", "lr_warmup_steps", "skip_frames_start", "learning_rate", "max_grad_norm")

OPTIMIZERS = "adam, adamw, prodigy, came, schedulefree, muon"
BLOCKS = "--stream_blocks --gradient_checkpointing"
GRADIENTS = "--use_cpu_offload_optimizer --offload_gradients"
BAD_TRAINING_FLAGS = [
    *((f"--{name} 0", f"--{name}", "1 or more") for name in AT_LEAST_ONE.split()),
    *((f"--{name} -1", f"--{name}", "0 or more") for name in AT_LEAST_ZERO),
    ("--fps inf", "--fps", "above 0"),
    ("--logit_mean 1", "--logit_mean", "add --timestep_sampling logit_normal"),
    ("--ema_decay 0.9", "--ema_decay", "add --use_ema"),
    ("--regularization_weight 2", "--regularization_weight", "no effect without --regularization_data_root"),
    ("--regularization_data_root nowhere", "--regularization_data_root", "no folder 'nowhere'"),
    ("--checkpoint_every 2", "--checkpoint_every", "add --gradient_checkpointing"),
    ("--stream_blocks", "--stream_blocks", "pass --gradient_checkpointing"),
    ("--stream_blocks --quantize_base nf4", "--quantize_base nf4", "omit --stream_blocks"),
    (f"{BLOCKS} --enable_model_cpu_offload", "--enable_model_cpu_offload", "already keeps the blocks on the CPU"),
    ("--dataset_file a.csv --dataset_name org/name", "--dataset_name", "--dataset_file already names the data"),
    ("--dataset_streaming", "--dataset_streaming", "no effect without --dataset_name"),
    ("--dataset_config_name x", "--dataset_config_name", "no effect without --dataset_name"),
    ("--dataset_mix mix.json", "--data_root", "each entry of --dataset_mix names its own"),
    ("--fps 8 --long_clips spread", "--long_clips spread", "omit --fps"),
    ("--long_clips last", "--long_clips", "spread, first, split"),
    ("--on_bad_clip ignore", "--on_bad_clip", "error, skip"),
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
    ("--lora_alpha 0", "--lora_alpha", "above 0"),
    ("--lora_dropout 1", "--lora_dropout", "not including, 1"),
    ("--lora_target_modules", "--lora_target_modules", "at least one"),
    ("--lora_target_modules to_q all-linear", "--lora_target_modules", "all-linear already includes the others"),
    ("--adapter lokr --use_rslora", "--use_rslora", "not available for --adapter lokr"),
    ("--adapter loha --use_dora", "--use_dora", "not available for --adapter loha"),
    ("--adapter loha --lora_dropout 0.1", "--lora_dropout", "not available for --adapter loha"),
    ("--adapter loha --lokr_factor 4", "--lokr_factor", "add --adapter lokr"),
    ("--adapter loha --quantize_base int8", "--quantize_base int8", "not available for --adapter loha"),
    ("--lora_weights nowhere", "--lora_weights", "no file 'nowhere'"),
    ("--lora_weights clips", "--lora_weights", "no file 'clips/pytorch_lora_weights.safetensors'"),
    ("--lora_weights first.png", "--lora_weights", "'first.png' is not a .safetensors file"),
    ("--save_pipeline", "--save_pipeline", "unknown flag"),
    (f"--seed {2**32}", "--seed", f"4294967296 is too large; pass a whole number up to {2**32 - 1}"),
    ("--num_inference_steps 2000", "--num_inference_steps", "2000 is too large; pass a whole number up to 1000"),
    ("--validation_prompt \udcb0", "--validation_prompt", "the text is not UTF-8"),
    ("--train_batch_size 1.5", "--train_batch_size", "not a whole number"),
    ("--gradient_accumulation_steps -1", "--gradient_accumulation_steps", "1 or more"),
    ("--checkpoint_minutes 0", "--checkpoint_minutes", "above 0"),
    ("--random_flip 1.5", "--random_flip", "from 0 to 1"),
    ("--noised_image_dropout -0.1", "--noised_image_dropout", "from 0 to 1"),
    ("--fps 0", "--fps", "above 0"),
    ("--learning_rate nan", "--learning_rate", "out of range"),
    ("--learning_rate fast", "--learning_rate", "'fast' is not a number"),
    ("--beta1 1", "--beta1", "not including, 1"),
    ("--optimizer sgd", "--optimizer", f"invalid choice 'sgd'; choose from {OPTIMIZERS}"),
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
    ("--optimizer schedulefree --use_ema", "--use_ema", "use --optimizer adamw"),
    ("--optimizer schedulefree --beta1 0", "--beta1", "pass more than 0"),
    ("--offload_gradients", "--offload_gradients", "add --use_cpu_offload_optimizer"),
    (f"{GRADIENTS} --gradient_accumulation_steps 2", "--offload_gradients", "--gradient_accumulation_steps 1"),
    ("--beta3 0.99", "--beta3", "prodigy or came"),
    ("--prodigy_decouple", "--prodigy_decouple", "--optimizer prodigy"),
    ("--prodigy_use_bias_correction", "--prodigy_use_bias_correction", "--optimizer prodigy"),
    ("--prodigy_safeguard_warmup --optimizer came", "--prodigy_safeguard_warmup", "--optimizer prodigy"),
    ("--mask_background_weight 0.1", "--mask_background_weight", "add --use_masks"),
    ("--hub_token secret", "--hub_token", "add --push_to_hub"),
    *((f"--tracker_name {name}", "--tracker_name", "pass a name without / and") for name in ("../x", "a\\b", "..")),
    ("--hub_model_id me/mine", "--hub_model_id", "add --push_to_hub"),
    ("--validation_prompt cat:::", "--validation_prompt", "prompt 2 of 2 is empty"),
    ("--validation_prompt cat --validation_prompt_separator=", "--validation_prompt_separator", "empty"),
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint", "no folder 'nowhere'"),
    ("--dataset_file nowhere.csv", "--dataset_file", "no file 'nowhere.csv'"),
    ("--validation_dataset_file nowhere.csv", "--validation_dataset_file", "no file 'nowhere.csv'"),
    ("--validation_dataset_file clips", "--validation_dataset_file", "no file 'clips'"),
    ("--validation_dataset_file file", "--validation_dataset_file", ".csv, .tsv, .jsonl, .json, .parquet"),
    ("--data_root nowhere", "--data_root", "no folder 'nowhere'"),
    ("--data_root=", "--data_root", "empty"),
    ("--pretrained_model_name_or_path my-model", "--pretrained_model_name_or_path", "THUDM/CogVideoX-5b"),
    ("--pretrained_model_name_or_path ./models/mine", "--pretrained_model_name_or_path", "no folder"),
    ("--pretrained_model_name_or_path /models", "--pretrained_model_name_or_path", "no folder '/models'"),
    ("--pretrained_model_name_or_path a/b/c", "--pretrained_model_name_or_path", "no folder 'a/b/c'"),
    ("--pretrained_model_name_or_path half", "--pretrained_model_name_or_path", "no model_index.json in 'half'"),
    ("--pretrained_model_name_or_path half/x.bin", "--pretrained_model_name_or_path", "no folder 'half/x.bin'"),
    ("--dataset_file data.csv", "--dataset_file", f"did you mean '{os.path.join('clips', 'data.csv')}'?"),
    ("--output_dir file", "--output_dir", "is not a folder"),
    ("--output_dir file/below/deeper", "--output_dir", "is not a folder"),
    ("--output_dir dangling/below", "--output_dir", "is not a folder"),
    ("--learning-rate 1e-3", "--learning-rate", "did you mean --learning_rate?"),
    ("--gradient_checkpoint", "--gradient_checkpoint", "did you mean --gradient_checkpointing?"),
    ("--validation_prompt a cat", "'cat'", "quotes"),
]

BAD_FINE_TUNING_FLAGS = [
    *((f"--{name}", f"--{name}", "unknown flag") for name in METHOD_DEFAULTS["lora"]),
    ("--weights_dtype bf16 --optimizer muon --use_torchao", "--weights_dtype bf16", "muon does not round"),
    ("--weights_dtype bf16 --optimizer adamw", "--weights_dtype bf16", "add --use_torchao"),
    ("--weights_dtype bf16 --use_torchao", "--weights_dtype bf16", "use --optimizer adamw or add --use_8bit"),
    (f"{ROUNDED} --mixed_precision no", "--weights_dtype bf16", "use --mixed_precision bf16"),
    (f"{ROUNDED} --use_ema", "--use_ema", "bf16 would round away"),
]
ENDS, CONTEXT = (f"--validation_prompt a --condition_frames {frames}" for frames in ("first,last", "first:2"))
BAD_IMAGE_FLAGS = [
    ("--validation_prompt cat", "--validation_images", "0 for 1"),
    ("--validation_prompt a:::b --validation_images first.png", "--validation_images", "1 for 2"),
    ("--validation_images first.png", "--validation_images", "1 for 0"),
    ("--validation_steps 10", "--validation_steps", "add --validation_prompt"),
    ("--validation_epochs 1", "--validation_epochs", "add --validation_prompt"),
    ("--validate_first", "--validate_first", "add --validation_prompt or --validation_dataset_file"),
    ("--validation_prompt a --validation_images no-such.png", "--validation_images", "no file 'no-such.png'"),
    ("--condition_frames last", "--condition_frames", "first, first,last and first:K"),
    (f"{ENDS} --validation_images first.png", "--validation_images", "'first.png' is not two images"),
    (f"{ENDS} --validation_images first.png,no.png", "--validation_images", "no file 'no.png'"),
    (f"{CONTEXT} --validation_images no.mp4", "--validation_images", "pass the path of a video"),
]
BAD_CONTROL_FLAGS = [
    ("--condition_frames first", "--condition_frames", "unknown flag"),
    ("--validation_prompt cat", "--validation_controls", "0 for 1"),
    ("--validation_prompt cat --validation_controls no-such.mp4", "--validation_controls", "no file 'no-such.mp4'"),
    ("--validation_steps 10", "--validation_steps", "add --validation_prompt"),
    ("--compute_control depth", "--compute_control", "canny, grey, blur, tile, inpaint"),
    ("--compute_control canny --control_column edges", "--control_column", "omit one of them"),
    ("--compute_control canny --mask_column cut", "--mask_column", "add --use_masks or --compute_control inpaint"),
    ("--image_column first", "--image_column", "unknown flag"),
    ("--noised_image_dropout 0", "--noised_image_dropout", "unknown flag"),
]
TENSORS = "--save_latents_and_embeddings --save_image_latents"
BAD_PREPARE_FLAGS = [
    ("--layout shards", "--layout shards", "no effect without latents"),
    (f"{TENSORS} --layout files --num_image_latents 2", "--num_image_latents", "--layout files stores only one"),
    ("--compute_control canny", "--compute_control", "add --save_control_latents"),
    ("--use_masks", "--use_masks", "no effect without latents"),
    (f"{TENSORS} --use_masks --layout files", "--use_masks", "use shards"),
    (f"{TENSORS} --mask_column cut", "--mask_column", "add --use_masks"),
    ("--condition_frames first:2", "--condition_frames", "add --save_image_latents"),
    (f"{TENSORS} --condition_frames first:2 --layout files", "--condition_frames first:2", "use shards"),
    ("--save_control_latents", "--save_control_latents", "no effect without latents"),
    (f"{TENSORS} --save_control_latents --layout files", "--save_control_latents", "use shards"),
    ("--model_id nowhere", "--model_id", "no folder 'nowhere'"),
    ("--pretrained_model_name_or_path ./nowhere", "--model_id", "no folder './nowhere'"),
    ("--frame_buckets 81", "--frame_buckets", "--max_num_frames 81"),
    ("--num_decode_threads -1", "--num_decode_threads", "0 or more"),
    ("--dtype fp8", "--dtype", "fp32, fp16, bf16"),
    ("--dataset_file nowhere.csv", "--dataset_file", "no file 'nowhere.csv'"),
    ("--rank 4", "--rank", "unknown flag"),
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with what the flags name; the model in half/ is incomplete."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    for folder in ("clips", "model", "half"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    for file in ("first.png", "file", "half/x.bin", "clips/data.csv"):
        (tmp_path / file).touch()
    (tmp_path / "dangling").symlink_to("no-such-target")
    return tmp_path


def settings(*flags: str, task: str = "text-to-video", method: str = "lora") -> TrainingSettings:
    required = ["--pretrained_model_name_or_path", "THUDM/CogVideoX-5b", "--data_root", "clips"]
    return parse_args([*required, *flags], task=task, method=method)


def train(*flags: str, **script: str) -> SimpleNamespace:
    return SimpleNamespace(**flag_values(settings(*flags, **script)))


def prepare(*flags: str) -> SimpleNamespace:
    return SimpleNamespace(**flag_values(parse_prepare_args(["--data_root", "clips", "--output_dir", "out", *flags])))


def error_of(call: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """The stderr of a call that must leave with code 2, one line and nothing on stdout."""
    with pytest.raises(SystemExit) as leaving:
        call()
    out, err = capsys.readouterr()
    assert (leaving.value.code, out) == (2, "")
    assert re.fullmatch("error: .*\n", err)
    return err


def help_of(call: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match=r"^0$"):
        call()
    return capsys.readouterr().out


@pytest.mark.parametrize("task", ["text-to-video", "image-to-video"])
@pytest.mark.parametrize("method", ["lora", "sft"])
def test_training_defaults_are_the_documented_ones(task, method):
    expected = TRAINING_DEFAULTS | METHOD_DEFAULTS["lora"] | METHOD_DEFAULTS["sft"]
    expected |= {"pretrained_model_name_or_path": "THUDM/CogVideoX-5b", "data_root": "clips"}
    expected |= dict.fromkeys(("output_dir", "tracker_name"), f"cogvideox-{method}")
    assert vars(train(task=task, method=method)) == expected


def test_preparation_defaults_are_the_documented_ones():
    assert vars(prepare()) == PREPARE_DEFAULTS | {"data_root": "clips", "output_dir": "out"}


def test_an_unknown_task_is_a_programming_error():
    with pytest.raises(ValueError, match="task"):
        train(task="text-to-image")


def test_a_launcher_of_the_original_scripts_parses():
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


@pytest.mark.parametrize(
    ("script", "foreign", "hint"),
    [
        (train, "model_path", "did you mean --pretrained_model_name_or_path?"),
        (train, "model_id", "did you mean --pretrained_model_name_or_path?"),
        (train, "model_name", "omit it: the config of the model"),
        (train, "model_type", "omit it: each task has its script, cogvideox_text_to_video_*"),
        (train, "training_type", "omit it: each method has its script, cogvideox_*_lora.py"),
        (train, "train_resolution", "did you mean --frame_buckets, --max_num_frames, --height, --width?"),
        (train, "video_resolution_buckets", "did you mean --frame_buckets, --height_buckets, --width_buckets?"),
        (train, "train_epochs", "did you mean --num_train_epochs?"),
        (train, "train_steps", "did you mean --max_train_steps?"),
        (train, "batch_size", "did you mean --train_batch_size?"),
        (train, "num_workers", "did you mean --dataloader_num_workers?"),
        (train, "checkpointing_limit", "did you mean --checkpoints_total_limit?"),
        (train, "do_validation", "did you mean --validation_prompt?"),
        (train, "validation_prompts", "did you mean --validation_prompt?"),
        (train, "gen_fps", "did you mean --fps?"),
        (train, "target_fps", "did you mean --fps?"),
        (train, "lr", "did you mean --learning_rate?"),
        (train, "target_modules", "did you mean --lora_target_modules?"),
        (train, "use_8bit_bnb", "did you mean --use_8bit?"),
        (train, "precomputation_items", "did you mean --load_tensors?"),
        (train, "dataset_config", "did you mean --dataset_mix?"),
        (train, "dp_degree", "omit it: accelerate launch --config_file"),
        (train, "lora_rank", "did you mean --rank?"),
        (train, "use_slicing", "did you mean --enable_slicing?"),
        (train, "dtype", "did you mean --mixed_precision?"),
        (prepare, "save_tensors", "did you mean --save_latents_and_embeddings?"),
        (prepare, "gen_fps", "did you mean --fps?"),
        (prepare, "mixed_precision", "did you mean --dtype?"),
        (prepare, "train_batch_size", "did you mean --batch_size?"),
        (prepare, "enable_tiling", "did you mean --use_tiling?"),
    ],
)
def test_flags_of_the_original_and_of_other_toolkits_point_to_ours(script, foreign, hint, capsys):
    assert f"error: --{foreign}: unknown flag; {hint}" in error_of(lambda: script(f"--{foreign}", "1"), capsys)


def test_the_table_of_foreign_flags_names_no_flag_of_all_scripts_and_only_ours():
    ours = set(vars(train())) | set(vars(train(method="sft"))) | set(vars(prepare())) | {"model"}
    assert {word for words in OURS.values() for word in words.split()} <= ours
    assert not (OURS.keys() | ADVICE.keys()) & set(vars(train())) & set(vars(prepare()))


@pytest.mark.parametrize(("alias", "flags"), ALIASES)
def test_an_alias_sets_the_same_flag(alias, flags):
    assert train(*alias.split()) == train(*flags.split()) != train()


def test_pretrained_model_name_or_path_is_model_id_in_preparation():
    assert prepare("--pretrained_model_name_or_path", "model").model_id == "model"


@pytest.mark.parametrize(
    ("script", "flags", "named", "advice"),
    [
        *((train, *bad) for bad in BAD_TRAINING_FLAGS),
        *((partial(train, method="sft"), *bad) for bad in BAD_FINE_TUNING_FLAGS),
        *((partial(train, task="image-to-video"), *bad) for bad in BAD_IMAGE_FLAGS),
        *((partial(train, task="control-to-video"), *bad) for bad in BAD_CONTROL_FLAGS),
        *((prepare, *bad) for bad in BAD_PREPARE_FLAGS),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(script, flags, named, advice, capsys):
    message = error_of(lambda: script(*flags.split()), capsys)
    assert message.startswith(f"error: {named}")
    assert advice in message


def test_missing_required_flags_are_named_together(capsys):
    message = error_of(lambda: parse_args([], task="text-to-video", method="lora"), capsys)
    assert "--pretrained_model_name_or_path, --data_root or --dataset_file or --dataset_name" in message
    assert "--output_dir: required" in error_of(lambda: parse_prepare_args(["--data_root", "clips"]), capsys)


def test_the_default_of_long_clips_depends_on_fps():
    assert train().long_clips == "spread"
    assert train("--fps", "8").long_clips == "first"
    assert train("--fps", "8", "--long_clips", "split").long_clips == "split"


def test_latents_are_stored_in_shards_by_default_which_have_room_for_several_first_frames():
    made = (prepare(*flags.split()) for flags in ("", TENSORS, f"{TENSORS} --layout files"))
    assert [(args.layout, args.num_image_latents) for args in made] == [("files", 1), ("shards", 4), ("files", 1)]


def test_flags_that_differ_from_the_prepared_data_are_named(workplace, capsys):
    made_with = {"id_token": "BW", "fps": None, "height_buckets": [480]}
    (workplace / "clips" / "prepared.json").write_text(json.dumps({"flags": made_with}))
    train("--load_tensors", "--id_token", "BW", "--height_buckets", "480", "--frame_buckets", "45")
    message = error_of(lambda: train("--load_tensors", "--id_token", "XY", "--fps", "8"), capsys)
    assert "--id_token was 'BW', is now 'XY'" in message
    assert "--fps was None, is now 8.0" in message
    assert "height_buckets" not in message


@pytest.mark.parametrize("count", ["1", "4", "5", "8", "48", "49"])
def test_valid_frame_counts_are_accepted(count):
    assert train("--frame_buckets", count, "--max_num_frames", count).frame_buckets == (int(count),)


def test_frame_buckets_above_the_maximum_are_dropped():
    assert train("--frame_buckets", "17", "49", "81").frame_buckets == (17, 49)


@pytest.mark.parametrize("parse", [train, prepare])
@pytest.mark.parametrize(
    ("flags", "heights", "widths"),
    [
        ("--height 256 --width 384", (256,), (384,)),
        ("--height 480 --width 720", (480,), (720,)),
        ("--height 256", BUCKETS, BUCKETS),
        ("--height 256 --width 384 --height_buckets 480 512", (480, 512), BUCKETS),
    ],
)
def test_height_and_width_without_bucket_lists_become_the_only_bucket(parse, flags, heights, widths):
    args = parse(*flags.split())
    assert (args.height_buckets, args.width_buckets) == (heights, widths)


USELESS = "has no effect on text-to-video training"


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ("--learning_rate 1e-5", "--learning_rate 1e-05 is low for a LoRA, .*1e-4 to 1e-3"),
        ("--optimizer prodigy", "--learning_rate 0.0001 is low for prodigy, .*"),
        ("--lr_scheduler cosine --optimizer schedulefree", "--lr_scheduler cosine is not needed with schedulefree.*"),
        ("--use_torchao", "--use_torchao has no effect .*"),
        ("--noised_image_dropout 0.05", f"--noised_image_dropout {USELESS}"),
        ("--ignore_learned_positional_embeddings", f"--ignore_learned_positional_embeddings {USELESS}"),
        ("--condition_frames first:2", f"--condition_frames {USELESS}"),
        ("--validation_images no-such.png", f"--validation_images {USELESS}"),
        ("--lr_scheduler cosine --max_train_steps 5", "--lr_warmup_steps 500 is all of the run's 5 steps: .*"),
        ("--load_tensors --text_encoder_8bit", "--text_encoder_8bit has no effect: .*"),
        ("--num_train_epochs 3 --max_train_steps 3", "--num_train_epochs has no effect: --max_train_steps sets .*"),
        ("--frame_buckets 17 49 81", "--frame_buckets 81 not used: longer than --max_num_frames 49"),
        *(
            (f"--load_tensors {flag} 1", f"{flag} has no effect with --load_tensors: .*")
            for flag in ("--dataset_file", "--dataset_name", "--max_samples")
        ),
    ],
)
def test_what_is_odd_but_allowed_is_one_warning(flags, warning, workplace, monkeypatch, capsys):
    (workplace / "1").touch()
    train(*flags.split())
    assert re.fullmatch(f"warning: {warning}\n", capsys.readouterr().err)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    train(*flags.split())
    assert capsys.readouterr().err == ""  # only the first process of a launch warns


@pytest.mark.parametrize("flag", ["--rank", "--lora_alpha"])
def test_a_lora_flag_is_accepted_with_a_warning_in_full_fine_tuning(flag, capsys):
    train(flag, "64", method="sft")
    assert capsys.readouterr().err == f"warning: {flag} has no effect on full fine-tuning\n"


def test_a_low_learning_rate_is_fine_for_full_fine_tuning(capsys):
    train("--learning_rate", "1e-5", method="sft")
    assert capsys.readouterr().err == ""


def test_the_lora_to_start_from_is_a_file_or_in_a_folder(workplace):
    (workplace / "clips" / "pytorch_lora_weights.safetensors").touch()
    (workplace / "mine.safetensors").touch()
    assert train("--lora_weights", "mine.safetensors").lora_weights == "mine.safetensors"
    assert train("--lora_weights", "clips").lora_weights == "clips/pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    "flags",
    [
        "",
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
        "--learning_rate 0",
        "--learning_rate 1e-5 --scale_lr",
        "--num_train_epochs 3",
    ],
)
def test_sensible_combinations_pass_silently(flags, capsys):
    train(*flags.split())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", ["--use_cpu_offload_optimizer", "--step_in_backward"])
def test_optimizers_that_take_gradients_early_need_one_process(flag, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        train(flag)
    assert f"{flag}: takes gradients before processes average them; launch one process" in capsys.readouterr().err


def test_step_in_backward_turns_clipping_off():
    assert train("--step_in_backward").max_grad_norm == 0
    assert train("--step_in_backward", "--max_grad_norm", "0").max_grad_norm == 0


def test_validation_starts_before_training_unless_switched_off(workplace):
    (workplace / "held-out.csv").touch()
    assert train().validate_first is False
    for validated in (["--validation_prompt", "a cat"], ["--validation_dataset_file", "held-out.csv"]):
        assert train(*validated).validate_first is True
        assert train(*validated, "--validate_first").validate_first is True
        assert train(*validated, "--no-validate_first").validate_first is False
    assert train("--no-validate_first").validate_first is False


def test_a_validation_set_can_be_scheduled_without_prompts(workplace):
    (workplace / "held-out.csv").touch()
    assert train("--validation_dataset_file", "held-out.csv", "--validation_steps", "10").validation_steps == 10


def test_validation_prompts_are_split_at_the_separator_and_stripped():
    validation = settings("--validation_prompt", " a cat ::: a dog", "--validation_steps", "5").validation
    assert validation.prompts == ("a cat", "a dog")
    assert validation.validation_prompt == " a cat ::: a dog"
    validation = settings("--validation_prompt", "a:::b|c", "--validation_prompt_separator", "|").validation
    assert validation.prompts == ("a:::b", "c")


def test_validation_images_are_split_and_may_be_urls():
    images = ("--validation_images", "first.png ::: https://example.org/dog.png")
    args = settings("--validation_prompt", "a cat:::a dog", *images, task="image-to-video")
    assert args.validation.images == ("first.png", "https://example.org/dog.png")


def test_validation_images_are_what_the_condition_frames_need():
    prompts = ("--validation_prompt", "a cat:::a dog", "--validation_images")

    def found(condition: str, images: str) -> tuple[str, ...]:
        flags = ("--condition_frames", condition, *prompts, images)
        return settings(*flags, task="image-to-video").validation.images

    pairs = found("first,last", "first.png , http://x/b.png ::: http://x/a.png,first.png")
    assert pairs == ("first.png,http://x/b.png", "http://x/a.png,first.png")
    assert found("first:3", "file:::first.png") == ("file", "first.png")


def test_the_flags_of_controls_are_only_in_their_scripts(workplace, capsys):
    controls = ("--validation_prompt", "a:::b", "--validation_controls", "file ::: first.png")
    assert settings(*controls, task="control-to-video").validation.controls == ("file", "first.png")
    for flag in ("--control_column=a", "--compute_control=canny", "--validation_controls=file"):
        for task in ("text-to-video", "image-to-video"):
            assert "unknown flag" in error_of(lambda flag=flag, task=task: train(flag, task=task), capsys)
    groups = help_of(lambda: train("--help", task="control-to-video"), capsys).split("shows one group:")[1]
    assert "data" in groups and "image-to-video" not in groups


@pytest.mark.parametrize("model", ["THUDM/CogVideoX-5b", "model", "./model", "some.org/name-1.5"])
def test_hub_ids_and_complete_local_folders_are_models(model):
    assert train("--pretrained_model_name_or_path", model).pretrained_model_name_or_path == model


def test_a_tilde_means_the_home_folder(workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace))
    assert train("--pretrained_model_name_or_path", "~/model").pretrained_model_name_or_path == f"{workplace}/model"


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_a_validation_set_is_any_table_that_training_reads(suffix, workplace):
    (workplace / f"held-out{suffix}").touch()
    assert train("--validation_dataset_file", f"held-out{suffix}").validation_dataset_file == f"held-out{suffix}"


@pytest.mark.parametrize("given", ["latest", "checkpoint-5", os.path.join("out", "checkpoint-5")])
def test_a_checkpoint_is_found_by_its_path_or_its_name_in_the_output_folder(given, workplace):
    (workplace / "out" / "checkpoint-5").mkdir(parents=True)
    (workplace / "out" / "checkpoint-5" / "manifest.json").write_text("{}")
    found = train("--output_dir", "out", "--resume_from_checkpoint", given).resume_from_checkpoint
    assert found == ("latest" if given == "latest" else os.path.join("out", "checkpoint-5"))


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder that even root cannot write to")
def test_an_output_folder_that_cannot_be_written_is_refused(capsys):
    assert "--output_dir: cannot write to '/proc'" in error_of(lambda: train("--output_dir", "/proc/out"), capsys)


def test_the_checks_leave_nothing_behind(workplace):
    before = sorted(workplace.rglob("*"))
    train("--output_dir", "new/deeper/out")
    assert sorted(workplace.rglob("*")) == before


def test_check_files_reports_to_python_callers_with_a_user_error():
    with pytest.raises(UserError, match="--model_id: no folder 'nowhere'"):
        check_files("nowhere", SourceFlags(data_root="clips"), "out", model_flag="--model_id")


def test_help_mentions_every_flag(capsys):
    aliases = {word.removeprefix("--") for alias, _ in ALIASES for word in alias.split() if word.startswith("--")}
    trained = (set(vars(train())) - METHOD_DEFAULTS["sft"].keys()) | aliases
    of_controls = {"control_column", "compute_control", "validation_controls"}
    control = partial(train, task="control-to-video")
    for names, parse in (
        (trained - of_controls, train),
        (of_controls, control),
        (set(vars(prepare())), prepare),
    ):
        shown = help_of(lambda parse=parse: parse("--help"), capsys)
        assert [name for name in names if f"--{name} " not in shown.replace(",", " ").replace("\n", " ")] == []


@pytest.mark.parametrize("task", ["text-to-video", "image-to-video", "control-to-video"])
def test_help_names_the_task(task, capsys):
    assert f"CogVideoX {task} model" in help_of(lambda: train("--help", task=task), capsys)


def test_only_the_standard_library_is_imported():
    code = (
        "import sys; from args import parse_args\n"
        "try: parse_args(['--help'], task='text-to-video', method='lora')\n"
        "except SystemExit: pass\n"
        "ours = {'args', 'checks', 'cli', 'common', 'data', 'flags', 'prepared', 'video'}\n"
        "tops = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(tops - sys.stdlib_module_names - ours - {'__main__'}), file=sys.stderr)"
    )
    # -I -S: no site-packages, whose .pth files import third-party modules of their own.
    code = f"import sys; sys.path.insert(0, {str(TRAINING)!r})\n{code}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_no_script_imports_a_heavy_library_for_its_help():
    scripts = sorted(path.stem for path in TRAINING.glob("*.py") if '"__main__"' in path.read_text(encoding="utf-8"))
    code = (
        "import importlib, sys\n"
        f"for name in {scripts}:\n"
        "    try: importlib.import_module(name).main(['--help'])\n"
        "    except SystemExit: pass\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TRAINING, capture_output=True, text=True, check=True)
    ours = {path.stem for path in TRAINING.iterdir()}
    imported = {name for name in done.stderr.split() if not name.startswith("_")} - ours
    assert imported <= {"PIL", "av", "cython_runtime", "numpy", "tqdm"}  # for clips; together 0.1 s
