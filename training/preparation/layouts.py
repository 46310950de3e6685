"""Layouts of prepared samples on disk: shards, or one file per tensor like the original script.

A layout knows what is done, divides the rest into batches, in parts for processes to share, writes each batch
atomically, and lists the samples once all are done. Every process makes the same batches at any time, because the bits
of a result depend on its batch. `prepared/folder.py` documents and reads the files.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.files import atomic_write
from common.text_files import index_lines
from data.buckets import Bucket
from data.clips import ClipSample
from prepared.folder import FILES_INDEX, LISTS, STAGING, content_digest
from prepared.index import write_index
from prepared.read_index import row_in_shards, sample_in_files, sample_in_shards
from prepared.tensor_files import ShardWriter, cut_into_parts, finished_names, samples_per_shard
from video.io import write_video


_SUFFIXES = {"videos": ".mp4", "prompts": ".txt", "images": ".png"}

Batches = Sequence[Sequence[str]]  # of names
Parts = Mapping[str, Batches]
Tensors = Mapping[str, torch.Tensor]  # by kind: video_latents, image_latents, control_latents, mask, prompt_embeds


@dataclass(frozen=True)
class Sample:
    """A planned clip and the names of its tensors."""

    name: str  # of its latents
    caption_key: str  # of its prompt embedding
    planned: ClipSample

    def origin(self) -> dict[str, Any]:
        """Return the part of the index entry that says where the sample comes from."""
        clip, indices = self.planned.clip, self.planned.frame_indices
        return {
            "repeats": clip.repeats,
            "caption": clip.caption,
            "source": clip.source,
            "clip": str(clip.video),
            "frames": [indices[0], indices[-1]],
            "extra": dict(clip.metadata),
            "content": content_digest(self.planned.info.sha256),
        }


class ShardLayout:
    """Safetensors shards of about `shard_bytes`, for latents and embeddings of all ranks' samples, and an index."""

    def __init__(
        self,
        folder: Path,
        samples: Sequence[Sample],
        *,
        latent_bytes: Callable[[Bucket], int],
        embed_bytes: int,
        shard_bytes: int,
        with_images: bool,
        with_controls: bool = False,
        with_masks: bool = False,
    ):
        self.folder, self.samples = folder, samples
        self.kinds = {"with_images": with_images, "with_controls": with_controls, "with_masks": with_masks}
        groups = _names_by_bucket(samples)
        sizes = [samples_per_shard(latent_bytes(bucket), shard_bytes) for bucket in groups]
        self.latents = ShardWriter(folder / "latents", folder / STAGING, list(groups.values()), sizes)
        captions = list(dict.fromkeys(sample.caption_key for sample in samples))
        size = samples_per_shard(embed_bytes, shard_bytes)
        self.captions = ShardWriter(folder / "prompt_embeds", folder / STAGING, [captions], [size])

    def captions_to_do(self, batch_size: int) -> Parts:
        """Return batches of caption keys that are not embedded."""
        return self.captions.todo(batch_size)

    def clips_to_do(self, batch_size: int) -> Parts:
        """Return batches of sample names, of one bucket each, that are not encoded."""
        return self.latents.todo(batch_size)

    def captions_left(self, batches: Batches) -> Batches:
        """Return which batches of a part are not embedded."""
        return self.captions.left(batches)

    def clips_left(self, batches: Batches, given_up: Container[str]) -> Batches:
        """Return which batches of a part are not encoded, apart from the samples in `given_up`."""
        return self.latents.left(batches, given_up)

    def write_captions(self, embeds: Mapping[str, torch.Tensor]) -> None:
        """Write a batch of prompt embeddings by caption key."""
        self.captions.write({key: {"prompt_embeds": tensor} for key, tensor in embeds.items()})

    def write_clips(self, clips: Mapping[str, Tensors], videos: Mapping[str, torch.Tensor]) -> None:
        """Write a batch of latents by sample name; `videos` are not kept."""
        self.latents.write(clips)

    def missing(self, given_up: Container[str]) -> list[Sample]:
        """Return the samples that no rank has finished; shards do not wait for those in `given_up`."""
        self.captions.merge()
        self.latents.merge(given_up)
        latents, captions = finished_names(self.latents.folder), finished_names(self.captions.folder)
        return [s for s in self.samples if s.name not in latents or s.caption_key not in captions]

    def write_index(self, samples: Sequence[Sample]) -> int:
        """Write the index of finished samples. Returns how many other samples are in the shards."""
        latents, captions = finished_names(self.latents.folder), finished_names(self.captions.folder)
        entries = (
            sample_in_shards(
                self.folder,
                sample.name,
                latents[sample.name],
                captions[sample.caption_key],
                sample.caption_key,
                sample.planned.bucket,
                **self.kinds,
            )
            | sample.origin()
            for sample in samples
        )
        write_index(self.folder, map(row_in_shards, entries))
        return len(latents.keys() - {sample.name for sample in samples})


