"""Checks of the flags of caption_dataset.py; none needs a model or a server."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from checks.data import check_sources
from checks.files import check_on_disk
from common.errors import UserError
from common.stores import is_url
from common.text_files import read_utf8
from flags.captions import CaptionFlags
from flags.settings import CaptioningSettings


_ENDPOINT_ONLY = ("api_key_variable", "num_workers", "timeout", "max_retries")


def check_captioning(settings: CaptioningSettings, given: Collection[str]) -> None:
    """Check that the flags can be combined."""
    sources, model, captions = settings.sources, settings.model, settings.captions
    check_sources(sources)
    if {"prompt", "prompt_file"} <= set(given):
        raise UserError("--prompt and --prompt_file are both given; omit one of them")
    if "template" in given and {"prompt", "prompt_file"} & set(given):
        raise UserError("--template chooses a built-in question; omit it, or --prompt and --prompt_file")
    idle = [f"--{name}" for name in _ENDPOINT_ONLY if name in given]
    if model.endpoint is None and idle:
        raise UserError(f"{', '.join(idle)}: only for a model behind an --endpoint")
    if model.endpoint is not None:
        _check_address(model.endpoint)
    if captions.output_file is not None and Path(captions.output_file).suffix.lower() != ".jsonl":
        raise UserError(f"--output_file: {captions.output_file} must end in .jsonl")
    check_on_disk("--output_file", captions.output_file or "")
    if captions.output_file is None:
        folder = sources.data_root or sources.dataset_file
        if folder is None:
            raise UserError("--output_file: required with --dataset_name but no --data_root")
        if is_url(folder):
            raise UserError(
                f"--output_file: required, because {folder} is a URL; captions are written on this machine"
            )


def _check_address(endpoint: str) -> None:
    try:
        address = urlsplit(endpoint)
        usable = address.scheme in ("http", "https") and address.hostname and not address.query
        _ = address.port
    except ValueError:  # a port that is not a number, brackets that do not close
        usable = False
    if usable and "@" in address.netloc:  # not shown: what is before it may be a password
        raise UserError("--endpoint: remove user and password from the address; a key goes into --api_key_variable")
    if not usable:
        raise UserError(f"--endpoint: '{endpoint}' is not an address such as http://localhost:8000/v1")


def settle_prompt(captions: CaptionFlags) -> CaptionFlags:
    """Return the flags with the prompt of the file, if one is given; an unreadable or empty one is a UserError."""
    prompt = captions.prompt if captions.prompt_file is None else read_utf8(Path(captions.prompt_file))
    if prompt is not None and not prompt.strip():
        flag = "--prompt" if captions.prompt_file is None else f"--prompt_file {captions.prompt_file}"
        raise UserError(f"{flag} is empty; omit it for the built-in prompt")
    return replace(captions, prompt=prompt)
