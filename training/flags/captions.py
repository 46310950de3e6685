"""The flags of caption_dataset.py beside those on clips."""

from dataclasses import dataclass

from flags.schema import flag
from flags.types import non_negative_float, non_negative_int, path, positive_float, positive_int, prose


CAPTIONS_FILE = "captions.jsonl"


@dataclass(frozen=True)
class CaptionModelFlags:
    """The vision-language model, or the server that has it."""

    endpoint: str | None = flag(
        None,
        "OpenAI-compatible server to ask, up to and with its /v1: http://localhost:8000/v1.",
        metavar="URL",
        shown="none, --model is loaded here",
    )
    model: str | None = flag(
        None,
        "With --endpoint, the model to ask there (default: the only one that it offers). Without, a "
        "vision-language model to load with transformers: a folder, or a name on the hub.",
        metavar="NAME",
    )
    api_key_variable: str = flag(
        "OPENAI_API_KEY",
        "Environment variable that holds the endpoint's key. Without such a variable no key is sent.",
        metavar="NAME",
    )
    num_workers: int = flag(8, "Requests to the endpoint at a time.", type=positive_int, metavar="N")
    timeout: float = flag(
        300.0,
        "How long the endpoint may be silent before a request counts as failed.",
        type=positive_float,
        metavar="SECONDS",
    )
    max_retries: int = flag(
        5,
        "How often a request is sent again, after longer and longer waits, when the endpoint is busy, fails or "
        "cannot be reached.",
        type=non_negative_int,
        metavar="N",
    )


@dataclass(frozen=True)
class CaptionFrameFlags:
    """What the model sees of a clip."""

    num_frames: int = flag(
        8, "Frames of each clip, spread evenly from its first to its last.", type=positive_int, metavar="N"
    )
    max_size: int = flag(
        512, "Longer side in pixels that larger frames are shrunk to.", type=positive_int, metavar="PX"
    )


@dataclass(frozen=True)
class CaptionFlags:
    """What is asked for, and where captions go."""

    prompt: str | None = flag(
        None,
        "What to ask for each clip.",
        type=prose,
        metavar="TEXT",
        shown="one factual paragraph of 80 to 120 words on subject, motion, place, light and camera",
    )
    prompt_file: str | None = flag(None, "The same from a text file.", type=path, metavar="FILE", shown="none")
    temperature: float = flag(
        0.0,
        "0 takes the likeliest words; more makes captions more varied and less reliable.",
        type=non_negative_float,
        metavar="T",
    )
    max_tokens: int = flag(
        512,
        "Longest answer; of a longer one, whole sentences are kept. Raise it for models that think before they "
        "answer.",
        type=positive_int,
        metavar="N",
    )
    output_file: str | None = flag(
        None,
        "Table to write, .jsonl.",
        type=path,
        metavar="FILE",
        shown=f"{CAPTIONS_FILE} in --data_root, or else beside --dataset_file",
    )
    overwrite: bool = flag(
        False,
        "Caption all clips anew, also those that come with captions or got theirs in an earlier run.",
        shown="these are kept",
    )
