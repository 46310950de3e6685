"""The training script end to end on tiny models: training, outputs, resuming, and refusals."""

import math
import os
import re
import shlex
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file

import cogvideox_text_to_video_lora
import cogvideox_text_to_video_sft
import generate
import tiny_runs
from args import parse_generate_args
from checkpoints.schedule import ScheduleStart
from checkpoints.state import read_state
from common.folder_lock import locked_folder
from common.run_folder import LORA_FILE, list_checkpoints, list_validated
from diffusion.objective import Objective
from encoded_clips import all_frames
from optimizers.build import build_optimizer
from original_folders import write_original_folder
from results.run_record import read_run
from run import finetune
from run.loop import train as train_loop
from run.setup import Run
from tiny_runs import SIZE, assert_same_weights, curve, set_up_run, weights_of
from video.io import write_video


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def prepared(prepared_demo) -> Path:
    return prepared_demo(*SIZE)


@pytest.fixture
def train(tiny_models, prepared):
    """Run the script in this process, without validation, on prepared data unless `raw`; returns the weights."""

    def run(output: Path, *flags: str, model=None, data=None, raw: bool = False) -> dict[str, torch.Tensor]:
        common = ("--rank", "8", "--lora_alpha", "8", "--optimizer", "adamw", "--learning_rate", "1e-3")
        common += ("--lr_warmup_steps", "0", *([] if raw else ["--load_tensors"]))
        folders = (model or tiny_models("5b"), data or prepared, output)
        return weights_of(tiny_runs.train(cogvideox_text_to_video_lora, *folders, *common, *flags))

    return run


@pytest.fixture
def error_of(train, capsys):
    """Run the script as `train` does until it refuses; returns the last line on stderr."""

    def run(*arguments, **options) -> str:
        with pytest.raises(SystemExit, match="2"):
            train(*arguments, **options)
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_lora_loads_into_the_pipeline_at_its_trained_strength(tiny_models, train, tmp_path, precision):
    flags = ("--max_train_steps", "3", "--mixed_precision", precision, "--gradient_checkpointing")
    weights = train(tmp_path, *flags, "--lora_alpha", "4")
    pipeline = CogVideoXPipeline.from_pretrained(tiny_models("5b"))
    pipeline.load_lora_weights(tmp_path)
    (config,) = pipeline.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (8, 4)
    assert set(config.target_modules) == {"to_q", "to_k", "to_v", "to_out.0"}
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {weight.dtype for weight in weights.values()} == {expected}
    mounted = {n: p for n, p in pipeline.transformer.named_parameters() if "lora_B" in n}
    assert len(mounted) == 4 * 4
    assert all(parameter.abs().sum() > 0 for parameter in mounted.values())


@pytest.mark.parametrize(("accumulation", "fraction"), [("1", "0.2"), ("4", "0")])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(train, tmp_path, accumulation, fraction):
    flags = ("--gradient_accumulation_steps", accumulation, "--lr_scheduler", "cosine")
    held_out = ("--validation_fraction", fraction)  # which the checkpoint remembers
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    whole = train(straight, *flags, *held_out, "--max_train_steps", "6", "--checkpointing_steps", "2")
    assert sorted(path.name for path in straight.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6)]

    shutil.copytree(straight / "checkpoint-4", stopped / "checkpoint-4")
    (stopped / "checkpoint-5.partial").mkdir()  # not a checkpoint
    torch.rand(7)  # the state of the global generator must not matter
    assert_same_weights(train(stopped, *flags, "--max_train_steps", "6", "--resume_from_checkpoint", "latest"), whole)
    assert sorted(curve(stopped, "loss")) == [5, 6]
    assert curve(stopped, "lr") == {step: curve(straight, "lr")[step] for step in (5, 6)}
    if fraction != "0":
        measured = curve(straight, "validation_loss")
        assert sorted(measured) == [0, 6]
        assert curve(stopped, "validation_loss") == {6: measured[6]}


