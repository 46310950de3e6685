"""The packages keep their order, stay small and have names that clash with nothing."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from repository import TRAINING


# A package imports only from those before it.
ORDER = (
    "common",
    "pages",
    "parallel",
    "video",
    "cli",
    "flags",
    "data",
    "prepared",
    "planning",
    "footage",
    "checks",
    "optimizers",
    "captions",
    "models",
    "tracking",
    "methods",
    "checkpoints",
    "diffusion",
    "memory",
    "preparation",
    "validation",
    "results",
    "run",
    "studio",
)
COMMANDS = {
    "cogvideox_text_to_video_lora",
    "cogvideox_text_to_video_sft",
    "cogvideox_image_to_video_lora",
    "cogvideox_image_to_video_sft",
    "cogvideox_control_to_video_lora",
    "cogvideox_control_to_video_sft",
    "prepare_dataset",
    "caption_dataset",
    "score_clips",
    "make_first_frames",
    "split_scenes",
    "generate",
    "convert_lora",
    "app",
    "compare_runs",
}
PARTS = {"args", "dataset"}  # the two parts that all commands share
MOST_MODULES = 16
MODULES = sorted(TRAINING.rglob("*.py"))


def imported_modules(file: Path) -> set[str]:
    """The dotted names that a module imports anywhere in its code, those for annotations included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    return names


def test_every_package_has_its_place_in_the_order():
    assert sorted(folder.name for folder in TRAINING.iterdir() if (folder / "__init__.py").is_file()) == sorted(ORDER)
    assert {file.stem for file in TRAINING.glob("*.py")} == COMMANDS | PARTS


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_from_those_before_it(package):
    allowed = ORDER[: ORDER.index(package) + 1]
    for file in (TRAINING / package).glob("*.py"):
        tops = {name.split(".")[0] for name in imported_modules(file)}
        wrong = tops & {*ORDER, *COMMANDS}.difference(allowed)
        assert not wrong, f"{package}/{file.name} imports from {', '.join(sorted(wrong))}"


def test_no_module_imports_itself_through_others():
    names = {".".join(file.relative_to(TRAINING).with_suffix("").parts): file for file in MODULES}
    imports = {name: imported_modules(file) & names.keys() for name, file in names.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for imported in imports[name]:
                visit(imported, (*path, name))
            done.add(name)

    for name in names:
        visit(name, ())


@pytest.mark.parametrize("package", ORDER)
def test_a_package_says_what_belongs_in_it_and_is_not_crowded(package):
    folder = TRAINING / package
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert len(list(folder.glob("*.py"))) - 1 <= MOST_MODULES


@pytest.mark.parametrize("name", [*ORDER, *sorted(COMMANDS | PARTS)])
def test_a_name_on_top_is_nobody_elses(name):
    # The folder of a script comes first on sys.path: a name of Python's or of a library would be hidden from it.
    assert name not in {*sys.stdlib_module_names, "profiling"}  # the last one is new in Python 3.15
    elsewhere = [place for place in sys.path if Path(place).resolve() != TRAINING and Path(place).is_dir()]
    found = importlib.machinery.PathFinder.find_spec(name, [place for place in elsewhere if "site-packages" in place])
    assert found is None
