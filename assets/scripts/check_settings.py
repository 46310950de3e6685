"""Report environment variables that look like a setting of a launcher but are none, each with what was meant.

    PYTHONPATH=training python3 assets/scripts/check_settings.py train_text_to_video_lora.sh

The settings are the launcher's own lines `NAME="${NAME:-default}"`. What the other launchers have is not reported, so
that a shell can hold the settings of all of them.
"""

import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

from flags.settings import PreparationSettings, TrainingSettings


# What other trainers call our settings.
ELSEWHERE = {"BATCH_SIZE": "TRAIN_BATCH_SIZE", "LR": "LEARNING_RATES"}
ELSEWHERE |= dict.fromkeys(("EPOCHS", "NUM_EPOCHS", "NUM_TRAIN_EPOCHS", "STEPS", "MAX_STEPS"), "MAX_TRAIN_STEPS")
# Names of flags that may be meant for another program.
GENERAL = {"CACHE_DIR", "COMPILE", "CONFIG", "HUB_TOKEN", "LOGGING_DIR", "NCCL_TIMEOUT", "PROFILE", "REVISION"}
GENERAL |= {"VARIANT"}


def find_mistakes(launcher: Path, environment: Mapping[str, str]) -> list[str]:
    """Return a message for each variable of the environment that looks like a setting of a launcher but is none."""
    settings = settings_of(launcher)
    of_all = sorted({name for other in launcher.parent.glob("*.sh") for name in settings_of(other)})
    flags = flags_of(PreparationSettings if launcher.name.startswith("prepare") else TrainingSettings)
    is_rank = "WORLD_SIZE" in environment  # RANK is then that of a process
    messages = []
    for name in sorted(name for name, value in environment.items() if value and name not in settings):
        is_flag = name.lower() in flags and name not in GENERAL and not (name == "RANK" and is_rank)
        meant = ELSEWHERE.get(name)
        if meant not in settings:
            meant = name if name in of_all else nearest_setting(name, of_all, is_flag=is_flag)
        if meant in settings:
            advice = f"rename it to {meant}"
        elif is_flag and not meant:
            advice = f"pass the flag --{name.lower()} after the launcher's name"
        else:
            continue
        messages.append(f"{name} is set, but is not a setting of {launcher.name}; {advice}, or unset it")
    return messages


def nearest_setting(name: str, settings: Collection[str], *, is_flag: bool) -> str | None:
    """Return the setting that ends with a name, or that it misspells; one word may also be another program's."""
    endings = [setting for setting in settings if setting.endswith(f"_{name}")] if is_flag or "_" in name else []
    misspelt = settings if len(name) > 4 else []
    close = get_close_matches(name, endings, 1, 0) or get_close_matches(name, misspelt, 1, 0.88)
    return close[0] if close else None


def settings_of(launcher: Path) -> list[str]:
    """Return the names of a launcher's settings."""
    return re.findall(r"^([A-Z][A-Z0-9_]+)=", launcher.read_text(encoding="utf-8"), flags=re.MULTILINE)


def flags_of(settings: type) -> set[str]:
    """Return the names of a script's flags, the other spellings too."""
    groups = [item.type for item in fields(settings) if "title" in item.metadata]
    flags = [item for group in groups for item in fields(group) if "help" in item.metadata]
    return {name for item in flags for name in (item.name, item.metadata["alias"]) if name}


if __name__ == "__main__":
    mistakes = find_mistakes(Path(sys.argv[1]), os.environ)
    for message in mistakes:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2 if mistakes else 0)
