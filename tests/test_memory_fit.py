"""Runs whose settings are changed so that they fit into memory."""

import pytest

from args import parse_args
from buckets import Bucket
from errors import UserError
from memory_fit import fit_to_budget, run_facts, step_down
from methods import FullFinetune, Lora
from plan import plan_training_data
from recipe import Recipe, check_recipe
from tasks import TextToVideo


@pytest.fixture
def make_recipe(tiny_models, demo_clips, tmp_path, fresh_accelerator):
    def make(method: str, *flags: str) -> Recipe:
        size = ["--height", "64", "--width", "96", "--frame_buckets", "17", "--max_num_frames", "17"]
        size += ["--height_buckets", "64", "--width_buckets", "96"]
        paths = ["--pretrained_model_name_or_path", str(tiny_models("5b")), "--data_root", str(demo_clips)]
        paths += ["--dataset_file", str(demo_clips / "metadata.csv"), "--output_dir", str(tmp_path / "out")]
        paths += ["--caption_column", "caption"]
        args = parse_args([*paths, *size, "--train_batch_size", "2", *flags], task="text-to-video", method=method)
        chosen = Lora(8, 8) if method == "lora" else FullFinetune(weights_dtype=args.weights_dtype)
        return check_recipe(args, plan_training_data(args), TextToVideo(), chosen)

    return make


def test_without_a_budget_nothing_changes(make_recipe):
    recipe = make_recipe("lora")
    assert fit_to_budget(recipe, set()) is recipe


def test_a_budget_that_is_ample_keeps_the_fastest_settings(make_recipe, capsys):
    recipe = make_recipe("lora", "--memory_budget_gb", "80")
    fitted = fit_to_budget(recipe, recipe.args.given)
    assert vars(fitted.args) == vars(recipe.args)
    logged = capsys.readouterr().err
    assert "--memory_budget_gb 80: nothing to change; takes " in logged and "(calculated, not measured)" in logged


def test_a_budget_that_is_too_small_is_refused(make_recipe):
    recipe = make_recipe("lora", "--memory_budget_gb", "0.1")
    with pytest.raises(UserError, match=r"--memory_budget_gb 0\.1: nothing fits; .*--stream_blocks"):
        fit_to_budget(recipe, recipe.args.given)


def test_stepping_down_goes_to_the_last_rung_one_by_one(make_recipe):
    recipe = make_recipe("sft", "--optimizer", "adamw", "--mixed_precision", "bf16")
    first = step_down(recipe, recipe.args.given)
    assert first.args.gradient_checkpointing and not recipe.args.gradient_checkpointing
    rungs = [first]
    while following := step_down(rungs[-1], recipe.args.given):
        rungs.append(following)
    # The method changes with the flags, and so does what a checkpoint notes.
    in_bf16 = next(rung for rung in rungs if rung.args.weights_dtype == "bf16")
    assert in_bf16.method.weights_dtype == "bf16" and in_bf16.state.settings["--weights_dtype"] == "bf16"


def test_what_memory_depends_on_is_read_from_the_recipe(make_recipe):
    facts = run_facts(make_recipe("lora", "--validation_prompt", "a circle"))
    assert (facts.size, facts.batch_size, facts.sampled) == (Bucket(17, 64, 96), 2, Bucket(17, 64, 96))
    assert facts.adapters == "rank 8 on to_k to_out.0 to_q to_v"
    assert run_facts(make_recipe("sft")).adapters == ""
