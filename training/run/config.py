"""Write the flags of a run as a file into its folder, from which the run can be repeated."""

import logging
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from args import flag_names
from cli.schema import flag_values
from common.files import atomic_write, remove_partials
from common.hub_token import without_tokens
from common.ranks import precision_of
from common.run_folder import CONFIG_FILE, CONFIG_TITLE
from data.buckets import Bucket
from flags.settings import TrainingSettings, training_script
from memory.settings import MemorySettings, differences, memory_settings_of
from methods.lora import Lora
from results.model_card import CardFacts
from results.run_record import read_flags
from run.spec import RunSpec
from video.frames import UNCUT


logger = logging.getLogger(__name__)

RECORDED_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
RECORDED_PACKAGES += ("torchao", "bitsandbytes", "deepspeed")

_CHOOSERS = ("memory_budget_gb", "auto_fit")  # replaced by the flags that they chose
_NEVER_REPEATED = (*_CHOOSERS, "hub_token", "push_to_hub", "hub_model_id", "dry_run")


def write_config(spec: RunSpec) -> Path | None:
    """Write the flags of a run into its folder; called on the main process, before it trains.

    `config.yaml` has the flags that the run began with. If it is resumed with others, `config-step-<N>.yaml` has the
    flags after step N. Files that killed runs left unfinished in the folder are removed. Returns the file, or None if
    the latest one has the same flags.
    """
    settings, folder = spec.settings, spec.output_dir
    remove_partials(folder)
    continues = spec.resumed is not None and spec.resumed.resolve().parent == folder.resolve()
    repeated, others = split_flags(settings, spec.state.seed)
    if continues:
        others["resume_from_checkpoint"] = repeated.pop("resume_from_checkpoint")
    text = render_config(repeated, others, _describe_start(spec, continues))
    file = folder / (f"config-step-{spec.state.step}.yaml" if continues else CONFIG_FILE)
    before = _latest_config(folder) if continues else None
    if before is not None:
        old, new = read_flags(before), yaml.safe_load(text)
        if old is None:
            logger.warning("warning: %s is not a list of flags any more; they are noted in %s", before, file.name)
        else:
            changed = [f"--{name}" for name in old | new if old.get(name) != new.get(name)]
            if not changed:
                return None
            logger.info("other flags than before: %s; noted in %s", ", ".join(changed), file.name)
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file


def split_flags(settings: TrainingSettings, seed: int) -> tuple[dict[str, object], dict[str, object]]:
    """Return the flags that repeat a run, and the values of all others.

    The first are the flags that were passed, those chosen to fit into memory, the seed, and the precision, which the
    launcher may have set. Prepared data adds how its clips were cut and controls computed, for `generate.py`. The
    others have their defaults: passing them too could contradict the first.
    """
    chosen = differences(memory_settings_of(settings), MemorySettings(settings.method))
    names, flags = flag_names(settings.task, settings.method), flag_values(settings).items()
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in flags if name in names}
    values |= {
        "seed": seed,
        "mixed_precision": precision_of(settings.training.mixed_precision),
        "validation_images": settings.validation.validation_prompt_separator.join(settings.validation.images),
        "validation_controls": settings.validation.validation_prompt_separator.join(settings.validation.controls),
    }
    values = {name: value for name, value in values.items() if name in names}
    given = {*settings.given, *chosen, "seed", "mixed_precision"}.difference(_NEVER_REPEATED)
    if settings.prepared.load_tensors:
        made_with = asdict(UNCUT) | {"compute_control": None}  # defaults
        given |= {name for name, default in made_with.items() if values.get(name, default) != default}
    return (
        {name: value for name, value in values.items() if name in given},
        {name: value for name, value in values.items() if name not in given and name != "hub_token"},
    )


def render_config(repeated: dict[str, object], others: dict[str, object], title: Sequence[str]) -> str:
    """Return the text of the file, with the title and the other flags as comments, without tokens."""
    lines = [f"# {line}" for line in title]
    lines += ["", _dump(repeated), "# Not given: defaults, and what follows from the above."]
    lines += [f"# {line}" for line in _dump(others).splitlines()]
    return without_tokens("\n".join(lines) + "\n")


def _dump(flags: dict[str, object]) -> str:
    return yaml.safe_dump(flags, sort_keys=False, allow_unicode=True, width=float("inf"))


def _describe_start(spec: RunSpec, continues: bool) -> list[str]:
    script, accelerator = training_script(spec.task.name, spec.settings.method), spec.accelerator
    resumed = f" --resume_from_checkpoint {spec.resumed}" if continues else ""  # otherwise it is among the flags
    return [
        f"{CONFIG_TITLE} on {datetime.now():%Y-%m-%d, %H:%M}, at step {spec.state.step}. To repeat it:",
        f"  {script} --config THIS_FILE --output_dir ANOTHER_FOLDER{resumed}",
        f"launched on {accelerator.num_processes} x {accelerator.device.type} "
        f"({accelerator.distributed_type.value}), Python {platform.python_version()},",
        ", ".join(f"{package} {found}" for package, found in recorded_versions().items()),
    ]


def recorded_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on, without those that are not installed."""
    found = {}
    for package in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _latest_config(folder: Path) -> Path | None:
    found = ((re.fullmatch(r"config-step-(\d+)\.yaml", path.name), path) for path in folder.iterdir())
    later = [(int(match.group(1)), path) for match, path in found if match]
    first = folder / CONFIG_FILE
    return max(later)[1] if later else first if first.is_file() else None


def card_facts(spec: RunSpec, total_steps: int) -> CardFacts:
    """Return the facts of a finished run for its model card."""
    settings, clips = spec.settings, spec.settings.clips
    repeated, _ = split_flags(settings, spec.state.seed)
    return CardFacts(
        base_model=settings.model.pretrained_model_name_or_path,
        task=spec.task.name,
        adapter=spec.method.title if isinstance(spec.method, Lora) else None,
        usage=spec.usage,
        settings=repeated,
        prompts=settings.validation.prompts,
        size=Bucket(clips.max_num_frames, clips.height, clips.width),
        fps=spec.video_fps,
        last_step=total_steps,
    )
