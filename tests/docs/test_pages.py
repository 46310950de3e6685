"""Every page names what exists: links, files, flags, commands; and the Chinese pages are the English ones."""

import re
import shlex
import subprocess
from itertools import zip_longest

import pytest

from doc_pages import (
    PARSERS,
    broken_links,
    code_blocks,
    help_flags,
    link_targets,
    named_flags,
    outline,
    read_page,
    table_rows,
    without_code,
)
from repository import ROOT


PAGES = [
    str(path.relative_to(ROOT)) for folder in (".", "assets/docs") for path in sorted((ROOT / folder).glob("*.md"))
]
MODELS = [f"assets/models/{name}/README.md" for name in ("tiny-cogvideox", "tiny-cogvideox-i2v")]
PAIRS = [(name.replace("_zh.md", ".md"), name) for name in PAGES if name.endswith("_zh.md")]
OF_OTHER_PROGRAMS = {"--help", "--quiet", "--nodes", "--array", "--signal", "--prompt_file"}
# The first column of this page's tables is theirs; tests/docs/test_migrate.py reads the others.
OF_OTHER_TRAINERS = named_flags(" ".join(cells[0] for cells in table_rows(read_page("assets/docs/migrate.md"))))


def test_every_link_leads_somewhere():
    assert {page: links for page in PAGES + MODELS if (links := broken_links(ROOT / page))} == {}


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_exists(page):
    scripts = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "assets/scripts").glob("*.py"))
    known = OF_OTHER_PROGRAMS | named_flags(scripts).union(*map(help_flags, PARSERS))
    known |= OF_OTHER_TRAINERS if page.endswith("migrate.md") else set()
    assert named_flags(without_code(read_page(page))) <= known


@pytest.mark.parametrize("page", PAGES + MODELS)
def test_every_file_of_the_repository_exists(page):
    pattern = r"(?<![\w/.-])((?:training|tests|assets|benchmarks|accelerate_configs)/[\w./-]+\.(?:\w+))"
    assert [name for name in re.findall(pattern, read_page(page)) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_a_marker_of_a_test_or_is_a_target_of_make(page):
    tested = re.findall(r"<!-- \w+: [^>]+ -->\n```(?:bash|python)\n(.*?)```", read_page(page), flags=re.DOTALL)
    for line in [line for code in code_blocks(read_page(page)) if code not in tested for line in code.splitlines()]:
        make, target = shlex.split(line, comments=True)
        assert make == "make"
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


# The two languages


def without_comments(code: str) -> str:
    return re.sub(r"(^|\s+)# .*", "", code, flags=re.MULTILINE)


def numbers(cells: list[str]) -> list[list[str]]:
    """Return the numbers in each cell, sorted, because their order depends on the language."""
    return [sorted(re.findall(r"\d+(?:[.,]\d+)*", cell)) for cell in cells]


@pytest.fixture(params=PAIRS, ids=lambda pair: pair[0])
def languages(request) -> tuple[str, str]:
    return tuple(map(read_page, request.param))


def test_both_languages_have_the_same_code_sections_and_tables(languages):
    blocks = re.compile(r"(?:<!-- .*? -->\n)?```.*?```", flags=re.DOTALL)
    english, chinese = ([without_comments(code) for code in blocks.findall(page)] for page in languages)
    assert chinese == english
    english, chinese = map(outline, languages)
    assert chinese == english


def test_both_languages_have_the_same_numbers_in_every_row(languages):
    for english, chinese in zip_longest(*map(table_rows, languages)):
        assert numbers(chinese) == numbers(english), english


def test_both_languages_name_the_same_flags_and_link_to_the_same_files(languages):
    english, chinese = (named_flags(without_code(page)) for page in languages)
    assert chinese == english
    english, chinese = (
        sorted(re.sub(r"#.*", "", link).replace("_zh.md", ".md") for link in link_targets(page)) for page in languages
    )
    assert chinese == english
