"""The ladder of memory settings, and which rung is chosen."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import pairwise

import pytest

from args import parse_args
from common.errors import UserError
from data.buckets import Bucket
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


SIZE = Bucket(49, 480, 720)
FACTS = RunFacts("42x48", "lora", SIZE, 1, "rank 64", SIZE, "bf16")


def anything(settings: MemorySettings) -> bool:
    return True


def rungs_of(method: str = "lora", given: set[str] = frozenset(), **settings) -> list[MemorySettings]:
    return ladder(MemorySettings(method, **settings), given, anything)


RUNGS = rungs_of()
# Every rung takes 10 GB less than the one before, from 100; settings of the validation change nothing.
SIZES = {rung: (100 - 10 * number) * GB for number, rung in enumerate(RUNGS)}


def calculated(settings: MemorySettings) -> int:
    return SIZES[replace(settings, enable_model_cpu_offload=False)]


def choose_rung(budget_gb: float, calculate=calculated, facts=FACTS, measured=(), given=()) -> Choice:
    rungs = with_offloading(RUNGS, given, anything) if facts.sampled else RUNGS
    return choose(budget_gb, rungs, lambda settings: measure_or_calculate(settings, facts, calculate, measured))


def steps(rungs: list[MemorySettings]) -> list[str]:
    return [" ".join(differing_flags(rung, before)) for before, rung in pairwise(rungs)]


@pytest.fixture
def parse(tiny_models, tmp_path) -> Callable:
    """A function that parses the flags of a run with a method."""
    needed = ["--pretrained_model_name_or_path", str(tiny_models("2b")), "--data_root", str(tmp_path)]
    needed += ["--output_dir", str(tmp_path / "out")]
    return lambda method, *flags: parse_args([*needed, *flags], task="text-to-video", method=method)


def test_the_ladder_of_a_lora_ends_with_streamed_blocks():
    assert steps(rungs_of()) == [
        "--gradient_checkpointing --checkpoint_every 4",
        "--checkpoint_every 2",
        "--checkpoint_every 1",
        "--offload_checkpoints",
        "--quantize_base int8",
        "--quantize_base nf4",
        "--quantize_base int8 --stream_blocks",
    ]


def test_the_ladder_of_full_fine_tuning_ends_with_the_optimizer_on_the_host():
    rungs = rungs_of("sft")
    assert steps(rungs)[3:7] == [
        "--use_8bit --use_torchao",
        "--offload_checkpoints",
        "--weights_dtype bf16",
        "--step_in_backward",
    ]
    assert rungs[-1].use_cpu_offload_optimizer and not rungs[-1].step_in_backward


def test_flags_that_the_user_passed_are_kept():
    rungs = rungs_of(given={"gradient_checkpointing", "quantize_base"}, gradient_checkpointing=True)
    assert steps(rungs) == ["--offload_checkpoints"]
    rungs = rungs_of("sft", {"use_4bit"}, use_4bit=True, use_torchao=True)
    assert all(rung.use_4bit and not rung.use_8bit for rung in rungs)
    assert rungs[-1].use_cpu_offload_optimizer


def test_an_optimizer_without_low_bits_keeps_its_states():
    assert steps(rungs_of("sft", {"optimizer"}, optimizer="came"))[-1] == "--offload_checkpoints"


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
    choice = choose_rung(81, facts=replace(FACTS, sampled=None))
    # 80 GB with the margin are too much, 70 are not.
    assert choice.settings == RUNGS[3] and not choice.is_measured
    assert 70 * GB < choice.needed < 81 * GB
    assert describe_settings(choice, RUNGS[0], 81) == (
        "--memory_budget_gb 81: --gradient_checkpointing; takes 72.10 GB (calculated, not measured)"
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
    with pytest.raises(UserError):
        choose_rung(16, calculate, given={"enable_model_cpu_offload"})


def test_the_smallest_settings_are_named_if_nothing_fits():
    with pytest.raises(UserError, match="--memory_budget_gb 6: nothing fits") as error:
        choose_rung(6)
    message = str(error.value)
    assert "--stream_blocks, which takes 32.10 GB (calculated, not measured)" in message and "\n" not in message


def test_the_next_rung_takes_less_memory():
    sizes = dict(zip(RUNGS, (90, 80, 85, 70, 60, 50, 40, 30), strict=True))
    assert next_rung(RUNGS, RUNGS[1], sizes.__getitem__) == RUNGS[3]  # RUNGS[2] would take more
    assert next_rung(RUNGS, RUNGS[-1], sizes.__getitem__) is None


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
