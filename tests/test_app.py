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


def test_a_port_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        app.main(["--port", "65536", "--root", "none"])
    assert "--port: 65536 is too large; pass a whole number up to 65535" in capsys.readouterr().err
