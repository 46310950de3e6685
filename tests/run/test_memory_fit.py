"""Memory settings are chosen so that a run fits."""

import json
import re
from dataclasses import asdict

import pytest

from args import parse_args
from checkpoints.manifest import write_manifest
from checkpoints.state import TrainerState
from common.errors import UserError
from common.logs import start_logging
from common.run_folder import STATE_FILE
from data.buckets import Bucket
from data.plan import plan_training_data
from flags.schema import replace_flags
from memory.settings import MemorySettings, memory_settings_of
from run.memory_fit import choose_by_budget, chosen_before, run_facts, step_down, training_memory_advice
from run.recipe import Recipe
from tiny_runs import run_flags


@pytest.fixture
def make_run(tiny_models, demo_clips, tmp_path):
    def make(method: str, *flags: str) -> Recipe:
        rank = ("--rank", "8") if method == "lora" else ()
        argv = run_flags(tiny_models("5b"), demo_clips, tmp_path / "out", "--train_batch_size", "2", *rank, *flags)
        args = parse_args(argv, task="text-to-video", method=method)
        return Recipe(args, plan_training_data(args))

    return make


def test_a_large_budget_keeps_the_fastest_settings(make_run, capsys):
    run = make_run("lora", "--memory_budget_gb", "80")
    start_logging()
    assert choose_by_budget(run) == memory_settings_of(run.settings)
    logged = capsys.readouterr().err
    assert "--memory_budget_gb 80: nothing to change; takes " in logged and "(calculated, not measured)" in logged


def test_a_small_budget_is_refused(make_run):
    run = make_run("lora", "--memory_budget_gb", "0.1")
    with pytest.raises(UserError, match=r"--memory_budget_gb 0\.1: nothing fits; .*--stream_blocks"):
        choose_by_budget(run)


def test_stepping_down_reaches_all_rungs(make_run, caplog):
    recipe = make_run("sft", "--optimizer", "adamw", "--mixed_precision", "bf16")
    rungs = []
    while memory := step_down(recipe):
        recipe = recipe.with_memory(memory)
        rungs.append(recipe)
    assert rungs[0].settings.memory.gradient_checkpointing
    assert "bf16" in {recipe.method.weights_dtype for recipe in rungs}
    optimizers = [recipe.settings.optimizer for recipe in rungs]
    assert {flags.max_grad_norm for flags in optimizers if flags.step_in_backward} == {0}
    assert "--step_in_backward (gradients are not clipped)" in caplog.text


def test_a_resumed_run_keeps_the_settings_chosen_when_it_began(make_run, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "pytorch_lora_weights.safetensors").touch()
    memory = asdict(MemorySettings("lora", quantize_base="int8", gradient_checkpointing=True))
    for noted in (memory, {}):
        (checkpoint / STATE_FILE).write_text(json.dumps(asdict(TrainerState(5, 0, {}, noted))))
        write_manifest(checkpoint)
        args = make_run("lora", "--memory_budget_gb", "80", "--resume_from_checkpoint", str(checkpoint)).settings
        assert chosen_before(args) == (MemorySettings(**noted) if noted else None)
    # Without the flag, the settings are those of the other flags.
    assert chosen_before(replace_flags(args, memory_budget_gb=None)) is None


def test_facts_are_those_of_the_run(make_run):
    facts = run_facts(make_run("lora", "--validation_prompt", "a circle"))
    assert (facts.size, facts.batch_size, facts.sampled) == (Bucket(17, 64, 96), 2, Bucket(17, 64, 96))
    assert facts.adapters == "rank 8 on to_k to_out.0 to_q to_v"
    assert run_facts(make_run("sft")).adapters == ""


def test_advice_follows_the_ladder_and_each_line_takes_less(make_run):
    run = make_run("lora", "--mixed_precision", "bf16", "--train_batch_size", "4")
    now, batch, *rungs, sizes = training_memory_advice(run)
    assert now.startswith("now: 4 x 17x64x96 takes ") and now.endswith("B (calculated, not measured)")
    assert batch.startswith("--train_batch_size 1 --gradient_accumulation_steps 4 (the same steps): ")
    assert rungs[0].startswith("--gradient_checkpointing --checkpoint_every ")
    assert "--quantize_base int8 --stream_blocks" in rungs[-1]
    found = [re.search(r": ([\d.]+) ([MG]B), ", line) for line in rungs]
    needed = [float(one[1]) * {"MB": 1, "GB": 1024}[one[2]] for one in found]
    assert needed == sorted(needed, reverse=True)
    assert "--height" in sizes


def test_advice_omits_savings_that_are_on(make_run):
    flags = ("--gradient_checkpointing", "--quantize_base", "int8", "--stream_blocks", "--train_batch_size", "1")
    _, *rungs, _ = training_memory_advice(make_run("lora", "--mixed_precision", "bf16", *flags))
    assert [line.split(":")[0] for line in rungs] == ["--offload_checkpoints"]


def test_advice_takes_the_memory_that_it_names(make_run):
    run = make_run("lora", "--mixed_precision", "bf16", "--train_batch_size", "1")
    flags, said = training_memory_advice(run)[-2].split(": ")
    run = make_run("lora", "--mixed_precision", "bf16", "--train_batch_size", "1", *flags.split())
    assert f"takes {said.split(',')[0]} " in training_memory_advice(run)[0]
