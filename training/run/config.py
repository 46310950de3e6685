"""The configuration that a run has in effect, as a file in its folder from which the run can be repeated."""

import logging
import platform
import re
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from args import flag_names
from common.files import atomic_write, remove_partials
from common.hub_token import without_tokens
from common.ranks import precision_of
from common.run_folder import CONFIG_FILE, CONFIG_TITLE
from data.buckets import Bucket
from flags.schema import flag_values
from flags.settings import TrainingSettings
from memory.settings import MemorySettings, differences, memory_settings_of
from methods.lora import Lora
from results.model_card import CardFacts
from run.spec import RunSpec


logger = logging.getLogger(__name__)

RECORDED_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "torchao",
    "bitsandbytes",
    "deepspeed",
)

_CHOOSERS = ("memory_budget_gb", "auto_fit")  # what they chose is written in their place
_NEVER_REPEATED = (*_CHOOSERS, "hub_token", "push_to_hub", "hub_model_id", "dry_run")


def write_config(spec: RunSpec) -> Path | None:
    """Write the flags that a run has in effect into its folder; called on the main process, before it trains.

    `config.yaml` is what the run began with. When it is resumed with other flags, `config-step-<N>.yaml` beside it is
    what it went on with after step N. What killed runs left half written in the folder is removed.

    Returns:
        The file; None where what is there already says the same.

    Raises:
        UserError: it cannot be written.
    """
    settings, folder = spec.settings, spec.output_dir
    remove_partials(folder)
    goes_on = spec.resumed is not None and spec.resumed.resolve().parent == folder.resolve()
    repeated, others = split_flags(settings, flag_names(spec.task.name, settings.method), spec.state.seed)
    if goes_on:
        others["resume_from_checkpoint"] = repeated.pop("resume_from_checkpoint")
    text = render_config(repeated, others, _describe_start(spec, goes_on))
    file = folder / (f"config-step-{spec.state.step}.yaml" if goes_on else CONFIG_FILE)
    before = _latest_config(folder) if goes_on else None
    if before is not None:
        old, new = _read_flags(before), yaml.safe_load(text)
        if old is None:
            logger.warning("warning: %s is no list of flags any more; they are noted in %s", before, file.name)
        else:
            changed = [f"--{name}" for name in old | new if old.get(name) != new.get(name)]
            if not changed:
                return None
            logger.info("other flags than before: %s; noted in %s", ", ".join(changed), file.name)
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file


def split_flags(
    settings: TrainingSettings, names: Sequence[str], seed: int
) -> tuple[dict[str, object], dict[str, object]]:
    """The flags with which a run can be repeated, and the values of all others.

    Args:
        settings: checked flags, with the settings of memory that were chosen, if any were.
        names: of the script's flags.
        seed: given or drawn.

    Returns:
        What was given, what was chosen or drawn in its place, and the precision that the launcher may have said. To
        give what was not given could contradict it: those come second, with the values that they have by default.
    """
    chosen = differences(memory_settings_of(settings), MemorySettings(settings.method))
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flag_values(settings).items()
        if name in names
    }
    values |= {
        "seed": seed,
        "mixed_precision": precision_of(settings.training.mixed_precision),
        "validation_images": settings.validation.validation_prompt_separator.join(settings.validation.images),
    }
    given = {*settings.given, *chosen, "seed", "mixed_precision"}.difference(_NEVER_REPEATED)
    return (
        {name: value for name, value in values.items() if name in given},
        {name: value for name, value in values.items() if name not in given and name != "hub_token"},
    )


def render_config(repeated: dict[str, object], others: dict[str, object], title: Sequence[str]) -> str:
    """The file's text: a title and the other flags in comments, no tokens."""
    lines = [f"# {line}" for line in title]
    lines += ["", _dump(repeated), "# Not given: defaults, and what follows from the above."]
    lines += [f"# {line}" for line in _dump(others).splitlines()]
    return without_tokens("\n".join(lines) + "\n")


def _dump(flags: dict[str, object]) -> str:
    return yaml.safe_dump(flags, sort_keys=False, allow_unicode=True, width=float("inf"))


def _describe_start(spec: RunSpec, goes_on: bool) -> list[str]:
    """What the flags do not say, for whoever repeats the run."""
    script = f"cogvideox_{spec.task.name.replace('-', '_')}_{spec.settings.method}.py"
    accelerator = spec.accelerator
    resumed = f" --resume_from_checkpoint {spec.resumed}" if goes_on else ""  # else it is among the flags
    return [
        f"{CONFIG_TITLE} on {datetime.now():%Y-%m-%d, %H:%M}, at step {spec.state.step}. To repeat it:",
        f"  {script} --config THIS_FILE --output_dir ANOTHER_FOLDER{resumed}",
        f"launched on {accelerator.num_processes} x {accelerator.device.type} "
        f"({accelerator.distributed_type.value}), Python {platform.python_version()},",
        ", ".join(f"{package} {found}" for package in RECORDED_PACKAGES if (found := _version_of(package))),
    ]


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _latest_config(folder: Path) -> Path | None:
    """What the run went on with last, or began with."""
    later = [(int(step), path) for path in folder.glob("config-step-*.yaml") if (step := _step_of(path))]
    first = folder / CONFIG_FILE
    return max(later)[1] if later else first if first.is_file() else None


def _read_flags(file: Path) -> dict[str, object] | None:
    """What a run has written, unless somebody has made something else of it since."""
    try:
        flags = yaml.safe_load(file.read_bytes())
    except (OSError, yaml.YAMLError):
        return None
    return flags if isinstance(flags, dict) else None


def _step_of(path: Path) -> str | None:
    match = re.fullmatch(r"config-step-(\d+)\.yaml", path.name)
    return match and match.group(1)


def card_facts(spec: RunSpec, total_steps: int) -> CardFacts:
    """What the card of a finished run says."""
    settings = spec.settings
    repeated, _ = split_flags(settings, flag_names(spec.task.name, settings.method), spec.state.seed)
    return CardFacts(
        base_model=settings.model.pretrained_model_name_or_path,
        task=spec.task.name,
        is_lora=isinstance(spec.method, Lora),
        usage=spec.usage,
        settings=repeated,
        prompts=settings.validation.prompts,
        size=Bucket(settings.clips.max_num_frames, settings.clips.height, settings.clips.width),
        fps=spec.video_fps,
        last_step=total_steps,
    )
