"""Captions from a vision-language model behind an OpenAI-compatible endpoint."""

import base64
import io
import threading
from collections.abc import Sequence
from typing import Any

from openai import APIConnectionError, APIStatusError, APITimeoutError, DefaultHttpxClient, Omit, OpenAI, Timeout
from PIL import Image

from captions.text import NoCaption, clean_caption
from common.errors import UserError, listing, one_line
from common.hub_token import HubToken, without_tokens


_SERVE = "vllm serve Qwen/Qwen2.5-VL-7B-Instruct"
_CONNECT_TIMEOUT = 10.0  # seconds


class EndpointCaptioner:
    """Asks a server for captions. Safe to call from several threads.

    Args:
        endpoint: the server's address, without a slash at the end: "http://localhost:8000/v1".
        model: None takes the only one that the server offers.
        timeout: seconds that the server may be silent.
        max_retries: how often a request is sent again.
        stopped: once it is set, no request is sent.
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
        self._where = f"--endpoint {endpoint}"
        self._stopped = stopped
        self._options = {"temperature": temperature, "max_tokens": max_tokens}
        if api_key is None:
            self._options["extra_headers"] = {"Authorization": Omit()}
        try:
            self._client = OpenAI(
                base_url=endpoint,
                api_key="none" if api_key is None else api_key.value,  # the client insists on one
                timeout=Timeout(timeout, connect=_CONNECT_TIMEOUT, pool=None),
                max_retries=max_retries,
                http_client=DefaultHttpxClient(event_hooks={"request": [self._check_stopped]}),
            )
        except (ImportError, ValueError) as error:  # raised for proxies only
            raise UserError(
                f"{self._where}: the proxy in the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) cannot be "
                f"used: {one_line(error)}; change or unset the variable"
            ) from error
        self.model = self._find_model(model)

    def describe(self, frames: Sequence[Image.Image], prompt: str) -> str:
        """Ask for a caption, as `Captioner.describe` says; NoCaption is raised after all retries."""
        content = [{"type": "image_url", "image_url": {"url": _data_url(frame)}} for frame in frames]
        content.append({"type": "text", "text": prompt})
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=[{"role": "user", "content": content}], **self._options
            ).http_response
        except APIConnectionError as error:
            raise NoCaption(_no_answer(error)) from error
        except APIStatusError as error:
            if error.status_code in (401, 404):
                raise UserError(f"{self._where}: {_refusal(error.response)}; run again to resume") from error
            raise NoCaption(_refusal(error.response)) from error
        try:
            choice = response.json()["choices"][0]
            text, was_cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError):
            raise NoCaption(f"the server's answer is not a chat completion: {one_line(response.text, 200)}") from None
        return clean_caption(text if isinstance(text, str) else None, was_cut=was_cut)

    def _check_stopped(self, _: object) -> None:
        if self._stopped.is_set():
            raise NoCaption("the run was stopped")

    def _find_model(self, wanted: str | None) -> str:
        """Return the wanted model if it is offered, or the only one."""
        offered = self._offered_models()
        if wanted in offered or (wanted is None and len(offered) == 1):
            return wanted or offered[0]
        if not offered:
            raise UserError(f"{self._where}: it offers no model; load one there, such as: {_SERVE}")
        what = "no model is named" if wanted is None else f"there is no model '{wanted}'"
        raise UserError(listing(f"{self._where}: {what}; set --model to one of those offered:", offered))

    def _offered_models(self) -> list[str]:
        models = self._client.with_options(max_retries=0).models.with_raw_response
        try:
            response = models.list(extra_headers=self._options.get("extra_headers")).http_response
        except APIConnectionError as error:
            raise UserError(f"{self._where}: {_no_answer(error)}; start a server there, such as: {_SERVE}") from error
        except UnicodeError as error:  # host names that no host can have
            raise UserError(f"{self._where}: is not an address ({one_line(error)})") from error
        except APIStatusError as error:
            response = error.response
        if response.status_code in (401, 403):
            raise UserError(
                f"{self._where}: {_refusal(response)}; put the right key into the environment variable that "
                "--api_key_variable names (OPENAI_API_KEY)"
            )
        try:
            return [model["id"] for model in response.json()["data"]]
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"{self._where}: its /models lists no models ({_refusal(response)}); pass the address of an "
                "OpenAI-compatible server, which usually ends in /v1"
            ) from None


def _data_url(frame: Image.Image) -> str:
    file = io.BytesIO()
    frame.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _no_answer(error: APIConnectionError) -> str:
    cause = type(error.__cause__).__name__  # of httpx or httpx2, whichever the client uses
    reason = one_line(error.__cause__) or "no answer"
    if cause in ("ConnectError", "ConnectTimeout"):
        return f"the server cannot be reached ({reason})"
    if isinstance(error, APITimeoutError):
        return "the server did not answer within --timeout"
    return f"the connection broke ({reason})"


def _refusal(response: Any) -> str:
    """Return what a server says instead of an answer, on one line and without the key, which it may repeat."""
    try:
        said = response.json()
        for key in ("error", "message"):
            said = said.get(key, said) if isinstance(said, dict) else said
    except ValueError:
        said = response.text
    return without_tokens(f"the server says {response.status_code}: {one_line(said, 300) or response.reason_phrase}")
