"""The on-disk format of prepared data: latent moments and prompt embeddings, one file a clip, and their index.

    <folder>/prepared.json               the settings it was prepared with
    <folder>/data.jsonl                  one object a clip: its files, and {num_frames, height, width}
    <folder>/prompts.txt, videos.txt     the same clips as a plain list
    <folder>/video_latents/<name>.pt     the VAE's moments, [2C, F', H / 8, W / 8]
    <folder>/prompt_embeds/<name>.pt     [226, D]
    <folder>/videos/<name>.mp4           the clip as the model sees it
    <folder>/prompts/<name>.txt
    <folder>/images/<name>.png           its first frame, and
    <folder>/image_latents/<name>.pt     that frame's moments, [2C, 1, H / 8, W / 8] (image-to-video)

Folders written by the original `prepare_dataset.py` have the same layout without `prepared.json`, and load alike.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buckets import Bucket
from errors import UserError, listing
from files import written_whole


if TYPE_CHECKING:
    import torch

SETTINGS_FILE = "prepared.json"
INDEX_FILE = "data.jsonl"
LISTS = (INDEX_FILE, "prompts.txt", "videos.txt")


@dataclass(frozen=True)
class PreparedClip:
    """One clip of a prepared folder."""

    name: str
    bucket: Bucket
    video_latents: Path
    prompt_embeds: Path


@dataclass(frozen=True)
class PreparedSettings:
    """What the tensors depend on beside the clips themselves: a folder is prepared with one set of these."""

    model: str
    dtype: str
    max_sequence_length: int


def write_tensor(folder: Path, kind: str, name: str, tensor: "torch.Tensor") -> None:
    """Write `<folder>/<kind>/<name>.pt`, whole or not at all; `kind` is video_latents or prompt_embeds."""
    import torch

    # To an open file, because torch writes a path's name into the archive; a copy, because a slice of a batch is saved
    # with the whole batch's storage.
    with written_whole(tensor_file(folder, kind, name)) as path, open(path, "wb") as file:
        torch.save(tensor.detach().cpu().clone(), file)


def read_tensor(path: Path) -> "torch.Tensor":
    """Read a tensor file; never unpickles anything but tensors.

    Raises:
        ValueError: the file is no tensor file.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a tensor: {error}") from error


def tensor_file(folder: Path, kind: str, name: str) -> Path:
    """Where a clip's tensor of a kind (video_latents, image_latents, prompt_embeds) lies."""
    return folder / kind / f"{name}.pt"


def claim_folder(folder: Path, settings: PreparedSettings) -> None:
    """Make `folder` one of prepared data with these settings, or check that it is one already.

    Raises:
        UserError: the folder holds data prepared with other settings, or lists that are not ours to overwrite.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        foreign = [name for name in LISTS if (folder / name).exists()]
        if foreign:
            raise UserError(
                f"--output_dir: {folder} already holds {', '.join(foreign)} of a data set that was not prepared here; "
                "give a new folder"
            )
        with written_whole(path) as partial:
            partial.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
        return
    earlier = read_settings(folder)
    differing = [
        f"{key} was {earlier.get(key)!r}, is now {value!r}"
        for key, value in asdict(settings).items()
        if earlier.get(key) != value
    ]
    if differing:
        raise UserError(
            f"--output_dir: {folder} holds data prepared with other settings ({'; '.join(differing)}); "
            "give a new folder"
        )


def write_index(
    folder: Path, clips: Iterable[tuple[str, str, Bucket]], *, with_tensors: bool, with_images: bool = False
) -> None:
    """List the folder's clips in prompts.txt and videos.txt and, with their tensors, in data.jsonl.

    Args:
        clips: (name, caption, bucket) of each.
        with_tensors: latents and embeddings were written.
        with_images: first frames were written too.
    """
    clips = list(clips)
    lines: dict[str, list[str]] = {
        "prompts.txt": [" ".join(caption.split()) for _, caption, _ in clips],
        "videos.txt": [f"videos/{name}.mp4" for name, _, _ in clips],
    }
    if with_tensors:
        lines[INDEX_FILE] = [json.dumps(_entry(name, bucket, with_images)) for name, _, bucket in clips]
    for file, content in lines.items():
        with written_whole(folder / file) as partial:
            partial.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")


def _entry(name: str, bucket: Bucket, with_images: bool) -> dict[str, Any]:
    images = {"image": f"images/{name}.png", "image_latent": f"image_latents/{name}.pt"} if with_images else {}
    return {
        "prompt": f"prompts/{name}.txt",
        "prompt_embed": f"prompt_embeds/{name}.pt",
        "video": f"videos/{name}.mp4",
        "video_latent": f"video_latents/{name}.pt",
        **images,
        "metadata": bucket._asdict(),
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a folder was prepared with; empty for folders of the original script.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SETTINGS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); prepare into a new folder") from error


def listed_names(folder: Path) -> set[str]:
    """Names of the clips that the folder's list of videos has; empty before there is one."""
    videos = folder / "videos.txt"
    return {Path(line).stem for line in videos.read_text(encoding="utf-8").splitlines()} if videos.exists() else set()


def read_index(folder: Path) -> list[PreparedClip]:
    """List the clips of a prepared folder, and check that their tensor files are there.

    Raises:
        UserError: the folder was never prepared, or files are missing.
    """
    if (folder / INDEX_FILE).is_file():
        clips = [
            _clip_from_entry(folder, line, number)
            for number, line in enumerate((folder / INDEX_FILE).read_text(encoding="utf-8").splitlines(), 1)
            if line.strip()
        ]
    elif (folder / SETTINGS_FILE).is_file():
        raise UserError(
            f"--load_tensors: the preparation of {folder} was not finished (there is no {INDEX_FILE}); run it again: "
            "it does only what is missing"
        )
    else:
        clips = [_clip_from_latents(path) for path in sorted((folder / "video_latents").glob("[!.]*.pt"))]
    if not clips:
        raise UserError(
            f"--load_tensors: {folder} holds no prepared data (no {INDEX_FILE} and no video_latents/*.pt); run "
            "prepare_dataset.sh first and give its --output_dir as --data_root, or leave --load_tensors out"
        )
    missing = [path for clip in clips for path in (clip.video_latents, clip.prompt_embeds) if not path.is_file()]
    if missing:
        raise UserError(listing(f"--load_tensors: {len(missing)} files of {folder} are missing:", missing))
    return clips


def _clip_from_entry(folder: Path, line: str, number: int) -> PreparedClip:
    try:
        entry: dict[str, Any] = json.loads(line)
        latents = folder / entry["video_latent"]
        size = entry["metadata"]
        bucket = Bucket(int(size["num_frames"]), int(size["height"]), int(size["width"]))
        return PreparedClip(latents.stem, bucket, latents, folder / entry["prompt_embed"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / INDEX_FILE}:{number}: not a prepared clip ({type(error).__name__}: {error}); "
            "run prepare_dataset.sh again"
        ) from error


def _clip_from_latents(path: Path) -> PreparedClip:
    _, frames, height, width = read_tensor(path).shape
    bucket = Bucket((frames - 1) * 4 + 1, height * 8, width * 8)
    return PreparedClip(path.stem, bucket, path, path.parent.parent / "prompt_embeds" / path.name)
