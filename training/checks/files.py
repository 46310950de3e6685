"""Checks of what flags name on disk, before anything is loaded; nothing is created.

Each raises `UserError` with one line that names the flag and what to do.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.run_folder import LORA_FILE
from common.stores import check_url, is_url
from flags.data import SourceFlags
from video.condition_frames import ENDS, is_context, split_files


def check_files(
    model: str,
    sources: SourceFlags,
    output_dir: str,
    model_flag: str = "--pretrained_model_name_or_path",
    *,
    is_to_store: bool = False,
) -> None:
    """Check that the model and the data exist, and that the output folder can be written.

    Args:
        model: hub id (`org/name`) or folder in the diffusers layout.
        sources: the flags that name the clips.
        output_dir: folder to write to; it need not exist yet.
        model_flag: the flag of `model`, for messages.
        is_to_store: the output folder may be a URL.
    """
    check_model(model, model_flag)
    check_data(sources)
    if is_to_store and is_url(output_dir):
        check_url("--output_dir", output_dir, writable=True)
    else:
        check_writable(output_dir)


def check_data_folder(flag: str, folder: str | None) -> None:
    """Check that a folder of clips exists, if it is not a URL."""
    if folder is not None and not is_url(folder) and not os.path.isdir(folder):
        raise UserError(f"{flag}: no folder '{folder}'; pass the folder of your clips")


def check_data(sources: SourceFlags) -> None:
    """Check that the folder and table of clips exist, if they are not URLs."""
    data_root, dataset_file = sources.data_root, sources.dataset_file
    check_data_folder("--data_root", data_root)
    if dataset_file is not None and not is_url(dataset_file) and not os.path.isfile(dataset_file):
        inside = os.path.join(data_root or "", dataset_file)
        advice = f"did you mean '{inside}'?" if os.path.isfile(inside) else "pass the path of a table of clips"
        raise UserError(f"--dataset_file: no file '{dataset_file}'; {advice}")


def check_model(model: str, flag: str) -> None:
    """Check that a model is the folder of a pipeline, or may be on the hub."""
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, "model_index.json")):
            advice = "pass the folder of a full diffusers pipeline"
            if os.path.isdir(os.path.join(model, "transformer")):
                advice = "it holds only a transformer: pass its base model, and this to generate.py as --transformer"
            raise UserError(f"{flag}: no model_index.json in '{model}'; {advice}")
    elif not is_hub_id(model):
        raise UserError(f"{flag}: no folder '{model}'; pass a diffusers folder or a hub id such as THUDM/CogVideoX-5b")


def is_hub_id(reference: str) -> bool:
    """Return whether this may be `owner/name` on the hub, and is not a local path."""
    return reference.count("/") == 1 and not reference.startswith(("/", ".", "~")) and not os.path.exists(reference)


def check_on_disk(flag: str, place: str) -> None:
    """Check that a result is not to be written to a URL."""
    if is_url(place):
        raise UserError(f"{flag}: {place} is a URL; pass a place on this machine, and copy the result later")


def check_writable(output_dir: str, flag: str = "--output_dir") -> None:
    """Check that `output_dir`, which `flag` named, can be created and written.

    Processes of one launch run this at the same time, so it does not create the folder: it tries a nameless
    temporary file in the nearest folder that exists.
    """
    check_on_disk(flag, output_dir)
    existing = Path(output_dir).absolute()
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{flag}: '{existing}' is not a folder; choose another place for the output")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{flag}: cannot write to '{existing}' ({error.strerror}); change its permissions or choose another place"
        ) from None


def find_images(flag: str, images: Sequence[str]) -> tuple[str, ...]:
    """Return the images with ~ expanded; each exists or is a URL."""
    images = tuple(map(os.path.expanduser, images))
    for image in images:
        if not image.lower().startswith(("http://", "https://")) and not os.path.isfile(image):
            raise UserError(f"{flag}: no file '{image}'; pass a path or an http(s) URL")
    return images


def find_given_frames(flag: str, given: Sequence[str], condition: str) -> tuple[str, ...]:
    """Return the images, pairs of images or videos that --condition_frames asks for, likewise."""
    if is_context(condition):
        return find_videos(flag, given)
    if condition != ENDS:
        return find_images(flag, given)
    pairs = [split_files(condition, one) for one in given]
    for one, pair in zip(given, pairs, strict=True):
        if len(pair) != 2:
            raise UserError(f"{flag}: '{one}' is not two images; for --condition_frames {ENDS} pass FIRST,LAST")
    return tuple(",".join(find_images(flag, pair)) for pair in pairs)


def find_videos(flag: str, videos: Sequence[str]) -> tuple[str, ...]:
    """Return the videos with ~ expanded; each exists."""
    videos = tuple(map(os.path.expanduser, videos))
    for video in videos:
        if not os.path.isfile(video):
            raise UserError(f"{flag}: no file '{video}'; pass the path of a video")
    return videos


def find_lora(flag: str, reference: str) -> str:
    """Return the file of a LoRA, from its path or the folder that contains it."""
    file = Path(reference)
    if file.is_dir():
        file /= LORA_FILE
    if not file.is_file():
        raise UserError(f"{flag}: no file '{file}'; pass a .safetensors file or a folder with {LORA_FILE}")
    if file.suffix != ".safetensors":
        raise UserError(f"{flag}: '{file}' is not a .safetensors file, and others may run code; convert it")
    return str(file)
