"""The ladder of memory settings, and which rung is chosen."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import pairwise

import pytest

from args import parse_args
from data.buckets import Bucket
from make_full_size_model import full_size_configs
from memory.accounting import account
from memory.facts import Workload, model_facts
from memory.ladder import (
    MEASURED_FILE,
    Choice,
    MeasuredRow,
    RunFacts,
    adapter_key,
    choose,
    describe_settings,
    ladder,
    measure_or_calculate,
    model_key,
    next_rung,
    read_measured,
    usable_filter,
    with_offloading,
)
from memory.settings import GB, MemorySettings, differing_flags, memory_settings_of, with_memory
from methods.lora import Lora
from tracking.flops import count_flops


SIZE = Bucket(49, 480, 720)
FACTS = RunFacts("42x48", "lora", SIZE, 1, "rank 64", SIZE, "bf16")


def anything(settings: MemorySettings) -> bool:
    return True


def rungs_of(method: str = "lora", given: set[str] = frozenset(), **settings) -> list[MemorySettings]:
    return ladder(MemorySettings(method, **settings), given, anything)


RUNGS = rungs_of()
# Every rung takes 1 GB less than the one before, from 100; settings of the validation change nothing.
SIZES = {rung: (100 - number) * GB for number, rung in enumerate(RUNGS)}


def calculated(settings: MemorySettings) -> int:
    return SIZES[replace(settings, enable_model_cpu_offload=False)]


def choose_rung(budget_gb: float, calculate=calculated, facts=FACTS, measured=(), given=()) -> Choice:
    rungs = with_offloading(RUNGS, given, anything) if facts.sampled else RUNGS
    return choose(budget_gb * GB, rungs, lambda settings: measure_or_calculate(settings, facts, calculate, measured))


def steps(rungs: list[MemorySettings]) -> list[str]:
    return [" ".join(differing_flags(rung, before)) for before, rung in pairwise(rungs)]


@pytest.fixture
def parse(tiny_models, tmp_path) -> Callable:
    """A function that parses the flags of a run with a method."""
    needed = ["--pretrained_model_name_or_path", str(tiny_models("2b")), "--data_root", str(tmp_path)]
    needed += ["--output_dir", str(tmp_path / "out")]
    return lambda method, *flags: parse_args([*needed, *flags], task="text-to-video", method=method)


def test_the_ladder_recomputes_more_and_more_before_weights_become_less_exact():
    expected = [
        "--gradient_checkpointing --checkpoint_every 4",
        "--gradient_checkpointing --checkpoint_every 2",
        "--gradient_checkpointing --checkpoint_scope all-but-attention",
        "--gradient_checkpointing --checkpoint_scope all-but-attention --offload_checkpoints",
        "--gradient_checkpointing --checkpoint_scope all-but-attention --checkpoint_every 2",
        "--gradient_checkpointing --checkpoint_scope all-but-attention --checkpoint_every 2 --offload_checkpoints",
        "--gradient_checkpointing --checkpoint_scope all-but-attention --checkpoint_every 4",
        "--gradient_checkpointing --checkpoint_scope all-but-attention --checkpoint_every 4 --offload_checkpoints",
        "--gradient_checkpointing",
        "--gradient_checkpointing --offload_checkpoints",
    ]
    rungs = rungs_of()
    assert [" ".join(differing_flags(rung, rungs[0])) for rung in rungs[1:11]] == expected
    weights = list(dict.fromkeys((rung.quantize_base, rung.stream_blocks) for rung in rungs))
    assert weights == [("none", False), ("none", True), ("int8", False), ("nf4", False), ("int8", True)]


def test_the_ladder_of_full_fine_tuning_ends_with_the_optimizer_on_the_host():
    rungs = rungs_of("sft")
    changes = [step for step in steps(rungs) if "checkpoint_every 4" not in step and "--use" in step]
    assert changes[0].endswith("--use_8bit --use_torchao") and "use_cpu_offload_optimizer" in changes[-1]
    assert rungs[-1].use_cpu_offload_optimizer and not rungs[-1].step_in_backward


OF_ATTENTION = "--gradient_checkpointing --checkpoint_scope all-but-attention"
CHOSEN = {  # GB of a card, GB of them that are free -> flags, TFLOP of a step
    (16, 15.2): (f"{OF_ATTENTION} --stream_blocks", 1030),
    (24, 23.2): (f"{OF_ATTENTION} --offload_checkpoints", 1030),
    (40, 38.9): (OF_ATTENTION, 1030),
    (80, 78.6): ("", 915),
}


@pytest.mark.parametrize(("card", "expected"), CHOSEN.items())
def test_the_settings_of_a_5b_lora_at_full_size_for_a_card(card, expected, parse):
    (_, free_gb), (flags, tflop) = card, expected
    configs, workload = full_size_configs("5b"), Workload(SIZE, 1, sampled=SIZE)
    facts = model_facts(configs, Lora(64, 64))
    is_usable = usable_filter(parse("lora"), mixed_precision="bf16", has_gpu=True)
    rungs = with_offloading(ladder(MemorySettings("lora"), (), is_usable), (), is_usable)
    choice = choose(
        free_gb * GB,
        rungs,
        lambda settings: measure_or_calculate(settings, FACTS, lambda one: account(facts, one, workload).peak, ()),
    )
    assert " ".join(differing_flags(choice.settings, rungs[0])) == flags
    scope = choice.settings.checkpoint_scope if flags else None
    tokens = facts.count_tokens(SIZE)
    counted = count_flops(configs.transformer, tokens, trains_all=False, checkpoint_scope=scope, recomputes_last=False)
    assert 1e-12 * counted == pytest.approx(tflop, rel=0.02)  # benchmarks/step_cost.py counts adapters too


def test_flags_that_the_user_passed_are_kept():
    rungs = rungs_of(given={"gradient_checkpointing", "quantize_base"}, gradient_checkpointing=True)
    assert steps(rungs) == ["--offload_checkpoints"]
    rungs = rungs_of("sft", {"use_4bit"}, use_4bit=True, use_torchao=True)
    assert all(rung.use_4bit and not rung.use_8bit for rung in rungs)
    assert rungs[-1].use_cpu_offload_optimizer


def test_an_optimizer_without_low_bits_keeps_its_states():
    (state,) = {(rung.use_8bit, rung.weights_dtype) for rung in rungs_of("sft", {"optimizer"}, optimizer="came")}
    assert state == (False, "fp32")


def test_refused_combinations_are_omitted(parse):
    args = parse("sft", "--gradient_accumulation_steps", "2", "--optimizer", "adamw")

    def rungs_where(mixed_precision: str, *, has_gpu: bool) -> list[MemorySettings]:
        is_usable = usable_filter(args, mixed_precision=mixed_precision, has_gpu=has_gpu)
        return ladder(memory_settings_of(args), {"optimizer"}, is_usable)

    # Gradients that accumulate cannot be freed during the backward pass.
    in_bf16 = rungs_where("bf16", has_gpu=True)
    assert not any(rung.step_in_backward or rung.offload_gradients for rung in in_bf16)
    assert any(rung.weights_dtype == "bf16" for rung in in_bf16)
    assert not any(rung.weights_dtype == "bf16" for rung in rungs_where("no", has_gpu=True))


def test_settings_that_need_a_gpu_are_omitted_without_one(parse):
    args = parse("sft")
    for has_gpu in (True, False):
        is_usable = usable_filter(args, mixed_precision="bf16", has_gpu=has_gpu)
        rungs = ladder(memory_settings_of(args), set(), is_usable)
        is_offloaded = any("--use_cpu_offload_optimizer" in step for step in steps(rungs))
        assert is_offloaded == (has_gpu and bool(find_spec("torchao")))


def test_adam_and_adamw_take_the_same():
    row = MeasuredRow(FACTS, MemorySettings("lora", optimizer="adamw"), training=1, validation=1, device="a card")
    assert row.serves(FACTS, MemorySettings("lora", optimizer="adam"))
    assert not row.serves(FACTS, MemorySettings("lora", optimizer="came"))


def test_settings_go_to_flags_and_back(parse):
    args = parse("lora")
    settings = memory_settings_of(args)
    assert settings == MemorySettings("lora")
    rung = RUNGS[-1]
    assert memory_settings_of(with_memory(args, rung)) == rung
    assert memory_settings_of(parse("lora", *differing_flags(rung, settings))) == rung
    assert not args.memory.gradient_checkpointing


def test_the_fastest_rung_that_fits_is_chosen():
    choice = choose_rung(100, facts=replace(FACTS, sampled=None))
    # 98 GB with the margin are too much, 97 are not.
    assert choice.settings == RUNGS[3] and not choice.is_measured
    assert describe_settings(choice, RUNGS[0], 100) == (
        f"--memory_budget_gb 100: {OF_ATTENTION}; takes 99.10 GB (calculated, not measured)"
    )


def test_a_measured_row_overrides_the_calculation():
    row = MeasuredRow(FACTS, RUNGS[1], 30 * GB, 40 * GB, "NVIDIA H200")
    choice = choose_rung(41, measured=[row])
    assert (choice.settings, choice.is_measured) == (RUNGS[1], True)
    assert "measured on a GPU" in describe_settings(choice, RUNGS[0], 41)
    # Without validation, its peak does not matter.
    choice = choose_rung(31, facts=replace(FACTS, sampled=None), measured=[row])
    assert choice.settings == RUNGS[1]


@pytest.mark.parametrize("other", [{"batch_size": 2}, {"adapters": "rank 8"}, {"size": Bucket(81, 480, 720)}])
def test_a_row_of_another_run_is_not_used(other):
    row = MeasuredRow(replace(FACTS, **other), RUNGS[0], GB, GB, "NVIDIA H200")
    assert not measure_or_calculate(RUNGS[0], FACTS, calculated, [row]).is_measured


def test_the_transformer_leaves_the_device_if_validation_is_the_peak():
    def calculate(settings: MemorySettings) -> int:
        return 10 * GB if settings.enable_model_cpu_offload else 20 * GB

    assert choose_rung(16, calculate).settings == replace(RUNGS[0], enable_model_cpu_offload=True)
    assert choose_rung(16, calculate, given={"enable_model_cpu_offload"}).needed > 16 * GB


def test_the_smallest_settings_are_chosen_if_nothing_fits():
    assert choose_rung(6).settings == RUNGS[-1]


def test_the_next_rung_takes_less_memory():
    rungs = RUNGS[:4]
    sizes = dict(zip(rungs, (90, 80, 85, 70), strict=True))
    assert next_rung(rungs, rungs[1], sizes.__getitem__) == rungs[3]  # the one between would take more
    assert next_rung(rungs, rungs[-1], sizes.__getitem__) is None


def test_measured_rows_are_read_from_the_committed_file(tmp_path):
    rows = read_measured()
    assert MEASURED_FILE.is_file() and all(row.device != "cpu" for row in rows)
    settings = MemorySettings("lora", gradient_checkpointing=True)
    row = {
        "facts": asdict(FACTS) | {"size": list(SIZE), "sampled": list(SIZE)},
        "settings": asdict(settings),
        "measured": {"training reserved": 20 * GB, "validation reserved": 25 * GB},
        "device": "NVIDIA H200",
    }
    failed = {name: value for name, value in row.items() if name != "measured"} | {"failed": "out of memory"}
    file = tmp_path / "memory.json"
    unsampled = row | {"facts": row["facts"] | {"sampled": None}, "measured": {"training reserved": 20 * GB}}
    file.write_text(json.dumps({"rows": {"a": row, "b": failed, "c": row | {"device": "cpu"}, "d": unsampled}}))
    assert read_measured(file) == [
        MeasuredRow(FACTS, settings, 20 * GB, 25 * GB, "NVIDIA H200"),
        MeasuredRow(replace(FACTS, sampled=None), settings, 20 * GB, 0, "NVIDIA H200"),
    ]
    assert read_measured(tmp_path / "none.json") == []


def test_models_and_adapters_are_named_by_their_size():
    config = {"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64, "in_channels": 16}
    assert model_key(config) == model_key(config | {"patch_size_t": None, "_name_or_path": "somewhere"})
    assert model_key(config) != model_key(config | {"in_channels": 32})
    assert adapter_key(64, ["to_q", "to_k"]) == adapter_key(64, ("to_k", "to_q")) == "rank 64 on to_k to_q"


def test_flags_that_are_switched_off_are_named():
    before, after = MemorySettings("sft", use_4bit=True), MemorySettings("sft", use_8bit=True)
    assert differing_flags(after, before) == ["--use_8bit", "(no --use_4bit)"]
    assert re.fullmatch(r".*\(no --use_4bit\).*", describe_settings(Choice(after, GB, False), before, 2))
