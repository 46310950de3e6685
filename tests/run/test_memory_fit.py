"""Memory settings are chosen so that a run fits."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from args import parse_args
from checkpoints.manifest import write_manifest
from checkpoints.state import TrainerState
from cli.schema import replace_flags
from common.errors import UserError
from common.logs import start_logging
from common.ranks import launch_rank
from common.run_folder import STATE_FILE
from data.buckets import Bucket
from forked_ranks import call_on_ranks
from memory.facts import Workload
from memory.settings import GB, MemorySettings, memory_settings_of
from planning.plan import plan_training_data
from run.auto_fit import count_steps, earns_to_compile, fit_into_memory
from run.memory_fit import (
    choose_by_budget,
    chosen_before,
    run_facts,
    step_down,
    training_memory_advice,
    usable_memory,
    workload_of,
)
from run.recipe import Recipe
from run.summary import describe_compilation
from tiny_runs import SIZE, run_flags


PREPARED = "--load_tensors"


@pytest.fixture
def make_run(tiny_models, demo_clips, prepared_demo, tmp_path):
    def make(method: str, *flags: str, task: str = "text-to-video") -> Recipe:
        data = prepared_demo(*SIZE, "--max_samples", "2") if PREPARED in flags else demo_clips
        rank = ("--rank", "8") if method == "lora" else ()
        argv = run_flags(tiny_models("5b"), data, tmp_path / "out", "--train_batch_size", "2", *rank, *flags)
        args = parse_args(argv, task=task, method=method)
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
    with pytest.raises(
        UserError, match=r"--memory_budget_gb 0\.1: nothing fits; .*--stream_blocks, which takes [^\n]*$"
    ):
        choose_by_budget(run)


@pytest.fixture
def with_card(monkeypatch):
    """A function that pretends that there is a GPU with so many free bytes."""

    def pretend(free: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 2 * int(free)))

    return pretend


def test_a_card_chooses_the_fastest_settings_that_fit(make_run, with_card):
    run = make_run("lora", PREPARED)
    with_card(80 * GB)
    assert fit_into_memory(run).settings == run.settings
    with_card(2.116 * GB)  # the margin and little more
    chosen = fit_into_memory(run).settings.memory
    assert chosen.gradient_checkpointing and chosen.checkpoint_scope == "all-but-attention"
    # After the choice too, the advice for a run out of memory names all flags to type.
    *_, advice, _ = training_memory_advice(fit_into_memory(run))
    assert advice.startswith("--gradient_checkpointing ") and "--stream_blocks" in advice
    # A flag on precision is kept, and the rest is chosen.
    memory = fit_into_memory(make_run("lora", PREPARED, "--quantize_base", "int8")).settings.memory
    assert memory.gradient_checkpointing and memory.quantize_base == "int8" and not memory.stream_blocks


@pytest.mark.parametrize("flag", ["--gradient_checkpointing", "--no-gradient_checkpointing"])
def test_a_flag_on_checkpoints_leaves_nothing_to_the_card(make_run, with_card, flag):
    with_card(0)
    run = make_run("lora", flag)
    assert fit_into_memory(run).settings == run.settings


def test_a_card_that_is_too_small_gets_the_smallest_settings_with_clipped_gradients(make_run, with_card, capsys):
    with_card(1 * GB)
    settings = fit_into_memory(make_run("sft", "--optimizer", "adamw", "--mixed_precision", "bf16")).settings
    assert settings.optimizer.offload_gradients and settings.optimizer.max_grad_norm > 0
    assert "nothing fits into the 1.00 GB of GPU memory that are free" in capsys.readouterr().err


def memory_on_rank(argv: list[str]) -> list[int]:
    """Return the memory that this rank may use, where only the first card has little."""
    free = (GB, 2 * GB)[launch_rank()]
    torch.cuda.mem_get_info = lambda device: (free, 2 * GB)
    return list(usable_memory(parse_args(argv, task="text-to-video", method="lora")))


def test_the_smallest_card_decides_for_all_ranks(tiny_models, demo_clips, tmp_path):
    argv = run_flags(tiny_models("5b"), demo_clips, tmp_path / "out")
    (free, host), other = call_on_ranks(memory_on_rank, 2, tmp_path / "ranks", argv)
    assert [free, host] == other and free == GB and host > GB / 2


def test_what_is_not_calculated_checkpoints_blocks(make_run, with_card, monkeypatch):
    with_card(80 * GB)
    run = make_run("lora")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    memory = fit_into_memory(run).settings.memory
    assert (memory.gradient_checkpointing, memory.checkpoint_scope) == (True, "block")


def test_a_run_on_the_cpu_beside_a_card_is_left_alone(make_run, with_card, monkeypatch):
    with_card(0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = make_run("lora")
    assert fit_into_memory(run).settings == run.settings


@pytest.fixture
def compiles(make_run, with_card, monkeypatch):
    """A function that tells whether a run with these flags compiles its blocks, and what its summary says of it."""
    monkeypatch.setattr("models.compilation.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: name)

    def compiles(*flags: str, launch: str = "ACCELERATE_IS_PLAIN") -> tuple[bool, str]:
        with_card(80 * GB)
        recipe = make_run("lora", *flags)
        monkeypatch.setenv(launch, "true")
        settings = fit_into_memory(recipe).settings
        rows = describe_compilation(settings, len(recipe.sizes), count_steps(recipe))
        monkeypatch.delenv(launch)
        return settings.speed.compile, rows.get("compiled", "")

    return compiles


def test_long_runs_on_a_card_compile_their_blocks(compiles):
    because = "1,500 steps for 1 size on it saves time; --no-compile turns it off"
    assert compiles("--max_train_steps", "1500") == (True, f"the blocks: from {because}")
    # 16 clips in batches of 2, 8 steps an epoch
    assert compiles("--num_train_epochs", "188")[0] and not compiles("--num_train_epochs", "187")[0]
    assert compiles("--max_train_steps", "1499") == (False, "nothing: it saves time from 1,500 steps for 1 size on")
    validation = ("--validation_prompt", "a circle", "--max_num_frames", "25")
    assert compiles("--max_train_steps", "1500", *validation)[1].endswith("3,000 steps for 2 sizes on")


def test_what_was_typed_or_cannot_be_compiled_is_not_compiled_unasked(compiles, make_run, monkeypatch):
    long = ("--max_train_steps", "9999")
    assert compiles(*long, "--no-compile") == (False, "")
    assert compiles("--max_train_steps", "1", "--compile") == (True, "the blocks")
    checkpoints = ("--gradient_checkpointing", "--offload_checkpoints", "--checkpoint_scope")
    assert (
        compiles(*long, *checkpoints, "all-but-attention")[0] and not compiles(*long, *checkpoints, "feed-forward")[0]
    )
    assert not compiles(*long, "--attention_backend", "flash-attn-3", "--mixed_precision", "bf16")[0]
    assert compiles(*long)[0] and not compiles(*long, launch="ACCELERATE_USE_FSDP")[0]
    assert compiles(*long, launch="ACCELERATE_USE_CPU") == (False, "")
    plain = make_run("lora", *long)
    packed = replace(plain, settings=replace_flags(plain.settings, max_tokens_per_batch=9999))
    assert earns_to_compile(plain) and not earns_to_compile(packed)
    monkeypatch.setattr("models.compilation.has_triton", lambda: False)
    assert not compiles(*long)[0]


def resumable(folder: Path, memory: dict) -> str:
    """Write a checkpoint of a run for which these memory settings were chosen; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pytorch_lora_weights.safetensors").touch()
    (folder / STATE_FILE).write_text(json.dumps(asdict(TrainerState(5, 0, {}, memory))))
    write_manifest(folder)
    return str(folder)


