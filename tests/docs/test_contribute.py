"""The page for contributors matches the repository: its packages, files, names and commands exist."""

import re
import shlex
from itertools import pairwise

import pytest

from doc_pages import marked_blocks, read_page, without_code
from repository import ROOT, TRAINING


PAGE = read_page("assets/docs/contribute.md")
BLOCKS = marked_blocks(PAGE)


def test_the_tree_has_every_package_in_the_order_of_imports():
    tree = PAGE.split("```\ntraining/\n")[1].split("```")[0]
    order = (ROOT / "tests/test_packages.py").read_text(encoding="utf-8").split("ORDER = (")[1].split(")")[0]
    assert re.findall(r"^  (\w+)/ ", tree, flags=re.MULTILINE) == re.findall(r'"(\w+)"', order)


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


def test_every_name_of_the_code_is_in_the_module_beside_it():
    given = re.findall(r"`(\w+)` (?:in |of |\()`([\w/]+\.py)`", PAGE)
    assert len(given) > 10
    task = re.search(r"`diffusion/task.py` lists: (.*?)\. ", PAGE).group(1)
    given += [(name, "diffusion/task.py") for name in re.findall(r"`(\w+)`", task)]
    for name, module in given:
        (file,) = (path for path in (ROOT / module, TRAINING / module) if path.is_file())
        assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), (name, module)
