"""Choose memory settings that fit a GPU, from a ladder that goes from the fastest to the smallest.

The memory of a rung is measured if `benchmarks/memory.json` has such a row, otherwise calculated with a margin;
messages say which.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checks.memory import check_memory, check_optimizer
from checks.speed import check_speed
from common.errors import UserError
from common.units import in_bytes
from data.buckets import Bucket
from flags.settings import TrainingSettings
from memory.settings import GB, MemorySettings, describe_change, with_memory


# Beside training/ in the repository.
MEASURED_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.json"

_CONTEXT = 0.6 * GB  # of CUDA, and the work space of libraries, which torch does not report
_MARGIN = 1.5 * GB  # that torch reserves beyond what is allocated, whatever the size: simulated, not measured

# Checkpoints, from none to all, by the TFLOP that benchmarks/step_cost.py counts; copies to the host run beside them.
# Scope "feed-forward" is missing: it saves no more arithmetic than every second block does, and takes more memory.
_CHECKPOINTS: tuple[dict[str, Any], ...] = (
    {},
    *(
        {"gradient_checkpointing": True, "offload_checkpoints": offloads}
        | {"checkpoint_scope": scope, "checkpoint_every": every}
        for scope, every, offloads in (
            ("block", 4, False),
            ("block", 2, False),
            ("all-but-attention", 1, False),
            ("all-but-attention", 1, True),
            ("all-but-attention", 2, False),
            ("all-but-attention", 2, True),
            ("all-but-attention", 4, False),
            ("all-but-attention", 4, True),
            ("block", 1, False),
            ("block", 1, True),
        )
    ),
)
# Weights and states, from exact to least exact, each with all kinds of checkpoints; what a later one omits stays.
_LORA_WEIGHTS: tuple[dict[str, Any], ...] = (
    {},
    {"stream_blocks": True},
    {"quantize_base": "int8", "stream_blocks": False},
    {"quantize_base": "nf4"},
    {"quantize_base": "int8", "stream_blocks": True},
)
_SFT_WEIGHTS: tuple[dict[str, Any], ...] = (
    {},
    {"use_8bit": True, "use_torchao": True},
    {"weights_dtype": "bf16"},
    {"step_in_backward": True},  # gradients are no longer clipped
    {"use_8bit": False, "use_4bit": True},
    {"use_4bit": False, "use_8bit": True, "step_in_backward": False}
    | {"use_cpu_offload_optimizer": True, "offload_gradients": True},
)
# Flags that belong together: passing one of a group fixes all of it.
_GROUPS = (
    ("gradient_checkpointing", "checkpoint_scope", "checkpoint_every"),
    ("quantize_base", "stream_blocks"),
    ("use_8bit", "use_4bit", "use_fp8", "use_torchao"),
    ("use_cpu_offload_optimizer", "offload_gradients", "step_in_backward"),
)
CHECKPOINT_FLAGS = frozenset({*_GROUPS[0], "offload_checkpoints"})
_STATES = (*_GROUPS[2], *_GROUPS[3], "weights_dtype")
LASTING = frozenset({*_GROUPS[1], *_STATES})  # what a resumed run keeps: results and states depend on them


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run that memory depends on besides the settings."""

    model: str  # from `model_key`
    method: str
    size: Bucket  # of the largest batch's clips
    batch_size: float
    adapters: str  # from `adapter_key`; "" for full fine-tuning
    sampled: Bucket | None  # size of the validation videos; None without them
    mixed_precision: str  # no, fp16, bf16


@dataclass(frozen=True)
class MeasuredRow:
    """The memory that a run took on a GPU."""

    facts: RunFacts
    settings: MemorySettings
    training: int  # peak of reserved bytes
    validation: int
    device: str

    def serves(self, facts: RunFacts, settings: MemorySettings) -> bool:
        """Return whether a run takes the same memory as this one."""
        if facts.sampled is None:  # settings of the validation have no effect
            settings = replace(settings, enable_model_cpu_offload=self.settings.enable_model_cpu_offload)
            facts = replace(facts, sampled=self.facts.sampled)
        if {settings.optimizer, self.settings.optimizer} == {"adam", "adamw"}:  # both take the same memory
            settings = replace(settings, optimizer=self.settings.optimizer)
        return (facts, settings) == (self.facts, self.settings)


@dataclass(frozen=True)
class Choice:
    """A rung, and the memory that it takes."""

    settings: MemorySettings
    needed: int  # bytes of the card, those outside torch included
    is_measured: bool

    @property
    def how(self) -> str:
        """The origin of the number, in words."""
        return "measured on a GPU" if self.is_measured else "calculated, not measured"


def model_key(transformer: Mapping[str, Any]) -> str:
    """Return a name for the size of a transformer with this config, the same for all copies of a model."""
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size_t")
    return "x".join(str(transformer.get(name)) for name in names)


def adapter_key(rank: int, target_modules: Sequence[str], *, use_dora: bool = False) -> str:
    """Return a name for the size of a LoRA's adapters."""
    return f"rank {rank}{' DoRA' if use_dora else ''} on {' '.join(sorted(target_modules))}"