class FileLayout:
    """The layout of the original script: one file per tensor, named after its sample, and previews.

    `samples` are those of all ranks. Without `with_tensors`, only previews and lists are written.
    """

    def __init__(
        self, folder: Path, samples: Sequence[Sample], *, with_tensors: bool, with_images: bool, preview_fps: int
    ):
        self.folder, self.samples = folder, samples
        self.with_tensors, self.with_images, self.preview_fps = with_tensors, with_images, preview_fps
        self._captions = {sample.name: sample.planned.clip.caption for sample in samples}
        self._names_of: dict[str, list[str]] = {}
        for sample in samples:
            self._names_of.setdefault(sample.caption_key, []).append(sample.name)

    def captions_to_do(self, batch_size: int) -> Parts:
        """Return batches of caption keys; those that are embedded already are among them."""
        keys = list(self._names_of)
        return cut_into_parts("captions", keys, batch_size, len(keys))

    def clips_to_do(self, batch_size: int) -> Parts:
        """Return batches of sample names, of one bucket each; those that are encoded already are among them."""
        parts: dict[str, Batches] = {}
        for number, names in enumerate(_names_by_bucket(self.samples).values()):
            parts |= cut_into_parts(f"clips-{number}", names, batch_size, len(self.samples))
        return parts

    def captions_left(self, batches: Batches) -> Batches:
        """Return which batches of a part are not embedded."""
        return [batch for batch in batches if not all(map(self._is_embedded, batch))]

    def clips_left(self, batches: Batches, given_up: Container[str]) -> Batches:
        """Return which batches of a part are not encoded, apart from the samples in `given_up`."""
        return [batch for batch in batches if not all(self._is_encoded(name) or name in given_up for name in batch)]

    def write_captions(self, embeds: Mapping[str, torch.Tensor]) -> None:
        """Write a batch of prompt embeddings by caption key, once for every sample that has the caption."""
        for key, tensor in embeds.items():
            for name in self._names_of[key]:
                self._write_tensor("prompt_embeds", name, tensor)

    def write_clips(self, clips: Mapping[str, Tensors], videos: Mapping[str, torch.Tensor]) -> None:
        """Write a batch by sample name; `videos` are `[F, 3, H, W]`, uint8."""
        for name, video in videos.items():
            images = [Image.fromarray(frame) for frame in video.permute(0, 2, 3, 1).numpy()]
            with self._writing("videos", name) as path:
                write_video(path, images, self.preview_fps)
            with self._writing("prompts", name) as path:
                path.write_text(self._captions[name], encoding="utf-8")
            if self.with_images:
                with self._writing("images", name) as path:
                    images[0].save(path)
            for kind, tensor in clips.get(name, {}).items():
                # The original layout has one encoding of an image, without an axis for several.
                self._write_tensor(kind, name, tensor[0] if kind == "image_latents" else tensor)

    def missing(self, given_up: Container[str]) -> list[Sample]:
        """Return the samples that no rank has finished."""
        return [s for s in self.samples if not (self._is_encoded(s.name) and self._is_embedded(s.caption_key))]

    def write_index(self, samples: Sequence[Sample]) -> int:
        """Write the lists of finished samples. Returns how many other samples have files in the folder."""
        prompts, videos = LISTS
        captions = [" ".join(sample.planned.clip.caption.split()) for sample in samples]
        _write_text(self.folder, prompts, "".join(f"{caption}\n" for caption in captions))
        _write_text(self.folder, videos, "".join(f"videos/{sample.name}.mp4\n" for sample in samples))
        if self.with_tensors:
            entries = (
                sample_in_files(sample.name, sample.planned.bucket, with_images=self.with_images) | sample.origin()
                for sample in samples
            )
            _write_text(self.folder, FILES_INDEX, index_lines(entries))
        previewed = {path.stem for path in (self.folder / "videos").glob("[!.]*.mp4")}
        return len(previewed - {sample.name for sample in samples})

    def _is_embedded(self, caption_key: str) -> bool:
        names = self._names_of[caption_key] if self.with_tensors else []
        return all(self._file("prompt_embeds", name).is_file() for name in names)

    def _is_encoded(self, name: str) -> bool:
        kinds = ["videos", "prompts", *(["images"] if self.with_images else [])]
        if self.with_tensors:
            kinds += ["video_latents", *(["image_latents"] if self.with_images else [])]
        return all(self._file(kind, name).is_file() for kind in kinds)

    def _file(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}{_SUFFIXES.get(kind, '.pt')}"

    def _writing(self, kind: str, name: str) -> AbstractContextManager[Path]:
        return atomic_write(self._file(kind, name), staging=self.folder / STAGING)

    def _write_tensor(self, kind: str, name: str, tensor: torch.Tensor) -> None:
        # A file, because torch writes a path's name into the archive; a copy, because a slice would be saved with the
        # storage of its batch.
        with self._writing(kind, name) as path, path.open("wb") as file:
            torch.save(tensor.detach().cpu().clone(), file)


def _names_by_bucket(samples: Sequence[Sample]) -> dict[Bucket, list[str]]:
    """Return the names of each bucket's samples in their order, each name once."""
    names: dict[Bucket, dict[str, None]] = {}
    for sample in samples:
        names.setdefault(sample.planned.bucket, {})[sample.name] = None
    return {bucket: list(names[bucket]) for bucket in sorted(names)}


def _write_text(folder: Path, name: str, text: str) -> None:
    with atomic_write(folder / name, staging=folder / STAGING) as path:
        path.write_text(text, encoding="utf-8")


Layout = ShardLayout | FileLayout
