"""Variables that look like a setting of a launcher are found; those of others are not touched."""

import pytest

from check_settings import find_mistakes, settings_of
from repository import ROOT


LAUNCHERS = {path.name: path for path in sorted(ROOT.glob("*.sh"))}
LORA, SFT, PREPARE = "train_text_to_video_lora.sh", "train_text_to_video_sft.sh", "prepare_dataset.sh"


@pytest.mark.parametrize(
    ("launcher", "name", "advice"),
    [
        (LORA, "LEARNING_RATE", "rename it to LEARNING_RATES"),
        (LORA, "BATCH_SIZE", "rename it to TRAIN_BATCH_SIZE"),
        (LORA, "EPOCHS", "rename it to MAX_TRAIN_STEPS"),
        (LORA, "RANK", "rename it to LORA_RANK"),
        (LORA, "MAX_TRAIN_STEP", "rename it to MAX_TRAIN_STEPS"),
        (LORA, "LORA_RNAK", "rename it to LORA_RANK"),
        (LORA, "FPS", "pass the flag --fps after the launcher's name"),
        (SFT, "WARMUP_STEPS", "rename it to LR_WARMUP_STEPS"),
        (PREPARE, "ID_TOKEN", "pass the flag --id_token after the launcher's name"),
        (PREPARE, "TARGET_FPS", "pass the flag --target_fps after the launcher's name"),
    ],
)
def test_a_variable_that_looks_like_a_setting_is_named_with_what_was_meant(launcher, name, advice):
    (message,) = find_mistakes(LAUNCHERS[launcher], {name: "8", "HOME": "/", "PATH": "/bin"})
    assert message == f"{name} is set, but is not a setting of {launcher}; {advice}, or unset it"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_settings_of_all_launchers_and_of_other_programs_may_be_set_together(launcher):
    of_all = {name for path in LAUNCHERS.values() for name in settings_of(path)} - {"BATCH_SIZE"}
    others = "PATH HOME PROMPT TYPE DATA_FILE MODEL NAME REVISION CACHE_DIR NCCL_TIMEOUT OMP_NUM_THREADS MASTER_PORT"
    ranks = {"RANK": "1", "WORLD_SIZE": "2"}  # of a process
    assert find_mistakes(LAUNCHERS[launcher], dict.fromkeys((*of_all, *others.split()), "1") | ranks) == []


def test_an_empty_variable_is_not_set():
    assert find_mistakes(LAUNCHERS[LORA], {"RANK": "", "LEARNING_RATE": ""}) == []


def test_settings_of_the_same_name_are_in_all_launchers():
    shared = {
        "MODEL_PATH",
        "CLIPS",
        "PREPARED",
        "DATASET_FILE",
        "CAPTION_COLUMN",
        "VIDEO_COLUMN",
        "GPU_IDS",
        "NUM_GPUS",
    }
    assert all(shared <= set(settings_of(path)) for path in LAUNCHERS.values())
