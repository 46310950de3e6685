"""The summary of a run before its first step."""

from dataclasses import replace

import pytest
import torch

from args import parse_args
from checkpoint_folders import make_checkpoint
from common.run_folder import LORA_FILE
from memory.ladder import Choice
from memory.settings import GB, MemorySettings, memory_settings_of, with_memory
from methods.full import FullFinetune
from methods.lora import Lora
from models.source import ModelSource
from planning.plan import plan_training_data
from run.loss_schedule import plan_losses
from run.recipe import Recipe
from run.setup import make_sampler
from run.spec import check_spec
from run.summary import (
    as_table,
    describe_best,
    describe_chosen,
    describe_expected_memory,
    describe_method,
    describe_model,
    sample_command,
    start_rows,
)
from tiny_runs import recipe_of, run_flags


KEPT = "; each keeps its weights in validation/step-N"


@pytest.fixture
def summarize(tiny_models, demo_clips, tmp_path, fresh_accelerator):
    def summarize(*flags: str, padding: int = 0, done: int = 0) -> dict[str, str]:
        """Return the lines of a run's summary by their names."""
        small = ("--seed", "0", "--train_batch_size", "2", "--optimizer", "adamw", "--rank", "8", "--lora_alpha", "4")
        argv = run_flags(tiny_models("5b"), demo_clips, tmp_path / "out", "--max_train_steps", "30", *small, *flags)
        args = parse_args(argv, task="text-to-video", method="lora")
        spec = check_spec(Recipe(args, plan_training_data(args)))
        spec = replace(spec, state=replace(spec.state, step=done))
        sampler, schedule = make_sampler(spec, spec.state.schedule)
        transformer = spec.source.load_transformer(torch.float32)
        spec.method.attach(transformer)
        losses = plan_losses(spec, sampler, schedule, total_steps=30)
        text = as_table(start_rows(spec, transformer, schedule, 30, padding, losses))
        starts = {len(line) - len(line.split(maxsplit=1)[1]) for line in text.splitlines()}
        assert len(starts) == 1, text  # one column
        return dict(line.split(maxsplit=1) for line in text.splitlines())

    return summarize


def test_the_summary_describes_the_run(summarize, tmp_path):
    flags = ("--gradient_accumulation_steps", "2", "--scale_lr", "--checkpointing_steps", "15")
    flags += ("--validation_prompt", "a:::b", "--validation_steps", "10", "--no-validate_first")
    flags += ("--validation_fraction", "0")
    lines = summarize(*flags, padding=3)
    assert lines["model"].split(": ")[-1] == "CogVideoX text-to-video, 4 blocks, rotary positions, made for 17x64x96"
    assert lines["training"] == "LoRA of rank 8, alpha 4: 32,768 of 1,280,192 parameters"
    assert lines["data"] == "16 samples (frames x height x width): 16 x 17x64x96"
    assert lines["steps"].startswith("1 to 30, up to 4 samples a step, 4 steps an epoch; 3 batches are drawn twice")
    assert lines["optimizer"] == "adamw, learning rate 0.0004, constant"
    assert lines["devices"] == "1 x cpu, precision no"
    assert lines["memory"].endswith(" GB on a GPU expected (calculated, not measured)")
    assert lines["validation"] == "2 videos of 17x64x96, every 10 steps, at the end" + KEPT
    assert lines["output"] == str(tmp_path / "out")
    assert lines["written"] == "every 15 steps a checkpoint of 393 kB; losses to loss.png, metrics.jsonl"


def test_the_summary_describes_the_validation(summarize, capsys):
    assert summarize()["validation"] == "none"
    often = ("--validation_prompt", "a", "--num_validation_videos", "3", "--validation_epochs", "1")
    when = "before the first step, every epoch, at the end"
    assert summarize(*often, "--id_token", "XY")["validation"] == f"3 videos of 17x64x96, {when}{KEPT}"
    assert "warning: --validation_prompt: 1 of 1 prompts lack XY, the id token" in capsys.readouterr().err


def test_the_summary_says_what_is_held_out_and_what_its_loss_costs(summarize):
    short = "; the loss at 3 noise levels, before the first step and after the last one, takes 4.1% of the run's work"
    assert "held-out" not in summarize()  # the run is too short
    assert summarize("--validation_fraction", "0.1")["held-out"] == f"2 clips{short}"
    long = summarize("--train_batch_size", "12", "--gradient_accumulation_steps", "2")
    assert long["data"].endswith("; 1 held out for the validation loss")
    assert long["held-out"] == "1 clip; the loss at 3 noise levels, every 3 steps, takes 3.0% of the run's work"


