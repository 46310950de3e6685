"""Quoted values fit into messages, and Ctrl-C ends in one."""

import os
import signal

import pytest

from common.errors import described, one_line, one_line_errors


def test_quoted_text_is_one_short_line_for_any_file():
    assert one_line(" A cat.\r\nOn a\tmat. ") == "A cat. On a mat."
    assert one_line("caf\udce9").encode() == b"caf\\udce9"
    assert one_line("abcdef", 6) == "abcdef"
    assert one_line("abcdefg", 6) == "abcde…"


@pytest.mark.parametrize(("value", "text"), [(5, "int 5"), (1.5, "float 1.5"), ([1], "list"), (b"x", "bytes")])
def test_values_of_the_wrong_type_are_described_by_it(value, text):
    assert described(value) == text


@pytest.mark.parametrize("launched", [False, True])
def test_ctrl_c_ends_in_a_line_that_says_how_to_continue(monkeypatch, capsys, launched):
    before = signal.getsignal(signal.SIGINT)
    if launched:  # by a launcher that ignores it
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit, match="130"), one_line_errors("run it again"):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\ninterrupted; run it again\n"
