"""The flags of caption_dataset.py, checked without a model or a server."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from common.errors import UserError
from common.text_files import read_utf8
from flags.checks import check_dataset_name
from flags.data import add_dataset_flags, add_dataset_name_flags, add_skip_flags
from flags.types import FlagParser, non_negative_float, non_negative_int, path, positive_float, positive_int, prose


TABLE_FILE = "captions.jsonl"
_ENDPOINT_ONLY = ("api_key_variable", "num_workers", "timeout", "max_retries")


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags. Those on data mean what they mean to prepare_dataset.py.

    There is no --id_token: preparation and training put it before captions.

    Args:
        argv: the flags; those of the running process when None.

    Returns:
        The flags; `prompt` is that of the file, where one was given.

    Raises:
        SystemExit: code 2 after one line on stderr when a flag is wrong; code 0 after `--help`.
        UserError: the file of the prompt cannot be used.
    """
    parser = FlagParser(
        usage="%(prog)s --data_root FOLDER (--endpoint URL | --model NAME) [flags]",
        description="Write captions for clips that have none, with a vision-language model: one behind an "
        "OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, Ollama, a hosted one), or one that transformers loads. "
        "Run again, it goes on where it was stopped.",
        required=(("data_root", "dataset_file", "dataset_name"), ("endpoint", "model")),
    )
    parser.set_defaults(id_token=None, dataset_mix=None)  # which `data_sources` looks for
    data = parser.add_argument_group("data")
    add_dataset_flags(data, caption_column="caption", skipped_to="the log")
    add_dataset_name_flags(data)
    _add_model_flags(parser.add_argument_group("model"))
    _add_frame_flags(parser.add_argument_group("what the model sees"))
    _add_answer_flags(parser.add_argument_group("captions"))
    args, given = parser.read(argv)
    _check(parser, args, given)
    if args.prompt_file is not None:
        args.prompt = read_utf8(Path(args.prompt_file))
    if args.prompt is not None and not args.prompt.strip():
        flag = "--prompt" if args.prompt_file is None else f"--prompt_file {args.prompt_file}"
        raise UserError(f"{flag} is empty; leave it out for the built-in prompt")
    return args


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--endpoint",
        metavar="URL",
        help="OpenAI-compatible server to ask, up to and with its /v1: http://localhost:8000/v1. "
        "(default: none, --model is loaded here)",
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help="With --endpoint, the model to ask there (default: the only one that it offers). Without, a "
        "vision-language model to load with transformers: a folder, or a name on the hub.",
    )
    group.add_argument(
        "--api_key_variable",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="Environment variable that holds the endpoint's key. Without such a variable no key is sent. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--num_workers",
        metavar="N",
        type=positive_int,
        default=8,
        help="Requests to the endpoint at a time. (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive_float,
        default=300.0,
        help="How long the endpoint may be silent before a request counts as failed. (default: %(default)g)",
    )
    group.add_argument(
        "--max_retries",
        metavar="N",
        type=non_negative_int,
        default=5,
        help="How often a request is sent again, after longer and longer waits, when the endpoint is busy, fails or "
        "cannot be reached. (default: %(default)s)",
    )


def _add_frame_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num_frames",
        metavar="N",
        type=positive_int,
        default=8,
        help="Frames of each clip, spread evenly from its first to its last. (default: %(default)s)",
    )
    group.add_argument(
        "--max_size",
        metavar="PX",
        type=positive_int,
        default=512,
        help="Longer side in pixels that larger frames are shrunk to. (default: %(default)s)",
    )
    add_skip_flags(group, "; give the same number when preparing")


def _add_answer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        type=prose,
        help="What to ask for each clip. (default: one factual paragraph of 80 to 120 words on subject, motion, "
        "place, light and camera)",
    )
    group.add_argument("--prompt_file", metavar="FILE", type=path, help="The same from a text file. (default: none)")
    group.add_argument(
        "--temperature",
        metavar="T",
        type=non_negative_float,
        default=0.0,
        help="0 takes the likeliest words; more makes captions more varied and less reliable. (default: %(default)g)",
    )
    group.add_argument(
        "--max_tokens",
        metavar="N",
        type=positive_int,
        default=512,
        help="Longest answer; of a longer one, whole sentences are kept. Raise it for models that think before they "
        "answer. (default: %(default)s)",
    )
    group.add_argument(
        "--output_file",
        metavar="FILE",
        type=path,
        help=f"Table to write, .jsonl. (default: {TABLE_FILE} in --data_root, or else beside --dataset_file)",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="Caption all clips anew, also those that come with captions or got theirs in an earlier run. "
        "(default: these are kept)",
    )


def _check(parser: FlagParser, args: argparse.Namespace, given: set[str]) -> None:
    try:
        check_dataset_name(args)
    except UserError as error:
        parser.error(str(error))
    if {"prompt", "prompt_file"} <= given:
        parser.error("--prompt and --prompt_file are both given; leave one of them out")
    if args.endpoint is None:
        idle = [f"--{name}" for name in _ENDPOINT_ONLY if name in given]
        if idle:
            parser.error(f"{', '.join(idle)}: only for a model behind an --endpoint")
    else:
        args.endpoint = args.endpoint.rstrip("/")
        _check_address(parser, args.endpoint)
    if args.output_file is not None and Path(args.output_file).suffix.lower() != ".jsonl":
        parser.error(f"--output_file: {args.output_file} must end in .jsonl")
    if args.output_file is None and args.data_root is None and args.dataset_file is None:
        parser.error("--output_file: required with --dataset_name alone")


def _check_address(parser: FlagParser, endpoint: str) -> None:
    try:
        address = urlsplit(endpoint)
        usable = address.scheme in ("http", "https") and address.hostname and not address.query
        _ = address.port
    except ValueError:  # a port that is no number, brackets that do not close
        usable = False
    if usable and "@" in address.netloc:  # not shown: what is before it may be a password
        parser.error("--endpoint: leave user and password out of the address; a key goes into --api_key_variable")
    if not usable:
        parser.error(f"--endpoint: '{endpoint}' is no address; it looks like http://localhost:8000/v1")
