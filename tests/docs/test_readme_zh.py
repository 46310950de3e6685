"""The Chinese README is the English one: the same commands, sections, tables, figures, flags and links."""

import re
from itertools import zip_longest

from pages import (
    broken_links,
    code_blocks,
    link_targets,
    marked_blocks,
    named_flags,
    outline,
    table_rows,
    without_code,
)
from repository import ROOT


ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))


def without_comments(code: str) -> str:
    return re.sub(r"(^|\s+)# .*", "", code, flags=re.MULTILINE)


def numbers(cells: list[str]) -> list[list[str]]:
    """Those in each cell, in any order, as languages differ in it."""
    return [sorted(re.findall(r"\d+(?:[.,]\d+)*", cell)) for cell in cells]


def test_the_commands_are_the_same_but_for_comments():
    assert list(map(without_comments, code_blocks(CHINESE))) == list(map(without_comments, code_blocks(ENGLISH)))
    assert list(marked_blocks(CHINESE)) == list(marked_blocks(ENGLISH))


def test_sections_and_tables_are_the_same():
    assert outline(CHINESE) == outline(ENGLISH)


def test_every_row_of_a_table_has_the_same_figures():
    for english, chinese in zip_longest(table_rows(ENGLISH), table_rows(CHINESE)):
        assert numbers(chinese) == numbers(english), english


def test_flags_and_links_are_the_same():
    assert named_flags(without_code(CHINESE)) == named_flags(without_code(ENGLISH))
    files = [
        [re.sub(r"#.*", "", link).replace("_zh.md", ".md") for link in link_targets(page)]
        for page in (ENGLISH, CHINESE)
    ]
    assert files[0] == files[1]
    assert broken_links(ROOT / "README_zh.md") == []
