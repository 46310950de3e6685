"""Parts of Markdown pages (code, headings, tables, flags, links), and the scripts that their commands start."""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from functools import cache, partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

from args import (
    METHODS,
    TASKS,
    parse_app_args,
    parse_args,
    parse_caption_args,
    parse_compare_args,
    parse_convert_args,
    parse_first_frame_args,
    parse_generate_args,
    parse_prepare_args,
    parse_score_args,
    parse_split_args,
)
from cli.schema import flag_values
from repository import ROOT


TRAINING_SCRIPTS = {
    f"cogvideox_{task.replace('-', '_')}_{method}.py": partial(parse_args, task=task, method=method)
    for task in TASKS
    for method in METHODS
}
PARSERS = TRAINING_SCRIPTS | {
    "prepare_dataset.py": parse_prepare_args,
    "make_first_frames.py": parse_first_frame_args,
    "caption_dataset.py": parse_caption_args,
    "score_clips.py": parse_score_args,
    "generate.py": parse_generate_args,
    "split_scenes.py": parse_split_args,
    "convert_lora.py": parse_convert_args,
    "app.py": parse_app_args,
    "compare_runs.py": parse_compare_args,
}
MARKED_BLOCK = r"<!-- tested: ([\w ]+) -->\n```(?:bash|python)\n(.*?)```"
# Programs that start our scripts note their arguments; those that need a network or a package index do nothing.
NOTE_ARGUMENTS = '#!/usr/bin/env bash\nprintf "%q " "$@" >> "$CALLS"\necho >> "$CALLS"\n'
PROGRAMS = dict.fromkeys(("accelerate", "python", "torchrun"), NOTE_ARGUMENTS)
PROGRAMS |= dict.fromkeys(("make", "hf", "vllm"), "#!/bin/sh\n")


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```(?:bash|python)\n(.*?)```", page, flags=re.DOTALL)


def marked_blocks(page: str) -> dict[str, str]:
    return dict(re.findall(MARKED_BLOCK, page, flags=re.DOTALL))


def without_code(page: str) -> str:
    return re.sub(r"```.*?```", "", page, flags=re.DOTALL)


def outline(page: str) -> list[str]:
    lines = without_code(page).splitlines()
    return [line.split(" ")[0] if line[0] == "#" else line for line in lines if re.match(r"#|\|-", line)]


def table_rows(page: str) -> list[list[str]]:
    lines = [line for line in without_code(page).splitlines() if re.match(r"\|[^-]", line)]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def named_flags(text: str) -> set[str]:
    """Return the flags of our scripts in a text; those of other programs have hyphens."""
    return set(re.findall(r"(?<![\w-])--[a-z_]\w*(?![\w-])", text))


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def link_targets(page: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page))


def broken_links(file: Path) -> list[str]:
    """Return a page's links to missing files and headings; those to the web are not followed."""
    broken = []
    for link in link_targets(file.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        target = file.parent / path if path else file
        if link.startswith("https://"):
            continue
        if not target.exists() or (heading and heading not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def noted_calls(
    code: str, folder: Path, programs: Mapping[str, str] = PROGRAMS, **environment: str
) -> list[list[str]]:
    """Run shell code in a folder with the repository's files, and return the arguments of each script it would start.

    Programs, text by name, are used instead of the installed ones.
    """
    bin_folder, calls = folder / "programs", folder / "calls"
    bin_folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    for path in (*ROOT.glob("*.sh"), *(ROOT / name for name in ("accelerate_configs", "assets", "training", "tests"))):
        with suppress(FileExistsError):
            (folder / path.name).symlink_to(path)
    environment |= {"PATH": os.pathsep.join([str(bin_folder), os.environ["PATH"]]), "CALLS": str(calls)}
    subprocess.run(["bash", "-euc", code], cwd=folder, check=True, env=os.environ | environment, capture_output=True)
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return [shlex.split(line) for line in lines]


def value_of(call: list[str], option: str) -> str:
    return call[call.index(option) + 1]


def script_of(call: list[str]) -> str:
    return next(Path(word).name for word in call if word.endswith(".py"))


def script_flags(call: list[str]) -> list[str]:
    return call[next(index for index, word in enumerate(call) if word.endswith(".py")) + 1 :]


def flags_of(call: list[str]) -> SimpleNamespace:
    """Return the flags of the script in a call by name, as it parses them, and its `settings`."""
    settings = PARSERS[script_of(call)](script_flags(call))
    return SimpleNamespace(**flag_values(settings), settings=settings)


@cache
def help_flags(script: str) -> frozenset[str]:
    with redirect_stdout(StringIO()) as help_text, suppress(SystemExit):
        PARSERS[script](["--help"])
    return frozenset(named_flags(" ".join(re.findall(r"^  (?=-).*", help_text.getvalue(), flags=re.MULTILINE))))
