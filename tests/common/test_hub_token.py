"""No output contains a token, wherever the token came from."""

import argparse
import json
import logging
import sys

import pytest

from args import parse_args
from common.errors import UserError, one_line_errors
from common.hub_token import HubToken, without_tokens
from common.logs import log_without_tokens


TOKEN = "hf_" + "Secret0" * 5


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def test_a_token_in_the_flags_is_shown_as_hidden():
    args = argparse.Namespace(hub_token=HubToken(TOKEN))
    assert args.hub_token.value == TOKEN
    shown = [str(args), repr(vars(args)), f"{args.hub_token}", json.dumps(vars(args), default=str)]
    assert not any(TOKEN in text for text in shown)
    assert all("(hidden)" in text for text in shown)


def test_a_token_is_removed_from_the_command_line(monkeypatch):
    words = ["train.py", "--hub_token", TOKEN, f"--hub_token={TOKEN}", "--rank", "4"]
    monkeypatch.setattr(sys, "argv", words)
    HubToken(TOKEN)
    assert sys.argv == ["train.py", "--hub_token", "(hidden)", "--hub_token=(hidden)", "--rank", "4"]


def test_tokens_of_the_environment_and_the_login_are_hidden(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "environment-token")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text("login-token\n")
    assert without_tokens("environment-token or login-token") == "(hidden) or (hidden)"
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").write_text("third-token")
    assert without_tokens("login-token or third-token") == "login-token or (hidden)"


def test_only_text_that_looks_like_a_token_is_hidden(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a")  # too short
    assert without_tokens("Bearer hf_abcdefghijklmnopqrst.") == "Bearer (hidden)."
    assert without_tokens("a hf_transfer and hf_hub_download") == "a hf_transfer and hf_hub_download"


def test_neither_messages_nor_tracebacks_in_the_log_have_a_token(capfd):
    log_without_tokens(logging.INFO)
    HubToken("a-token-of-no-known-form")
    logging.getLogger("anything").info("asked with %s", TOKEN)
    try:
        raise ConnectionError("refused a-token-of-no-known-form")
    except ConnectionError:
        logging.getLogger("anything").exception("failed")
    err = capfd.readouterr().err
    assert "asked with (hidden)" in err
    assert "ConnectionError: refused (hidden)" in err
    assert TOKEN not in err


def test_neither_errors_of_the_user_nor_of_the_program_show_a_token(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise UserError(f"--hub_token: {TOKEN} is refused")
    assert (stopped.value.code, capsys.readouterr().err) == (2, "error: --hub_token: (hidden) is refused\n")
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise RuntimeError(f"sent {TOKEN}")
    err = capsys.readouterr().err
    assert stopped.value.code == 1
    assert err.startswith("Traceback")
    assert err.endswith("RuntimeError: sent (hidden)\n")


def test_an_error_without_a_token_is_unchanged():
    with pytest.raises(RuntimeError, match="a bug"), one_line_errors():
        raise RuntimeError("a bug")


@pytest.mark.parametrize("flags", [["--hub_token", TOKEN], [TOKEN], ["--hub_token", TOKEN, "--rank", "x"]])
def test_errors_in_the_flags_do_not_show_the_token(flags, capsys):
    argv = ["--pretrained_model_name_or_path", "org/name", "--data_root", ".", *flags]
    with pytest.raises(SystemExit):
        parse_args(argv, task="text-to-video", method="lora")
    assert TOKEN not in capsys.readouterr().err
