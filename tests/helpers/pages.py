"""What pages of Markdown consist of, code, headings, tables, flags and links, and what their commands call."""

import os
import re
import shlex
import subprocess
from contextlib import redirect_stdout, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

from args import METHODS, TASKS, parse_args, parse_caption_args, parse_generate_args, parse_prepare_args
from flags.schema import flag_values
from repository import ROOT


NOTE_ARGUMENTS = '#!/usr/bin/env bash\nprintf "%q " "$@" >> "$CALLS"\necho >> "$CALLS"\n'


def code_blocks(page: str) -> list[str]:
    """The commands and programs of a page."""
    return re.findall(r"```(?:bash|python)\n(.*?)```", page, flags=re.DOTALL)


def marked_blocks(page: str) -> dict[str, str]:
    """The code blocks that a marker `<!-- tested: name -->` gives a name."""
    return dict(re.findall(r"<!-- tested: ([\w ]+) -->\n```(?:bash|python)\n(.*?)```", page, flags=re.DOTALL))


def without_code(page: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", page, flags=re.DOTALL)


def outline(page: str) -> list[str]:
    """The levels of headings and the shapes of tables, in their order."""
    lines = without_code(page).splitlines()
    return [line.split(" ")[0] if line[0] == "#" else line for line in lines if re.match(r"#|\|-", line)]


def table_rows(page: str) -> list[list[str]]:
    """The cells of all rows of all tables, titles included."""
    lines = [line for line in without_code(page).splitlines() if re.match(r"\|[^-]", line)]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def named_flags(page: str) -> set[str]:
    """The flags of our scripts that a page names; other programs' have hyphens."""
    return set(re.findall(r"(?<![\w-])--[a-z_]\w*(?![\w-])", page))


def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def link_targets(page: str) -> list[str]:
    """Where a page's links lead."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page))


def broken_links(file: Path) -> list[str]:
    """The links of a page to files and headings that are not there; those to the web are not followed."""
    broken = []
    for link in link_targets(file.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        target = file.parent / path if path else file
        if link.startswith("https://"):
            continue
        if not target.exists() or (heading and heading not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def noted_calls(code: str, folder: Path) -> list[list[str]]:
    """The arguments of each Python script or launch that a page's shell code starts in a folder; none really runs."""
    programs, calls = folder / "programs", folder / "calls"
    programs.mkdir(exist_ok=True)
    for name in ("accelerate", "python"):
        (programs / name).write_text(NOTE_ARGUMENTS)
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": os.pathsep.join([str(programs), os.environ["PATH"]]), "CALLS": str(calls)}
    code = re.sub(r"\bbash (?=\w+\.sh)", f"bash {shlex.quote(str(ROOT))}/", code)
    subprocess.run(["bash", "-euc", code], cwd=folder, check=True, env=environment, capture_output=True)
    lines = calls.read_text().splitlines()
    calls.unlink()
    return [shlex.split(line) for line in lines]


def script_of(call: list[str]) -> str:
    """The name of the script in a call."""
    return next(Path(word).name for word in call if word.endswith(".py"))


def flags_of(call: list[str]) -> SimpleNamespace:
    """The flags of the script in a call, as it reads them."""
    script = script_of(call)
    flags = call[next(index for index, word in enumerate(call) if word.endswith(script)) + 1 :]
    if parse := PARSERS.get(script):
        return _by_name(parse(flags))
    task, method = re.fullmatch(r"cogvideox_(text|image)_to_video_(lora|sft)\.py", script).groups()
    return _by_name(parse_args(flags, task=f"{task}-to-video", method=method))


def _by_name(settings) -> SimpleNamespace:
    """The flags of all groups, and what follows from them."""
    return SimpleNamespace(**flag_values(settings), settings=settings)


def known_flags() -> set[str]:
    """All flags of all scripts, by their help."""
    trainings = [partial(parse_args, task=task, method=method) for task in TASKS for method in METHODS]
    flags = {"--help"}
    for parse in (*PARSERS.values(), *trainings):
        with redirect_stdout(StringIO()) as help_text, suppress(SystemExit):
            parse(["--help"])
        flags |= named_flags(" ".join(re.findall(r"^  (?=-).*", help_text.getvalue(), flags=re.MULTILINE)))
    return flags


PARSERS = {
    "prepare_dataset.py": parse_prepare_args,
    "caption_dataset.py": parse_caption_args,
    "generate.py": parse_generate_args,
}
