"""Quoted values fit into messages."""

import pytest

from common.errors import described, one_line


def test_quoted_text_is_one_short_line_for_any_file():
    assert one_line(" A cat.\r\nOn a\tmat. ") == "A cat. On a mat."
    assert one_line("caf\udce9").encode() == b"caf\\udce9"
    assert one_line("abcdef", 6) == "abcdef"
    assert one_line("abcdefg", 6) == "abcde…"


@pytest.mark.parametrize(("value", "text"), [(5, "int 5"), (1.5, "float 1.5"), ([1], "list"), (b"x", "bytes")])
def test_values_of_the_wrong_type_are_described_by_it(value, text):
    assert described(value) == text