@pytest.mark.parametrize(("adapter", "zero_before"), [("lokr", "lokr_w1"), ("loha", "hada_w2_b")])
def test_a_lokr_or_loha_learns_and_resumes_bit_for_bit(train, error_of, tmp_path, adapter, zero_before):
    flags = ("--max_train_steps", "2", "--checkpointing_steps", "1", "--mixed_precision", "bf16", "--use_ema")
    flags += ("--gradient_checkpointing", "--report_to", "none")
    whole = train(tmp_path / "whole", *flags, "--adapter", adapter)
    assert len([name for name in whole if zero_before in name]) == 4 * 4
    assert all(weight.any() and weight.isfinite().all() for name, weight in whole.items() if zero_before in name)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    flags += ("--resume_from_checkpoint", "latest")
    assert f"--adapter was {adapter}, is now off" in error_of(tmp_path / "resumed", *flags)
    assert_same_weights(train(tmp_path / "resumed", *flags, "--adapter", adapter), whole)


def test_a_step_of_four_small_batches_is_a_step_of_the_big_one(train, tmp_path):
    one_step = ("--max_train_steps", "1", "--train_batch_size")  # of all the 16 samples
    big = train(tmp_path / "big", *one_step, "16")
    small = train(tmp_path / "small", *one_step, "4", "--gradient_accumulation_steps", "4")
    (big_loss,), (small_loss,) = (curve(tmp_path / name, "loss").values() for name in ("big", "small"))
    (big_norm,), (small_norm,) = (curve(tmp_path / name, "grad_norm").values() for name in ("big", "small"))
    assert small_loss == pytest.approx(big_loss, rel=1e-5)
    assert small_norm == pytest.approx(big_norm, rel=1e-5)
    # Adam's first step is the gradient's sign, whatever its size: where it is almost zero the two may differ.
    assert all((small[name] - big[name]).abs().gt(1e-5).float().mean() < 0.01 for name in big)


def test_a_run_with_ema_writes_the_average_and_resumes_from_both(train, tmp_path):
    flags = ("--max_train_steps", "4", "--checkpointing_steps", "2")
    last = train(tmp_path / "last", *flags)
    flags += ("--use_ema", "--ema_decay", "0.5")
    averaged = train(tmp_path / "averaged", *flags)
    name = next(name for name in averaged if "lora_B" in name)
    # It begins at zero and moves away: its average is smaller.
    assert 0 < averaged[name].abs().mean() < 0.95 * last[name].abs().mean()
    assert_same_weights(weights_of(tmp_path / "averaged" / "checkpoint-4"), last)

    shutil.copytree(tmp_path / "averaged" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    assert_same_weights(train(tmp_path / "stopped", *flags, "--resume_from_checkpoint", "latest"), averaged)


OPTIONS = ["--caption_dropout 1", "--timestep_sampling logit_normal --logit_mean -3", "--stratified_timesteps"]


@pytest.mark.parametrize("flags", [*OPTIONS, "--snr_gamma 5"])
def test_an_option_of_the_objective_changes_what_is_trained(train, tmp_path, flags):
    common = ("--max_train_steps", "1", "--train_batch_size", "2")
    train(tmp_path / "plain", *common)
    train(tmp_path / "changed", *common, *flags.split())
    plain, changed = (curve(tmp_path / name, "grad_norm")[1] for name in ("plain", "changed"))
    assert math.isfinite(changed)
    assert changed != pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("num_steps", "flags", "kept"),
    [
        (5, ("--checkpointing_steps", "1", "--checkpoints_total_limit", "2"), [4, 5]),
        (3, ("--checkpoint_minutes", "0.00001"), [1, 2, 3]),
    ],
)
def test_checkpoints_are_written_at_intervals_and_removed_beyond_the_limit(train, tmp_path, num_steps, flags, kept):
    train(tmp_path, "--max_train_steps", str(num_steps), *flags)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in kept]
    assert all(weights_of(tmp_path / f"checkpoint-{step}") for step in kept)


def test_the_learning_rate_schedule_counts_optimizer_steps_over_all_epochs(train, tmp_path):
    train(tmp_path, "--num_train_epochs", "2", "--gradient_accumulation_steps", "5", "--lr_scheduler", "linear")
    rates = curve(tmp_path, "lr")
    steps = 2 * math.ceil(16 / 5)
    assert sorted(rates) == list(range(1, steps + 1))
    assert rates[1] == pytest.approx(1e-3)
    assert rates[steps] == pytest.approx(1e-3 / steps)


