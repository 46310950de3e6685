"""app.py says in one line what is missing."""

import sys

import pytest

import app


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as caught:
        app.main(["--root", str(tmp_path)])
    said = capsys.readouterr().err
    assert (caught.value.code, said.count("\n")) == (2, 1)
    assert "pip install -r requirements-app.txt" in said


def test_a_root_that_is_none_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        app.main(["--root", str(tmp_path / "none")])
    assert "--root: no folder" in capsys.readouterr().err