def ladder(
    settings: MemorySettings, given: Collection[str], is_usable: Callable[[MemorySettings], bool]
) -> list[MemorySettings]:
    """Return the rungs from the settings of the flags on: exact ones first, and of equally exact ones the fastest.

    The flags that the user typed, `given`, and their groups do not change; only usable combinations are rungs.
    """
    fixed = {name for group in _GROUPS if set(given) & set(group) for name in group} | set(given)
    if settings.optimizer not in ("adam", "adamw"):
        fixed |= {*_STATES}  # these work only with adam

    def changed(base: MemorySettings, changes: Mapping[str, Any]) -> MemorySettings:
        return replace(base, **{name: value for name, value in changes.items() if name not in fixed})

    rungs, base = [settings], settings
    for changes in _LORA_WEIGHTS if settings.method == "lora" else _SFT_WEIGHTS:
        weights = changed(base, changes)
        usable = [rung for one in _CHECKPOINTS if is_usable(rung := changed(weights, one))]
        if usable:
            base = weights
            rungs += usable
    return list(dict.fromkeys(rungs))


def usable_filter(run: TrainingSettings, *, mixed_precision: str, has_gpu: bool) -> Callable[[MemorySettings], bool]:
    """Return a function that tells whether memory settings pass the checks with all other flags and can run here.

    `mixed_precision` is no, fp16 or bf16; the flags may leave it to the launch configuration.
    """
    run = replace(run, training=replace(run.training, mixed_precision=mixed_precision))

    def is_usable(settings: MemorySettings) -> bool:
        changed = with_memory(run, settings)
        if not all(find_spec(package) for package in _packages(settings)):
            return False
        if not has_gpu and settings.use_cpu_offload_optimizer:
            return False
        try:
            check_optimizer(changed)
            check_memory(changed)
            check_speed(changed)
        except UserError:
            return False
        return True

    return is_usable


def _packages(settings: MemorySettings) -> list[str]:
    """Return the optional packages that settings need."""
    has_torchao_states = settings.use_torchao or settings.use_cpu_offload_optimizer
    uses = {
        "torchao": has_torchao_states or settings.quantize_base != "none",
        "bitsandbytes": settings.quantize_base == "nf4" or (settings.use_8bit and not settings.use_torchao),
    }
    return [package for package, is_used in uses.items() if is_used]


def next_rung(
    rungs: Sequence[MemorySettings], current: MemorySettings, calculate: Callable[[MemorySettings], int]
) -> MemorySettings | None:
    """Return the next rung for which `calculate` returns fewer bytes than for `current`; None after the last."""
    later = rungs[rungs.index(current) + 1 :]
    return next((rung for rung in later if calculate(rung) < calculate(current)), None)


def with_offloading(
    rungs: Sequence[MemorySettings], given: Collection[str], is_usable: Callable[[MemorySettings], bool]
) -> list[MemorySettings]:
    """Return each rung, and where possible with the transformer off the device while videos are decoded."""
    settings = []
    for rung in rungs:
        settings.append(rung)
        offloaded = replace(rung, enable_model_cpu_offload=True)
        moves = not rung.stream_blocks and rung.quantize_base == "none"
        if moves and "enable_model_cpu_offload" not in given and is_usable(offloaded):
            settings.append(offloaded)
    return settings


def choose(budget: float, rungs: Sequence[MemorySettings], needed: Callable[[MemorySettings], Choice]) -> Choice:
    """Return the first rung that fits into `budget` bytes, or the smallest one if none does."""
    choices = []
    for choice in map(needed, rungs):
        if choice.needed <= budget:
            return choice
        choices.append(choice)
    return min(choices, key=lambda choice: choice.needed)


def measure_or_calculate(
    settings: MemorySettings,
    facts: RunFacts,
    calculate: Callable[[MemorySettings], int],
    measured: Sequence[MeasuredRow],
) -> Choice:
    """Return the memory that settings take of a card, from a measured row if there is one, otherwise calculated."""
    for row in measured:
        if row.serves(facts, settings):
            reserved = max(row.training, row.validation if facts.sampled else 0)
            return Choice(settings, int(reserved + _CONTEXT), is_measured=True)
    return Choice(settings, int(calculate(settings) + _MARGIN + _CONTEXT), is_measured=False)


def describe_settings(choice: Choice, base: MemorySettings, budget_gb: float) -> str:
    """Describe the choice in a line for the log, as changes of the settings of the flags, `base`."""
    flags = describe_change(choice.settings, base) or "nothing to change"
    return f"--memory_budget_gb {budget_gb:g}: {flags}; takes {in_bytes(choice.needed, 1024)} ({choice.how})"


def read_measured(file: Path = MEASURED_FILE) -> list[MeasuredRow]:
    """Return the rows measured on a GPU; none without the file, which a copy of only training/ lacks."""
    if not file.is_file():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"].values()
    return [_read_row(row) for row in rows if "measured" in row and row["device"] != "cpu"]


def _read_row(row: Mapping[str, Any]) -> MeasuredRow:
    facts = dict(row["facts"])
    for name in ("size", "sampled"):
        facts[name] = Bucket(*facts[name]) if facts[name] else None
    measured = row["measured"]
    return MeasuredRow(
        RunFacts(**facts),
        MemorySettings(**row["settings"]),
        measured["training reserved"],
        measured.get("validation reserved", 0),  # not of rows without validation
        row["device"],
    )
