"""The Dockerfile installs what `make install` does, in a layer that changes of the code leave alone."""

import re
import shlex
import subprocess

import pytest

from doc_pages import marked_blocks, noted_calls, read_page
from repository import ROOT


LINES = [
    shlex.split(line)
    for line in re.sub(r"^#.*\n|\\\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).splitlines()
    if line
]
COPIED = [[word for word in line[1:-1] if word[:2] != "--"] for line in LINES if line[0] == "COPY"]
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]


def number_of(*words: str) -> int:
    """Return the number of the only line with these words in a row."""
    (number,) = (number for number, line in enumerate(LINES) if " ".join(words) in " ".join(line))
    return number


def test_every_copied_file_exists():
    assert [name for names in COPIED for name in names if not (ROOT / name).exists()] == []


def test_it_installs_by_make_from_the_files_that_make_install_depends_on():
    makefile = (ROOT / "Makefile").read_text()
    (needed,) = re.findall(r"^\$\(INSTALLED\): (.*)", makefile, flags=re.MULTILINE)
    assert [set(names) for names in COPIED] == [{"Makefile", *needed.split()}, {"."}]
    assert number_of("COPY", "Makefile") < number_of("make install") < number_of("COPY", "--chown=trainer", ".")
    assert "VENV=/opt/venv" in LINES[number_of("ENV")]
    printed = subprocess.run(
        ["make", "--dry-run", "install", "VENV=none"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert len(re.findall(r"-c constraints\.txt -r requirements-dev\.txt", printed)) == 2  # with uv, and without


def test_the_container_is_no_root_and_has_no_secret():
    assert LINES[-1] == ["USER", "trainer"]
    settings = [word.partition("=")[0] for line in LINES if line[0] in ("ARG", "ENV") for word in line[1:]]
    assert settings == ["BASE", "VENV", "PATH", "UID"]


def test_only_the_repository_is_sent_to_the_builder():
    """Everything is ignored but the files of git, so that clips, results and tokens never get into an image."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    tracked = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert IGNORED[0] == "*"
    sent = {path.name for line in IGNORED if line[0] == "!" for path in ROOT.glob(line[1:])}
    assert sent == {name for name in tracked if name[0] != "." and name != "Dockerfile"}
    assert [line for line in IGNORED[1:] if line[0] != "!"] == ["**/__pycache__"]


def test_the_commands_of_the_page_fit_the_image(tmp_path):
    """They name the folder, the user's number and a script of the image."""
    programs = {"docker": '#!/usr/bin/env bash\nprintf "%q " "$@" >> "$CALLS"\necho >> "$CALLS"\n'}
    build, *runs = noted_calls(
        marked_blocks(read_page("assets/docs/training.md"))["docker"], tmp_path, programs, HOME=str(tmp_path)
    )
    argument = build[build.index("--build-arg") + 1].partition("=")[0]
    assert ["ARG", "UID=1000"] in LINES and argument == "UID"
    workdir = LINES[number_of("WORKDIR")][1]
    for call in runs:
        image = call.index(build[build.index("--tag") + 1])
        mounted = [call[at + 1].split(":")[1] for at, word in enumerate(call) if word == "-v"]
        assert any(folder.startswith(f"{workdir}/") for folder in mounted)
        assert "/home/trainer/.cache/huggingface" in mounted
        assert call[image + 1 :][0] in ("make", "bash")