def test_a_run_resumed_on_a_smaller_card_keeps_its_precisions(make_run, with_card, tmp_path):
    memory = asdict(MemorySettings("lora", quantize_base="int8"))
    run = make_run("lora", PREPARED, "--resume_from_checkpoint", resumable(tmp_path / "out/checkpoint-5", memory))
    with_card(80 * GB)
    assert asdict(memory_settings_of(fit_into_memory(run).settings)) == memory
    with_card(1 * GB)
    smaller = fit_into_memory(run).settings.memory
    assert smaller.gradient_checkpointing and (smaller.quantize_base, smaller.stream_blocks) == ("int8", False)


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
    memory = asdict(MemorySettings("lora", quantize_base="int8", gradient_checkpointing=True))
    for noted in (memory, {}):
        checkpoint = resumable(tmp_path / "out" / "checkpoint-5", noted)
        args = make_run("lora", "--memory_budget_gb", "80", "--resume_from_checkpoint", checkpoint).settings
        assert chosen_before(args) == (MemorySettings(**noted) if noted else None)
    # Without the flag, the settings are those of the other flags.
    assert chosen_before(replace_flags(args, memory_budget_gb=None)) is None


def test_facts_are_those_of_the_run(make_run):
    facts = run_facts(make_run("lora", "--validation_prompt", "a circle"))
    assert (facts.size, facts.batch_size, facts.sampled) == (Bucket(17, 64, 96), 2, Bucket(17, 64, 96))
    assert facts.adapters == "rank 8 on to_k to_out.0 to_q to_v"
    assert run_facts(make_run("sft")).adapters == ""


