"""Captions from a vision-language model behind an OpenAI-compatible endpoint."""

import base64
import io
import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from PIL import Image

from captions.text import NoCaption, clean_caption
from common.errors import UserError, listing, one_line
from common.hub_token import HubToken, without_tokens


_SERVE = "vllm serve Qwen/Qwen2.5-VL-7B-Instruct"
_CONNECT_TIMEOUT = 10.0  # seconds
_LONGEST_WAIT = 60.0  # seconds between two tries
_BUSY = (408, 409, 429)  # and all from 500 on: the same request may succeed later


class EndpointCaptioner:
    """Asks a server. Any number of threads may do so at a time.

    Args:
        endpoint: its address, without a slash at the end: "http://localhost:8000/v1".
        model: to ask there; None takes the only one that it offers.
        api_key: None sends none.
        temperature, max_tokens: of the answers.
        timeout: seconds that the server may be silent.
        max_retries: how often a request is sent again.
        stopped: once it is set, no request is sent again.

    Raises:
        UserError: the server cannot be reached, refuses the key or does not offer the model.
    """

    def __init__(
        self,
        endpoint: str,
        model: str | None,
        api_key: HubToken | None,
        *,
        temperature: float,
        max_tokens: int,
        timeout: float,
        max_retries: int,
        stopped: threading.Event,
    ):
        self._endpoint = endpoint
        self._options = {"temperature": temperature, "max_tokens": max_tokens}
        self._max_retries = max_retries
        self._stopped = stopped
        try:
            self._client = httpx.Client(
                headers={} if api_key is None else {"Authorization": f"Bearer {api_key.value}"},
                timeout=httpx.Timeout(timeout, connect=_CONNECT_TIMEOUT, pool=None),
                limits=httpx.Limits(),  # as many connections as there are threads
            )
        except (ImportError, ValueError) as error:  # which it raises for proxies alone
            raise UserError(
                f"--endpoint {endpoint}: the proxy in the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) cannot be "
                f"used: {one_line(error)}; change or unset the variable"
            ) from error
        self.model = self._find_model(model)

    def describe(self, frames: Sequence[Image.Image], prompt: str) -> str:
        """Ask for a caption.

        Args:
            frames: in order, RGB.
            prompt: what to say to the model after them.

        Raises:
            NoCaption: the server gives none, after as many tries as were allowed.
            UserError: it will not give one for any clip.
        """
        content = [{"type": "image_url", "image_url": {"url": data_url(frame)}} for frame in frames]
        content.append({"type": "text", "text": prompt})
        answer = self._ask({"model": self.model, "messages": [{"role": "user", "content": content}], **self._options})
        try:
            choice = answer.json()["choices"][0]
            text, was_cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError):
            raise NoCaption(f"the server's answer is no chat completion: {one_line(answer.text, 200)}") from None
        return clean_caption(text if isinstance(text, str) else None, was_cut=was_cut)

    def _ask(self, body: Mapping[str, Any]) -> httpx.Response:
        """Send a request until it succeeds."""
        for attempt in range(self._max_retries + 1):
            # Threads that were turned away together do not come back together.
            wait = min(2.0**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
            try:
                response = self._client.post(f"{self._endpoint}/chat/completions", json=body)
            except httpx.HTTPError as error:
                reason = _no_answer(error)
            else:
                if response.is_success:
                    return response
                reason = _refusal(response)
                if response.status_code in (401, 404):
                    raise UserError(f"--endpoint {self._endpoint}: {reason}; what is done is kept: run again")
                if response.status_code not in _BUSY and response.status_code < 500:
                    raise NoCaption(reason)
                wait = retry_after(response, wait)
            if attempt == self._max_retries or self._stopped.wait(wait):
                break
        raise NoCaption(reason)

    def _find_model(self, wanted: str | None) -> str:
        """The model to ask: the one wanted, if it is offered."""
        offered = self._offered_models()
        if wanted is None and len(offered) == 1:
            return offered[0]
        if wanted in offered:
            return wanted
        if not offered:
            raise UserError(f"--endpoint {self._endpoint}: it offers no model; load one there, such as: {_SERVE}")
        what = "no model is named" if wanted is None else f"there is no model '{wanted}'"
        raise UserError(listing(f"--endpoint {self._endpoint}: {what}; give --model one of those offered:", offered))

    def _offered_models(self) -> list[str]:
        where = f"--endpoint {self._endpoint}"
        try:
            response = self._client.get(f"{self._endpoint}/models")
        except httpx.HTTPError as error:
            raise UserError(f"{where}: {_no_answer(error)}; start a server there, such as: {_SERVE}") from error
        except (httpx.InvalidURL, UnicodeError) as error:  # names of hosts that no host can have
            raise UserError(f"{where}: is no address ({one_line(error)})") from error
        if response.status_code in (401, 403):
            raise UserError(
                f"{where}: {_refusal(response)}; put the right key into the environment variable that "
                "--api_key_variable names (OPENAI_API_KEY)"
            )
        try:
            return [model["id"] for model in response.raise_for_status().json()["data"]]
        except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
            raise UserError(
                f"{where}: its /models lists no models ({_refusal(response)}); give the address of an "
                "OpenAI-compatible server, which mostly ends in /v1"
            ) from None


def data_url(frame: Image.Image) -> str:
    """A picture as JPEG in a URL."""
    file = io.BytesIO()
    frame.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _no_answer(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"the server cannot be reached ({one_line(error) or 'no answer'})"
    if isinstance(error, httpx.TimeoutException):
        return "the server did not answer within --timeout"
    return f"the connection broke ({one_line(error) or type(error).__name__})"


def _refusal(response: httpx.Response) -> str:
    """What a server says instead of an answer, on one line; it may repeat the key."""
    try:
        body = response.json()
        error = body.get("error", body)
        said = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        said = response.text
    return without_tokens(f"the server says {response.status_code}: {one_line(said, 300) or response.reason_phrase}")


def retry_after(response: httpx.Response, otherwise: float) -> float:
    """Seconds that the server asks to wait, within limits."""
    try:
        seconds = float(response.headers["Retry-After"])
    except (LookupError, ValueError):  # absent, or a date
        return otherwise
    return min(max(seconds, 0.0), _LONGEST_WAIT) if seconds == seconds else otherwise
