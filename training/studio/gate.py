"""Who may use the app, and which files it sends."""

import hmac
import ipaddress
import os
import secrets
import sys
from html import escape
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import UserError
from studio.places import inside


TOKEN_VARIABLE = "COGVIDEOX_FACTORY_APP_TOKEN"
SENT_SUFFIXES = {".mp4", ".m4v", ".mov", ".webm", ".gif", ".png", ".jpg", ".jpeg", ".webp", ".html", ".safetensors"}

_SHORTEST_TOKEN = 16  # characters
_COOKIE = "cogvideox_app"
_LONGEST_FORM = 4096  # bytes
# No file of the user's can run a script or load anything, wherever it is opened.
_FILE_HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "media-src data:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_PAGE_HEADERS = {
    # Gradio's page uses inline scripts and styles, and compiles templates; nothing may come from elsewhere.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
    "Referrer-Policy": "no-referrer",
}
_LOGIN = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>CogVideoX Factory</title><style>:root{{color-scheme:light dark}}body{{font:1rem system-ui;margin:3rem}}</style>
<form method="post" action="login"><label>Token, as the app printed it: <input name="token" type="password" autofocus>
</label> <button>Open</button> {message}</form>"""


def choose_token(host: str) -> str | None:
    """Return the token to ask for: of the environment, from which it is removed, or a new one, which is printed.

    None if the app is reached only from this machine and no token is set. A UserError if a new one would be printed
    to a file.
    """
    token = os.environ.pop(TOKEN_VARIABLE, "").strip()  # runs do not inherit it
    if 0 < len(token) < _SHORTEST_TOKEN:
        raise UserError(f"${TOKEN_VARIABLE}: too short to be safe; use {_SHORTEST_TOKEN} characters or more")
    if token or is_loopback(host):
        return token or None
    if not sys.stderr.isatty():
        raise UserError(
            f"--host {host}: set a token in ${TOKEN_VARIABLE}, as printing one here would write it to a log"
        )
    token = secrets.token_urlsafe(24)
    print(f"token: {token}", file=sys.stderr)
    return token


class Gate:
    """Middleware that lets only the app's own page and its user through.

    Args:
        app: what is behind it.
        token: to ask for; None for none.
        is_local: only names of this machine are expected, as another one is a page's attempt to reach it (DNS
            rebinding).
    """

    def __init__(self, app: ASGIApp, token: str | None, *, is_local: bool):
        self.app = app
        self.token = token
        self.is_local = is_local
        self.session = secrets.token_urlsafe(32)  # what the cookie holds, of this start only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # websockets, which the page does not use, are closed
                await self.app(scope, receive, send)
            return
        request = Request(scope, receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _PAGE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = await self._refusal(request) or self.app
        await answer(scope, receive, send_with_headers)

    async def _refusal(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        try:
            name, place = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
        except ValueError:
            return PlainTextResponse("malformed Host or Origin", 403)
        if self.is_local and not is_loopback(name or ""):
            return PlainTextResponse("this app answers only to the name of this machine", 403)
        if origin is not None and place != host:
            return PlainTextResponse("another page may not use this app", 403)
        if self.token is None:
            return None
        if request.url.path == "/login" and request.method == "POST":
            return await self._log_in(request)
        cookie = request.cookies.get(_COOKIE)
        if cookie is not None and hmac.compare_digest(cookie.encode(), self.session.encode()):
            return None
        return HTMLResponse(_LOGIN.format(message=""), 401)

    async def _log_in(self, request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _LONGEST_FORM:
                return PlainTextResponse("too long", 413)
        typed = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0].strip()
        if not hmac.compare_digest(typed.encode(), self.token.encode()):
            return HTMLResponse(_LOGIN.format(message=escape("This is not the token.")), 401)
        answer = RedirectResponse("./", 303)
        answer.set_cookie(_COOKIE, self.session, httponly=True, samesite="strict")
        return answer


def is_loopback(host: str) -> bool:
    """Return whether a name or address is reached only from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def file_response(root: Path, path: str) -> Response:
    """Return a file below `root`; 404 for hidden ones, other kinds, and whatever leads out of `root`."""
    try:
        file = inside(root, path)
    except UserError:
        file = root
    is_hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    if is_hidden or file.suffix.lower() not in SENT_SUFFIXES or not file.is_file():
        return PlainTextResponse("no such file", 404)
    return FileResponse(file, headers=_FILE_HEADERS)
