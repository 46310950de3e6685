"""The page for contributors says what is there: its modules, files and commands exist."""

import re
import shlex
import subprocess
from itertools import pairwise

import pytest

from pages import broken_links, code_blocks, marked_blocks, without_code
from repository import ROOT, TRAINING


FILE = ROOT / "assets" / "docs" / "contribute.md"
PAGE = FILE.read_text(encoding="utf-8")
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


def test_every_other_command_is_a_target_of_make():
    others = [line for code in code_blocks(PAGE) if code not in BLOCKS.values() for line in code.splitlines()]
    for line in others:
        command = shlex.split(line, comments=True)
        assert command[0] == "make" and len(command) == 2
        subprocess.run(["make", "--dry-run", command[1]], cwd=ROOT, check=True, capture_output=True)


def test_every_file_and_heading_that_the_page_names_exists():
    for name in re.findall(r"`([\w./-]+\.(?:py|sh|txt|md))`", without_code(PAGE)):
        assert any(
            (ROOT / folder / name).is_file()
            for folder in (".", "training", "assets/docs", "assets/scripts", "assets/models/tiny-cogvideox")
        ), name
    assert broken_links(FILE) == []


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