def test_the_best_step_is_named_with_the_nearest_weights(tmp_path):
    for step in (5, 10):
        make_checkpoint(tmp_path / f"checkpoint-{step}", step)
    curve = [(0, 3.0), (4, 1.0), (8, 2.0)]
    assert describe_best(curve, tmp_path) == (
        "the validation loss was lowest at step 4: 1.0000 (3.0000 at step 0, 2.0000 at step 8); the nearest weights, "
        f"of step 5, are in {tmp_path / 'checkpoint-5'}"
    )
    kept = tmp_path / "validation/step-4"
    kept.mkdir(parents=True)
    (kept / LORA_FILE).touch()
    assert describe_best(curve, tmp_path).endswith(f"; its weights are in {kept}")
    assert describe_best(curve[:2], tmp_path) == (
        "the validation loss was lowest at step 4: 1.0000 (3.0000 at step 0); it is that of the result"
    )


def test_the_summary_counts_regularization_samples_apart(summarize, demo_clips, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n" * 3)
    last = sorted((demo_clips / "videos").iterdir())[-3:]
    (tmp_path / "videos.txt").write_text("\n".join(map(str, last)))
    kept = ("--regularization_data_root", str(tmp_path), "--allow_outside_paths")
    kept += ("--regularization_weight", "0.5", "--max_samples", "3")
    assert summarize(*kept)["data"].endswith(": 3 x 17x64x96; 3 for regularization, as many in an epoch, loss x 0.5")


def test_the_summary_of_a_resumed_run_has_the_steps_left(summarize):
    assert summarize("--validation_prompt", "a", done=12)["steps"].startswith("13 to 30, ")
    finished = summarize("--validation_prompt", "a", done=30)
    assert (finished["steps"], finished["validation"]) == ("none left of 30", "1 video of 17x64x96, at the end" + KEPT)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("2b", "CogVideoX text-to-video, 4 blocks, sinusoidal positions, made for 17x64x96"),
        ("5b-i2v", "CogVideoX image-to-video, 4 blocks, learned positions, made for 17x64x96"),
        ("1.5-5b", "CogVideoX 1.5 text-to-video, 4 blocks, rotary positions, made for 17x64x96"),
    ],
)
def test_a_model_is_described_from_its_configs(tiny_models, kind, words):
    assert describe_model(ModelSource(str(tiny_models(kind))).configs()) == words


def test_a_method_is_described():
    assert describe_method(Lora(64, 32, quantize_base="int8")) == "LoRA of rank 64, alpha 32 on a base in int8"
    assert describe_method(FullFinetune(weights_dtype="bf16")) == "full fine-tuning, weights in bf16"


def test_the_settings_chosen_for_the_card_are_named(tiny_models, demo_clips, tmp_path, monkeypatch):
    argv = run_flags(
        tiny_models("5b"), demo_clips, tmp_path / "out", "--quantize_base", "int8", "--optimizer", "adamw"
    )
    settings = parse_args(argv, task="text-to-video", method="lora")
    assert describe_chosen(settings) == ""  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert describe_chosen(settings) == "; this card needs no savings"
    chosen = with_memory(settings, replace(memory_settings_of(settings), gradient_checkpointing=True))
    assert describe_chosen(chosen) == "; for this card: --gradient_checkpointing"


@pytest.mark.parametrize(
    ("kind", "task", "flags", "files"),
    [
        ("5b-i2v", "image-to-video", "", {"--image": "IMAGE.png"}),
        (
            "5b-i2v",
            "image-to-video",
            "--condition_frames first,last",
            {"--image": "IMAGE.png", "--last_image": "LAST_IMAGE.png"},
        ),
        ("5b-i2v", "image-to-video", "--condition_frames first:2", {"--video": "CLIP.mp4"}),
        (
            "5b",
            "control-to-video",
            "--compute_control grey",
            {"--control": "CLIP.mp4", "--compute_control": "grey"},
        ),
    ],
)
def test_the_command_that_samples_names_the_files_that_are_needed(
    tiny_models, demo_clips, tmp_path, monkeypatch, fresh_accelerator, kind, task, flags, files
):
    monkeypatch.chdir(tmp_path)
    steps = ("--max_train_steps", "1", "--allow_outside_paths")
    spec = check_spec(recipe_of(task, tiny_models(kind), demo_clips, *steps, *flags.split()))
    command = sample_command(spec, tmp_path)
    assert list(files.items()) == list(zip(command[8::2], command[9::2], strict=True))


@pytest.mark.gpu
def test_expected_memory_is_compared_with_the_card():
    choice = Choice(MemorySettings("lora"), 3 * GB, is_measured=True)
    card = torch.cuda.get_device_properties(0).total_memory / GB
    said = describe_expected_memory(choice, torch.device("cuda"), shares=True)
    assert said == f"3.00 GB of {card:.2f} GB expected (measured on a GPU), less if GPUs shard weights"