def test_raw_clips_train_without_preparation_and_are_validated(train, demo_clips, tmp_path):
    prompt = "a red circle moves from left to right over a blue background:::a green square"
    flags = ("--max_train_steps", "2", "--validation_steps", "1", "--num_inference_steps", "2")
    flags += ("--dataloader_num_workers", "2", "--random_flip", "0.5", "--report_to", "all", "--train_batch_size", "2")
    train(tmp_path, *flags, "--validation_prompt", prompt, data=demo_clips, raw=True)
    assert list((tmp_path / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    for step in (0, 1, 2):
        folder = tmp_path / "validation" / f"step-{step}"
        assert (folder / "contact_sheet.png").is_file()
        videos = sorted(folder.glob("*.mp4"))
        assert len(videos) == 2
        assert all(all_frames(video).shape == (17, 64, 96, 3) for video in videos)


def test_validation_does_not_change_what_is_trained_and_samples_as_generate_does(train, tiny_models, tmp_path):
    flags = ["--max_train_steps", "2"]
    plain = train(tmp_path / "plain", *flags)
    sampling = ["--num_inference_steps", "2", "--sampling_scheduler", "ddim", "--sampling_cache", "pab"]
    flags += ["--validation_prompt", "a red circle", "--validation_steps", "1", *sampling]
    assert_same_weights(train(tmp_path / "validated", *flags), plain)
    video = tmp_path / "video.mp4"
    sampling += ["--model_path", str(tiny_models("5b")), "--prompt", "a red circle", "--seed", "0"]
    generate.main([*sampling, "--output_file", str(video)])
    (validated,) = (tmp_path / "validated" / "validation" / "step-0").glob("*.mp4")
    assert np.abs(all_frames(validated).astype(int) - all_frames(video)).mean() < 0.25


def test_the_lora_of_every_validation_is_kept_and_can_be_sampled_and_trained_further(train, tmp_path, capsys):
    one_step = train(tmp_path / "short", "--max_train_steps", "1")
    flags = ("--validation_prompt", "a circle", "--validation_steps", "1", "--num_inference_steps", "1")
    result = train(tmp_path, "--max_train_steps", "2", "--checkpoints_total_limit", "1", *flags)
    said = capsys.readouterr().err
    kept = [tmp_path / "validation" / f"step-{step}" for step in (1, 2)]
    assert list_validated(tmp_path) == list(enumerate(kept, 1))  # none at step 0
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]
    for folder, expected in zip(kept, (one_step, result), strict=True):
        assert_same_weights(weights_of(folder), expected)
    assert "; each keeps its weights in validation/step-N" in said
    (command,) = [line for line in said.splitlines() if line.startswith("python training/generate.py")]
    sampled = parse_generate_args(shlex.split(command)[2:])
    assert sampled.loras == ((str(kept[0] / LORA_FILE), 1.0),)
    assert sampled.sampling.height == 64
    assert train(tmp_path / "further", "--max_train_steps", "1", "--lora_weights", str(kept[0]))


def test_full_fine_tuning_keeps_the_validated_weights_if_asked_to(tiny_models, prepared, tmp_path):
    flags = ["--load_tensors", "--max_train_steps", "2", "--lr_warmup_steps", "0", "--use_ema", "--report_to", "none"]
    flags += ["--validation_prompt", "a circle", "--validation_steps", "1", "--num_inference_steps", "1"]
    script, folders = cogvideox_text_to_video_sft, (tiny_models("5b"), prepared)
    tiny_runs.train(script, *folders, tmp_path / "off", *flags)
    assert list_validated(tmp_path / "off") == []
    output = tiny_runs.train(script, *folders, tmp_path / "on", *flags, "--save_validation_weights")
    (_, _), (_, last) = list_validated(output)
    assert_same_weights(weights_of(last), weights_of(output))  # the average, which was sampled


def test_prepared_data_trains_without_vae_or_text_encoder(tiny_models, train, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_models("5b"), model)
    shutil.rmtree(model / "text_encoder")
    shutil.rmtree(model / "tokenizer")
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert train(tmp_path / "out", "--max_train_steps", "1", "--caption_dropout", "0.5", model=model)


def test_captions_of_prepared_data_are_sampled_at_its_size_without_a_text_encoder(
    tiny_models, prepared_demo, tmp_path, capsys
):
    model, data = shutil.copytree(tiny_models("5b"), tmp_path / "model"), prepared_demo(*SIZE, "--id_token", "XY")
    shutil.rmtree(model / "text_encoder")
    argv = ["--pretrained_model_name_or_path", str(model), "--data_root", str(data), "--output_dir", str(tmp_path)]
    argv += ["--load_tensors", "--max_train_steps", "1", "--validation_epochs", "1", "--num_inference_steps", "1"]
    cogvideox_text_to_video_lora.main([*argv, "--report_to", "none", "--seed", "0", "--train_batch_size", "1"])
    videos = sorted((tmp_path / "validation" / "step-1").glob("*.mp4"))
    assert [all_frames(video).shape for video in videos] == [(17, 64, 96, 3)] * 2
    assert all("-xy-" in video.name for video in videos)
    assert "2 videos of 17x64x96, before the first step" in capsys.readouterr().err


def test_a_run_holds_out_a_clip_by_default_and_names_its_best_step(train, tmp_path, capsys):
    train(tmp_path, "--max_train_steps", "7", "--train_batch_size", "15", "--checkpointing_steps", "3")
    losses = curve(tmp_path, "validation_loss")
    assert len(losses) >= 2
    assert (min(losses), max(losses)) == (0, 7)
    assert losses[7] < losses[0]
    assert curve(tmp_path, "validation_loss/best_step")[7] == min(losses, key=losses.get)
    assert sorted(curve(tmp_path, "validation_loss/t=500")) == sorted(losses)
    said = capsys.readouterr().err
    assert re.search(r"\n1 of 16 clips held out for the validation loss: clip-\d+-\w+\n", said)
    assert re.search(r"held-out +1 clip; the loss at 3 noise levels, .*, takes [12]\.\d% of the run's work", said)
    assert f"the validation loss was lowest at step {min(losses, key=losses.get)}: " in said
    assert not list_validated(tmp_path)
    assert read_state(tmp_path / "checkpoint-3").settings["--validation_fraction"] == 0.05


def test_the_loss_of_clips_in_a_table_is_logged_and_falls(train, demo_clips, tmp_path):
    header, *rows = (demo_clips / "metadata.csv").read_text().splitlines()
    table = tmp_path / "held-out.csv"
    table.write_text("\n".join([header, *rows[:3]]))
    (tmp_path / "videos").mkdir()
    for name in (row.split(",")[0] for row in rows[:3]):  # backwards, because clips that are trained on are refused
        write_video(tmp_path / name, all_frames(demo_clips / name)[::-1], 8)
    flags = ("--max_train_steps", "40", "--validation_steps", "20", "--learning_rate", "2e-3")
    flags += ("--validation_dataset_file", str(table), "--caption_column", "caption")
    train(tmp_path, *flags)
    losses = curve(tmp_path, "validation_loss")
    assert sorted(losses) == [0, 20, 40]
    assert losses[40] < losses[20] < losses[0]
    at_quantiles = [
        curve(tmp_path, f"validation_loss/t={t}")[40] for t in (100, 200, 300, 400, 500, 599, 699, 799, 899)
    ]
    assert sum(at_quantiles) / 9 == pytest.approx(losses[40], rel=1e-5)
    assert [step for step, _ in list_validated(tmp_path)] == [20, 40]
    assert not list((tmp_path / "validation").rglob("*.mp4"))  # no prompt was given


def test_a_failing_validation_is_a_warning_and_the_result_is_written(tiny_models, train, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_models("5b"), model)
    (model / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    flags = ("--max_train_steps", "2", "--validation_prompt", "x", "--validation_steps", "1")
    flags += ("--ignore_prepared_mismatch",)  # the broken VAE is not the one that the data was prepared with
    assert train(tmp_path / "out", *flags, model=model)


def test_data_prepared_with_another_vae_is_refused_before_anything_is_loaded(tiny_models, error_of, tmp_path):
    model = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    message = error_of(tmp_path / "out", model=model)
    assert f"prepared with another vae (of {tiny_models('5b')})" in message
    assert "--ignore_prepared_mismatch" in message


@pytest.mark.parametrize("index", ["full", "half"])
def test_a_folder_that_the_original_script_wrote_is_trained_on(train, tmp_path, index):
    data = write_original_folder(tmp_path / "data", 3, index=index)
    assert train(tmp_path / "out", "--max_train_steps", "2", data=data)


RESUME = ("--max_train_steps", "8", "--resume_from_checkpoint", "latest")


@pytest.fixture
def stopped_run(train, tmp_path) -> Path:
    train(tmp_path / "run", "--max_train_steps", "4", "--checkpointing_steps", "2", "--lr_scheduler", "linear")
    return tmp_path / "run"


def test_a_run_with_other_settings_is_not_resumed_and_all_differences_are_listed(
    error_of, prepared, stopped_run, tmp_path
):
    before = (stopped_run / "pytorch_lora_weights.safetensors").read_bytes()
    assert "--max_train_steps: " in error_of(stopped_run, *RESUME, "--max_train_steps", "3")
    fewer = shutil.copytree(prepared, tmp_path / "fewer")
    pandas.read_feather(prepared / "index.arrow")[1:].to_feather(fewer / "index.arrow")
    flags = ("--rank", "4", "--lora_alpha", "16", "--optimizer", "prodigy", "--train_batch_size", "2", "--seed", "7")
    error = error_of(stopped_run, *RESUME, *flags, data=fewer)
    assert re.search(r"data was 16 samples \(\w+\), is now 15 samples \(\w+\); --train_batch_size was 1, is", error)
    for words in ("--optimizer was adamw, is now prodigy", "--rank was 8, is now 4", "--seed was 0, is now 7"):
        assert words in error
    assert (stopped_run / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_a_run_is_not_resumed_on_another_model_of_the_same_shape(tiny_models, error_of, stopped_run):
    assert "model was" in error_of(stopped_run, *RESUME, "--ignore_prepared_mismatch", model=tiny_models("2b"))


def test_a_learning_rate_given_on_resume_is_applied_along_the_schedule(train, stopped_run):
    shutil.rmtree(stopped_run / "logs")
    train(stopped_run, *RESUME, "--lr_scheduler", "linear", "--learning_rate", "4e-3")
    assert curve(stopped_run, "lr") == pytest.approx({step: 4e-3 * (8 - (step - 1)) / 8 for step in (5, 6, 7, 8)})


def test_a_second_run_in_the_folder_is_refused_before_it_loads_anything(error_of, tmp_path):
    with locked_folder(tmp_path):
        error = error_of(tmp_path, "--max_train_steps", "1")
    assert re.fullmatch(rf"error: --output_dir: process {os.getpid()} on .* is writing to '{tmp_path}'; .*", error)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_resumed_with_other_batches_a_step_and_reports_it(train, stopped_run, capsys):
    train(stopped_run, *RESUME, "--gradient_accumulation_steps", "5")
    said = capsys.readouterr().err
    assert f"resumed from {stopped_run / 'checkpoint-4'} at learning rate 0.001" in said
    assert "the run continues with 1 processes x 5 batches a step, after 1 x 1" in said
    # Of 16 batches 4 are seen: steps of 5, 5 and 2, then one of the next epoch. The next resume counts from there.
    assert read_state(stopped_run / "checkpoint-8").schedule == ScheduleStart(1, 5, step=4, epoch=0, seen_batches=4)


def poisoned(prepared: Path, folder: Path, num_samples: int) -> tuple[Path, set[str]]:
    """Copy prepared data with the first samples not finite; returns the folder and their names."""
    shutil.copytree(prepared, folder)
    names = set()
    for shard in sorted((folder / "latents").glob("*.safetensors")):
        tensors = load_file(shard)
        for name in sorted(tensors):
            if len(names) < num_samples:
                tensors[name] = torch.full_like(tensors[name], torch.nan)
                names.add(name.rpartition(".")[0])
        save_file(tensors, shard)
    return folder, names


@pytest.mark.parametrize("optimizer", ["adamw", "came"])
def test_a_step_that_is_not_finite_is_skipped_and_its_clip_named(train, prepared, tmp_path, capsys, optimizer):
    data, (name,) = poisoned(prepared, tmp_path / "data", 1)
    flags = ("--num_train_epochs", "1", "--gradient_accumulation_steps", "3")
    weights = train(tmp_path / "out", *flags, "--optimizer", optimizer, data=data)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "is skipped: its loss is not finite" in line]
    assert name in line
    assert "warning: 1 steps were skipped" in said
    (skipped,) = read_run(tmp_path / "out").skipped
    assert skipped["what"] == "loss" and name in skipped["clips"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


@pytest.fixture
def not_finite_from(monkeypatch):
    """Have the loss be NaN from a step on."""

    def spoil(first: int) -> None:
        calls, losses = count(1), Objective.__call__
        factors = (math.nan if call >= first else 1.0 for call in calls)
        monkeypatch.setattr(Objective, "__call__", lambda *args: losses(*args) * next(factors))

    return spoil


def test_too_many_such_steps_end_the_run_and_the_last_checkpoint_is_from_before_them(
    train, error_of, tmp_path, not_finite_from
):
    flags = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "1", "--max_train_steps", "20")
    not_finite_from(4)
    error = error_of(tmp_path, "--max_bad_steps", "3", *flags)
    assert "error: --max_bad_steps: 3 steps in a row had no finite loss and gradient" in error
    assert f"{tmp_path / 'checkpoint-3'} is the last good checkpoint" in error
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_run_whose_last_steps_are_all_skipped_writes_the_weights_before_them_and_fails(
    train, error_of, tmp_path, not_finite_from
):
    good = train(tmp_path / "good", "--max_train_steps", "3")
    not_finite_from(4)
    output = tmp_path / "out"
    error = error_of(output, "--max_train_steps", "6", "--checkpointing_steps", "2")
    assert error.startswith("error: all steps from step 4 to the last, 6, were skipped")
    assert f"{output / 'good-step-3' / 'pytorch_lora_weights.safetensors'} has the weights of step 3; " in error
    assert f"{output / 'checkpoint-2'} is the last good checkpoint" in error
    assert_same_weights(weights_of(output / "good-step-3"), good)
    assert not (output / "pytorch_lora_weights.safetensors").exists()  # a launcher would take the run for finished


def test_weights_that_are_not_finite_are_not_written(train, error_of, tmp_path, monkeypatch):
    def spoil(run: Run) -> int:
        run.trainable.parameters[0].data.fill_(math.nan)
        return run.total_steps

    monkeypatch.setattr(finetune, "train", spoil)
    assert error_of(tmp_path, "--max_train_steps", "1").startswith("error: the trained weights are not finite, so no")
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float16_needs_a_gpu(error_of, tmp_path):
    assert "--mixed_precision fp16" in error_of(tmp_path / "out", "--mixed_precision", "fp16")


def set_up_with_scaler(model: Path, data: Path, output: Path, scale: float | None) -> Run:
    """Set up a run as with float16 on a GPU, with a gradient scaler in accelerate; None: without one."""
    flags = ["--rank", "8", "--lora_alpha", "8", "--learning_rate", "1e-3", "--lr_warmup_steps", "0"]
    flags += ["--max_train_steps", "2", "--gradient_accumulation_steps", "2", "--lr_scheduler", "linear"]
    run = set_up_run("text-to-video", model, data, output, *flags, "--max_grad_norm", "0.1")
    if scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        settings = run.spec.settings
        rate = settings.schedule.learning_rate
        optimizer, schedule = build_optimizer(settings, run.trainable.parameters, rate, 2, fused=False)
        optimizer = AcceleratedOptimizer(optimizer, scaler=scaler)
        run.trainable = replace(run.trainable, optimizer=optimizer, lr_scheduler=schedule)
        run.spec.accelerator.scaler, run.spec.accelerator._optimizers = scaler, [optimizer]
        # As on a GPU with fp16, which accelerate refuses to start with on a CPU.
        run.spec.accelerator.native_amp, run.spec.accelerator.state._mixed_precision = True, "fp16"
    return run


def test_a_gradient_scaler_is_undone_before_gradients_are_clipped(tiny_models, prepared, tmp_path):
    trained = []
    for scale in (None, 1024.0):
        run = set_up_with_scaler(tiny_models("5b"), prepared, tmp_path / str(scale), scale)
        train_loop(run)
        trained.append([parameter.detach().clone() for parameter in run.trainable.parameters])
    for plain, scaled in zip(*trained, strict=True):
        torch.testing.assert_close(scaled, plain, atol=1e-6, rtol=1e-4)


def test_a_step_whose_scaled_gradients_overflow_is_skipped_and_not_counted_by_the_schedule(
    tiny_models, prepared, tmp_path
):
    run = set_up_with_scaler(tiny_models("5b"), prepared, tmp_path, 1024.0)
    run.trainable.parameters[0].register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    before = [parameter.detach().clone() for parameter in run.trainable.parameters]
    train_loop(run)
    assert all(torch.equal(now, then) for now, then in zip(run.trainable.parameters, before, strict=True))
    assert run.trainable.lr_scheduler.get_last_lr() == [1e-3]
    assert run.spec.accelerator.scaler.get_scale() == 1024.0 / 4  # halved by each of the two steps
