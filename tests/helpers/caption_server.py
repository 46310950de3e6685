"""A stand-in for a server with an OpenAI-compatible interface, which notes what it is asked."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from encoded_clips import numbers_of


@dataclass
class Question:
    frames: list[np.ndarray]  # uint8 [H, W, 3]
    prompt: str
    body: dict[str, Any]
    headers: Message  # case-insensitive

    @property
    def numbers(self) -> list[int]:
        """Those that the frames show; of clips from `encode`, the last one is the clip's length less one."""
        return numbers_of(np.stack(self.frames))


class Answer(NamedTuple):
    body: Any
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


def said(text: str | None, finish_reason: str = "stop") -> Answer:
    return Answer({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]})


def refused(status: int, message: str = "no") -> Answer:
    """A refusal after which one may ask again at once."""
    return Answer({"error": {"message": message}}, status, {"Retry-After": "0.001"})


def caption_of(length: int) -> str:
    """What the server says of a clip of so many frames, unless it was told otherwise."""
    return f"A row of bars changes {length} times."


class CaptionServer:
    """A server that knows only the model "watcher", and describes any clip.

    `answer` may be replaced: it gets each question and how often this clip was asked for before.
    """

    def __init__(self):
        self.models = Answer({"object": "list", "data": [{"id": "watcher"}]})
        self.answer: Callable[[Question, int], Answer] = lambda question, _: said(caption_of(question.numbers[-1] + 1))
        self.questions: list[Question] = []
        self.endpoint = ""
        self._lock = threading.Lock()

    def ask(self, body: dict[str, Any], headers: Message) -> Answer:
        (message,) = body["messages"]
        *images, text = message["content"]
        question = Question([picture(image["image_url"]["url"]) for image in images], text["text"], body, headers)
        with self._lock:
            before = sum(other.numbers[-1] == question.numbers[-1] for other in self.questions)
            self.questions.append(question)
        return self.answer(question, before)

    def lengths_asked(self) -> list[int]:
        """Return the clips asked for since the last call, sorted, by their numbers of frames."""
        lengths = sorted(question.numbers[-1] + 1 for question in self.questions)
        self.questions.clear()
        return lengths


@contextmanager
def serving() -> Iterator[CaptionServer]:
    stand_in = CaptionServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(stand_in.models if self.path == "/v1/models" else Answer({"detail": "Not Found"}, 404))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.path == "/v1/chat/completions"
            self._send(stand_in.ask(body, self.headers) if known else Answer({}, 404))

        def _send(self, answer: Answer) -> None:
            content = answer.body.encode() if isinstance(answer.body, str) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stand_in.endpoint = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()


def picture(url: str) -> np.ndarray:
    """Return the picture in a data URL, uint8 [H, W, 3]."""
    kind, _, content = url.partition(";base64,")
    assert kind == "data:image/jpeg"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return np.asarray(image)
