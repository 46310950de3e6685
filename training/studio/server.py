"""The server of the app: its page behind the gate, and what happens when it is closed."""

import logging
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI

from common.errors import UserError
from studio.gate import Gate, choose_token, file_response, is_loopback
from studio.jobs import Jobs
from studio.page import CSS, THEME, build_page


def make_server(root: Path, jobs: Jobs, token: str | None, *, is_local: bool) -> FastAPI:
    """Return the app: the page, and the files below `root` that it shows."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    app.get("/file/{path:path}")(partial(file_response, root))
    page = build_page(root, jobs)
    gr.mount_gradio_app(
        app, page, path="/", theme=THEME, css=CSS, footer_links=[], max_file_size=1, ssr_mode=False, pwa=False
    )
    app.add_middleware(Gate, token=token, is_local=is_local)
    return app


def serve(root: Path, host: str, port: int) -> None:
    """Serve the app until Ctrl-C, then say what happens to a run; a UserError if the address cannot be used."""
    jobs, token = Jobs(root), choose_token(host)
    server = make_server(root, jobs, token, is_local=is_loopback(host))
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host}, --port {port}: {error.strerror}; pass another port, or 0 for any") from error
    name = f"[{host}]" if ":" in host else host
    print(f"open http://{name}:{listener.getsockname()[1]} (Ctrl-C closes the app; a run continues)", flush=True)
    config = uvicorn.Config(server, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)

    def close(*_: object) -> None:
        logging.disable()  # uvicorn would report each open page as an error
        running.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):  # sent again, they change nothing
        signal.signal(number, close)
    thread = threading.Thread(target=running.run, args=([listener],))  # in the main thread, uvicorn takes the signals
    thread.start()
    thread.join()
    job = jobs.latest()
    if job is not None and job.is_running:
        print(f"\n{job.kind} continues as process {job.process}, log: {job.folder}/log.txt", file=sys.stderr)
        print(f"start the app again to see it, or let it save and end: kill -TERM -- -{job.process}", file=sys.stderr)
