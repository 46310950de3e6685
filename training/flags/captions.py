"""The flags of caption_dataset.py beside those on clips."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import FilePath, NonNegativeFloat, NonNegativeInt, Pixels, PositiveFloat, PositiveInt, Text, Url


CAPTIONS_FILE = "captions.jsonl"


@dataclass(frozen=True)
class CaptionModelFlags:
    """The vision-language model, or the server that runs it."""

    endpoint: Url | None = flag(
        None, "OpenAI-compatible server, such as http://localhost:8000/v1.", shown="none, --model is loaded here"
    )
    model: str | None = flag(
        None,
        "With --endpoint, the model to use there (default: its only one). Otherwise a vision-language model for "
        "transformers: a folder or a hub id.",
    )
    api_key_variable: str = flag(
        "OPENAI_API_KEY", "Environment variable with the endpoint's key; if it is not set, no key is sent."
    )
    num_workers: PositiveInt = flag(8, "Parallel requests to the endpoint.")
    timeout: PositiveFloat = flag(300.0, "Fail a request after this long without an answer.", metavar="SECONDS")
    max_retries: NonNegativeInt = flag(5, "Retries, with increasing waits, if the endpoint is busy or fails.")


@dataclass(frozen=True)
class CaptionFrameFlags:
    """What the model sees of a clip."""

    num_frames: PositiveInt = flag(8, "Frames of each clip, spread evenly from its first to its last.")
    max_size: Pixels = flag(512, "Shrink larger frames to this longer side in pixels.")


@dataclass(frozen=True)
class CaptionFlags:
    """The request for a caption, and the file of captions."""

    template: str = flag(
        "everything",
        "Built-in question: everything asks for a factual paragraph on subject, motion, place, light and camera; "
        "style, motion and camera for one that omits that, so that it is learned under an --id_token.",
        choices=("everything", "style", "motion", "camera"),
    )
    prompt: Text | None = flag(None, "Your own question for each clip.", shown="that of --template")
    prompt_file: FilePath | None = flag(None, "Read --prompt from this text file.")
    temperature: NonNegativeFloat = flag(
        0.0, "0 takes the most likely words; higher values give more varied, less reliable captions.", metavar="T"
    )
    max_tokens: PositiveInt = flag(512, "Longest answer, cut after a full sentence. Raise it for reasoning models.")
    output_file: FilePath | None = flag(
        None, "Table to write, .jsonl.", shown=f"{CAPTIONS_FILE} in --data_root, or else next to --dataset_file"
    )
    overwrite: bool = flag(False, "Also caption clips that have a caption already.", shown="keep these")