def test_advice_follows_the_ladder_and_each_line_takes_less(make_run):
    run = make_run("lora", PREPARED, "--mixed_precision", "bf16", "--train_batch_size", "4")
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
    _, *rungs, _ = training_memory_advice(make_run("lora", PREPARED, "--mixed_precision", "bf16", *flags))
    assert [line.split(":")[0] for line in rungs] == ["--offload_checkpoints"]


def test_advice_takes_the_memory_that_it_names(make_run):
    run = make_run("lora", PREPARED, "--mixed_precision", "bf16", "--train_batch_size", "1")
    flags, said = training_memory_advice(run)[-2].split(": ")
    run = make_run("lora", PREPARED, "--mixed_precision", "bf16", "--train_batch_size", "1", *flags.split())
    assert f"takes {said.split(',')[0]} " in training_memory_advice(run)[0]


@pytest.mark.parametrize("adapter", ["lokr", "loha"])
def test_the_memory_of_other_adapters_is_calculated(make_run, with_card, adapter):
    with_card(80 * GB)
    run = make_run("lora", PREPARED, "--adapter", adapter, "--memory_budget_gb", "80")
    assert choose_by_budget(run) == memory_settings_of(run.settings)
    assert not fit_into_memory(make_run("lora", PREPARED, "--adapter", adapter)).settings.memory.gradient_checkpointing


def test_what_is_calculated_is_what_the_flags_say(make_run):
    run = make_run("lora", "--compute_control", "canny", "--enable_tiling", task="control-to-video")
    assert workload_of(run) == Workload(Bucket(17, 64, 96), 2, "no", is_raw=True, tiling=True)
    assert run_facts(run).model == "4x4x32x32xNone control"
    assert workload_of(make_run("lora", PREPARED)) == Workload(Bucket(17, 64, 96), 2, "no")


def test_raw_clips_that_are_encoded_by_tiles_take_less(make_run):
    _, _, tiles, *_ = training_memory_advice(make_run("lora", "--mixed_precision", "bf16"))
    assert tiles.startswith("--enable_slicing --enable_tiling: ")
    with pytest.raises(UserError, match="encode raw clips with --enable_tiling"):
        choose_by_budget(make_run("lora", "--memory_budget_gb", "0.1"))
