"""Requests to a real S3 server that is slow, cut, busy or empty, and to a web server."""

import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common import stores
from common.errors import UserError
from common.hub_token import without_tokens
from common.stores import check_url, fetch, file_state, list_files, read_start, remove, send
from object_store import SECRETS


def get(url: str, file: Path, most: int = 10**9) -> bytes:
    fetch(url, file, file_state(url), most)
    return file.read_bytes()


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    return str(raised.value)


def test_files_are_listed_fetched_sent_and_removed(bucket, tmp_path):
    bucket.put("clips/a.mp4", b"first")
    bucket.put("clips/deep/b.mp4", b"second one")
    bucket.put("clips/folder/", b"")
    bucket.put("other/c.mp4", b"")
    listed = dict(list_files(f"{bucket.url}/clips"))
    assert {name: state.size for name, state in listed.items()} == {"a.mp4": 5, "deep/b.mp4": 10}
    assert listed["a.mp4"] == file_state(f"{bucket.url}/clips/a.mp4")
    assert get(f"{bucket.url}/clips/a.mp4", tmp_path / "a") == b"first"
    assert read_start(f"{bucket.url}/clips/deep/b.mp4", 6) == b"second"
    send(tmp_path / "a", f"{bucket.url}/out/x.bin")
    assert bucket.get("out/x.bin") == b"first"
    remove(f"{bucket.url}/out/x.bin")
    remove(f"{bucket.url}/out/x.bin")
    assert len(bucket.listing()) == 4


def test_a_changed_file_has_another_version(bucket):
    bucket.put("a.txt", b"one")
    before = file_state(f"{bucket.url}/a.txt")
    bucket.put("a.txt", b"two")
    assert file_state(f"{bucket.url}/a.txt") != before


def test_what_does_not_exist_is_missing(bucket, tmp_path):
    assert file_state(f"{bucket.url}/no.mp4") is None
    assert list(list_files(f"{bucket.url}/no")) == []
    with pytest.raises(FileNotFoundError, match=r"no\.mp4"):
        read_start(f"{bucket.url}/no.mp4")


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_failed_transfer_is_repeated_and_mentioned_once(bucket, tmp_path, caplog, fault):
    content = bytes(range(256)) * 4000
    for name in ("a.mp4", "b.mp4"):
        bucket.put(name, content)
        bucket.store.faults[name] = [fault] * 2
    for name in ("a.mp4", "b.mp4"):
        assert get(f"{bucket.url}/{name}", tmp_path / "x") == content
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) <= 1  # s3fs continues a cut transfer by itself
    if fault == "503":
        assert warnings[0].startswith(f"warning: {bucket.url}/a.mp4 cannot be fetched (")
        assert warnings[0].endswith("trying again, from now on silently")


def test_a_store_that_stays_busy_ends_in_one_message(bucket, tmp_path):
    bucket.put("a.mp4", b"first")
    bucket.store.faults["a.mp4"] = ["503"] * 99
    message = error_of(get, f"{bucket.url}/a.mp4", tmp_path / "a")
    assert message.startswith(f"{bucket.url}/a.mp4 cannot be fetched after 4 tries (")
    assert message.endswith("check the store and the connection, then run again: finished work is kept")


def test_a_slow_transfer_has_a_time_limit(bucket, tmp_path, monkeypatch):
    bucket.put("a.mp4", bytes(2**22))
    bucket.store.faults["a.mp4"] = ["slow"] * 99
    monkeypatch.setattr(stores, "PAUSES", ())
    monkeypatch.setattr(stores, "FILE_SECONDS", 0.2)
    assert "(not complete within 0.2 s)" in error_of(get, f"{bucket.url}/a.mp4", tmp_path / "a")


def test_a_store_that_refuses_is_asked_once(bucket, monkeypatch):
    monkeypatch.setattr(stores, "PAUSES", (9999.0,))
    monkeypatch.setattr(stores, "_file_system", refuse)
    message = error_of(file_state, f"{bucket.url}/a.mp4")
    assert message.startswith(f"{bucket.url}/a.mp4 cannot be found (Forbidden); check the name, and the credentials")


def refuse(url: str) -> None:
    raise PermissionError("Forbidden")


def test_no_secret_is_in_logs_or_messages(bucket, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    bucket.put("a.mp4", b"first")
    bucket.store.faults["a.mp4"] = ["503"] * 99
    text = error_of(get, f"{bucket.url}/a.mp4", tmp_path / "a") + error_of(
        check_url, "--data_root", f"s3://{SECRETS[0]}:{SECRETS[1].replace('/', '')}@bucket/clips"
    )
    text += error_of(check_url, "--data_root", f"https://host.example/clips?X-Amz-Signature={SECRETS[1]}")
    ours = "".join(record.getMessage() for record in caplog.records if record.name.startswith("common"))
    assert SECRETS[1] not in without_tokens(f"a library prints {SECRETS[1]}")
    assert not any(secret in text + ours for secret in (*SECRETS, SECRETS[1].replace("/", "")))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/clips", "--data_root: ftp:// is not a supported store; use hf://, s3://, gs://, az://, http"),
        ("s3://key:word@bucket/clips", "--data_root: s3://bucket/clips was passed with a password or signature"),
        ("s3://bucket/../clips", "--data_root: s3://bucket/../clips does not name a folder or file of a store"),
        ("gs://bucket/clips", "--data_root: gs:// needs the package gcsfs, which is missing: pip install gcsfs"),
    ],
)
def test_urls_are_checked_before_any_request(url, message, monkeypatch):
    monkeypatch.setattr(stores.importlib.util, "find_spec", lambda name: None if name == "gcsfs" else name)
    assert error_of(check_url, "--data_root", url).startswith(message)


def test_web_servers_are_only_read(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a b.mp4").write_bytes(b"first")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/clips"
    try:
        assert [name for name, _ in list_files(url)] == ["a%20b.mp4"]
        assert get(f"{url}/a%20b.mp4", tmp_path / "x") == get(f"{url}/a b.mp4", tmp_path / "x") == b"first"
        assert file_state(f"{url}/no.mp4") is None
    finally:
        server.shutdown()
        server.server_close()
    assert "web servers are only read" in error_of(send, tmp_path / "x", f"{url}/x")
    assert "http://host/out can only be read" in error_of(check_url, "--output_dir", "http://host/out", writable=True)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def test_a_web_server_that_is_down_is_not_a_missing_file(monkeypatch):
    monkeypatch.setattr(stores, "PAUSES", ())
    assert "cannot be found after 1 tries" in error_of(file_state, "http://127.0.0.1:9/a.mp4")
