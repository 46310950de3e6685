"""The page for contributors matches the repository: its packages, files, names and commands exist."""

import re
import shlex
from itertools import pairwise

import pytest

from pages import marked_blocks, read_page, without_code
from repository import ROOT, TRAINING


PAGE = read_page("assets/docs/contribute.md")
BLOCKS = marked_blocks(PAGE)


def test_every_room_of_the_house_is_in_the_tree():
    tree = PAGE.split("```\ntraining/\n")[1].split("```")[0]
    rooms = re.findall(r"^  (\w+)/ ", tree, flags=re.MULTILINE)
    assert sorted(rooms) == sorted(path.parent.name for path in TRAINING.glob("*/__init__.py"))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_tests_that_a_command_runs_exist(block, pytestconfig):
    words = shlex.split(BLOCKS[block])
    assert words[:4] == ["OMP_NUM_THREADS=1", ".venv/bin/python", "-m", "pytest"]
    assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))
    marks = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert {mark for flag, mark in pairwise(words) if flag == "-m"} - {"pytest"} <= marks


def test_every_file_that_the_page_names_exists():
    for name in re.findall(r"`([\w./-]+\.(?:py|sh|txt|md))`", without_code(PAGE)):
        assert any(
            (ROOT / folder / name).is_file()
            for folder in (".", "training", "assets/docs", "assets/scripts", "assets/models/tiny-cogvideox")
        ), name


def test_every_name_of_the_code_that_the_page_gives_is_in_the_module_beside_it():
    given = {
        "diffusion/tasks": (
            "pipeline_class",
            "with_images",
            "settings",
            "check_model",
            "prepare_model",
            "transformer_inputs",
        ),
        "methods/lora": ("Lora",),
        "methods/full": ("FullFinetune",),
        "flags/optimizer": ("OPTIMIZERS",),
        "optimizers/build": ("make_optimizer",),
        "run/spec": ("lasting_settings",),
        "models/configs": ("ModelConfigs",),
        "memory/settings": ("MemorySettings",),
        "data/rows": ("Table",),
    }
    for module, names in given.items():
        code = (TRAINING / f"{module}.py").read_text(encoding="utf-8")
        for name in names:
            assert f"`{name}`" in PAGE and re.search(rf"\b{name}\b", code), name
