"""The gate lets only the app's page and its user through, and sends only files that are meant to be shown."""

import os

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from common.errors import UserError
from studio import gate
from studio.gate import Gate, file_response, is_loopback


TOKEN = "correct horse battery"


def client_of(token=None, *, root=None, is_local=True, host="localhost:7860"):
    routes = [Route("/", lambda request: PlainTextResponse("page"))]
    routes += [Route("/file/{path:path}", lambda request: file_response(root, request.path_params["path"]))]
    app = Gate(Starlette(routes=routes), token, is_local=is_local)
    return TestClient(app, base_url=f"http://{host}", follow_redirects=False)


@pytest.mark.parametrize(
    ("host", "origin", "code"),
    [
        ("localhost:7860", None, 200),
        ("127.0.0.1:7860", "http://127.0.0.1:7860", 200),
        ("[::1]:7860", None, 200),
        ("evil.example:7860", None, 403),  # a name of a page that leads to this machine
        ("localhost:7860", "http://evil.example", 403),
        ("localhost:7860", "http://localhost:8000", 403),
        ("localhost:7860", "null", 403),  # a page in a sandbox
        ("localhost:7860", "http://[", 403),
    ],
)
def test_without_a_token_only_the_page_of_this_machine_is_answered(host, origin, code):
    answer = client_of(host=host).get("/", headers={"Origin": origin} if origin else {})
    assert answer.status_code == code
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")


@pytest.mark.parametrize("is_local", [True, False])
def test_a_malformed_host_is_refused(is_local):
    client = client_of(None if is_local else TOKEN, is_local=is_local)
    assert client.get("/", headers={"Host": "["}).status_code == 403


def test_the_token_opens_the_page_once_it_is_typed(monkeypatch):
    compared = []
    compare = gate.hmac.compare_digest
    monkeypatch.setattr(gate.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    client = client_of(TOKEN, is_local=False, host="10.0.0.5:7860")
    refused = client.get("/")
    assert (refused.status_code, "page" in refused.text.split("</style>")[1]) == (401, False)
    assert client.get("/file/a.png").status_code == 401
    for wrong in ("wrong", "", "é" * 9, TOKEN[:-1]):
        assert client.post("/login", data={"token": wrong}).status_code == 401
    assert client.post("/login", content=b"token=" + b"x" * 10_000).status_code == 413
    assert client.get("/", headers={"Cookie": f"cogvideox_app={TOKEN}"}).status_code == 401
    opened = client.post("/login", data={"token": TOKEN})
    assert (opened.status_code, opened.headers["location"]) == (303, "./")
    cookie = opened.headers["set-cookie"]
    assert {"httponly", "samesite=strict"} <= {part.strip().lower() for part in cookie.split(";")}
    assert TOKEN not in cookie
    assert client.get("/").text == "page"
    assert compared[0] == (b"wrong", TOKEN.encode())
    restarted = client_of(TOKEN, is_local=False)
    restarted.cookies = client.cookies
    assert restarted.get("/").status_code == 401


def test_files_are_sent_without_the_right_to_run_or_load_anything(tmp_path):
    (tmp_path / "root/.hidden").mkdir(parents=True)
    for file in ("root/a b.html", "root/a.txt", "root/.hidden/a.png", "out.png"):
        (tmp_path / file).write_text("<script>")
    (tmp_path / "root/link.png").symlink_to(tmp_path / "out.png")
    client = client_of(root=tmp_path / "root")
    answer = client.get("/file/a%20b.html")
    assert (answer.status_code, answer.text) == (200, "<script>")
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    inside = ("a.txt", ".hidden/a.png", "none.png", "a%00.png", "")
    for path in (*inside, "link.png", "%2e%2e/out.png", f"{tmp_path}/out.png"):
        assert client.get(f"/file/{path}").status_code == 404, path


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_addresses_of_this_machine_need_no_token(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "", "localhost.evil.example", "127.0.0.1.evil.example"])
def test_all_other_addresses_need_one(host):
    assert not is_loopback(host)


def test_the_token_is_that_of_the_environment_and_runs_do_not_inherit_it(monkeypatch):
    monkeypatch.setenv(gate.TOKEN_VARIABLE, TOKEN)
    assert gate.choose_token("127.0.0.1") == TOKEN
    assert gate.TOKEN_VARIABLE not in os.environ
    assert gate.choose_token("127.0.0.1") is None
    monkeypatch.setenv(gate.TOKEN_VARIABLE, "short")
    with pytest.raises(UserError, match="too short"):
        gate.choose_token("0.0.0.0")


def test_a_new_token_is_printed_in_a_terminal_and_not_to_a_log(monkeypatch, capsys):
    with pytest.raises(UserError, match=gate.TOKEN_VARIABLE):
        gate.choose_token("0.0.0.0")
    monkeypatch.setattr(gate.sys.stderr, "isatty", lambda: True)
    first, second = gate.choose_token("0.0.0.0"), gate.choose_token("0.0.0.0")
    assert capsys.readouterr().err == f"token: {first}\ntoken: {second}\n"
    assert len({first, second}) == 2
    assert min(len(first), len(second)) >= 32
