"""Clips as tensors: raw ones decoded in DataLoader workers, prepared ones read from disk; both become a `Batch`."""

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError, listing
from common.failures import WatchedDataset
from common.signals import outlive_signals
from data.buckets import Bucket
from data.clips import ClipSample
from data.prepared import PreparedClip, read_tensor
from data.sampler import Draw
from models.configs import ModelConfigs
from models.prompts import PromptCache
from video.io import read_frames, reshape_frames


logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """Samples of one bucket. What a dataset does not have is None."""

    names: list[str]
    bucket: Bucket
    videos: torch.Tensor | None = None  # [B, F, 3, H, W], uint8
    images: torch.Tensor | None = None  # [B, 3, H, W], uint8: what image-to-video starts from
    video_moments: torch.Tensor | None = None  # [B, 2C, F', H / 8, W / 8], unscaled
    image_moments: torch.Tensor | None = None  # [B, 2C, 1, H / 8, W / 8], of the image under noise
    prompt_embeds: torch.Tensor | None = None  # [B, 226, D]
    draws: list[Draw] = field(default_factory=list)
    failed: list[tuple[Draw, str]] = field(default_factory=list)  # clips that do not decode, and why; not in `draws`

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors without waiting for the copies, which is safe from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader with `pin_memory=True`."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Any) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if isinstance(v, torch.Tensor)})


class ClipDataset(Dataset):
    """Clips decoded, resized and flipped when asked for.

    Args:
        clips: planned, so that frames and bucket of each are known.
        reshape_mode: center, random or none, as `video.reshape_frames` takes it.
        random_flip: probability that a clip is mirrored left to right, drawn once per clip and epoch.
        seed: of flips and random crops; with the epoch and the clip's content it decides them, whatever worker reads
            the clip and wherever in the list it stands.
        prompts: where the captions' embeddings are; None leaves `prompt_embeds` out.
        with_images: fill `images`, from the clip's own image or its first frame.
        replace_failed: draw the next clip of the same bucket in the place of one that does not decode, with a warning,
            so that batches keep their size on every rank.
        decode_threads: of the decoder, for each clip; 0 lets it choose.
    """

    def __init__(
        self,
        clips: Sequence[ClipSample],
        *,
        reshape_mode: str,
        random_flip: float | None,
        seed: int,
        prompts: PromptCache | None = None,
        with_images: bool = False,
        replace_failed: bool = False,
        decode_threads: int = 1,
    ):
        self.clips = clips
        self.reshape_mode = reshape_mode
        self.random_flip = random_flip or 0.0
        self.seed = seed
        self.prompts = prompts
        self.with_images = with_images
        self.replace_failed = replace_failed
        self.decode_threads = decode_threads

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: Draw) -> Batch:
        """Read one clip as a batch of one; of none, with `failed`, where it cannot be decoded."""
        try:
            return self._read(draw)
        except ValueError as error:
            if self.replace_failed:
                logger.warning("warning: another clip takes the place of one that does not decode: %s", error)
                for index in self._others_of_bucket(draw.index):
                    with suppress(ValueError):
                        # With the noise of the one that it stands for: it has a draw of its own elsewhere.
                        return replace(self._read(Draw(index, draw.epoch)), draws=[draw])
            return self.failed(draw, str(error))

    def name_of(self, index: int) -> str:
        """A clip as messages name it: its file, and where that is listed."""
        clip = self.clips[index].clip
        return f"{clip.video} ({clip.source})"

    def failed(self, draw: Draw, reason: str) -> Batch:
        """What stands for a clip that could not be read."""
        return Batch([], self.clips[draw.index].bucket, failed=[(draw, reason)])

    def _others_of_bucket(self, index: int) -> Iterator[int]:
        order = [*range(index + 1, len(self.clips)), *range(index)]
        return (other for other in order if self.clips[other].bucket == self.clips[index].bucket)

    def _read(self, draw: Draw) -> Batch:
        planned = self.clips[draw.index]
        clip = planned.clip
        frames = read_frames(clip.video, planned.frame_indices, self.decode_threads, seekable=planned.info.seekable)
        video = self._shape(frames, planned, draw.epoch)
        image = None
        if self.with_images:
            # The image of a clip that is split is where its first part starts.
            own = clip.image is None or planned.part > 0
            image = video[0] if own else self._shape(read_frames(clip.image, [0]), planned, draw.epoch)[0]
        return Batch(
            bucket=planned.bucket,
            draws=[draw],
            names=[str(clip.video)],
            videos=video[None],
            images=None if image is None else image[None],
            prompt_embeds=None if self.prompts is None else self.prompts.load(clip.caption)[None],
        )

    def _shape(self, frames: np.ndarray, planned: ClipSample, epoch: int) -> torch.Tensor:
        """`[F, H, W, 3]` of any size to `[F, 3, H, W]` of the bucket's; clip and image are cut and flipped alike."""
        chance = random.Random(f"{self.seed}-{epoch}-{planned.info.sha256}-{planned.frame_indices[0]}")
        _, height, width = planned.bucket
        shaped = reshape_frames(torch.from_numpy(frames).permute(0, 3, 1, 2), height, width, self.reshape_mode, chance)
        return shaped.flip(-1) if chance.random() < self.random_flip else shaped


class PreparedDataset(Dataset):
    """Moments and embeddings that `prepare_dataset.py` wrote.

    Args:
        clips: as from `read_index`.
        with_images: fill `image_moments`.
    """

    def __init__(self, clips: Sequence[PreparedClip], *, with_images: bool = False):
        self.clips = clips
        self.with_images = with_images

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: Draw) -> Batch:
        """Read one clip as a batch of one; of none, with `failed`, where its files cannot be read."""
        try:
            return self._read(draw)
        except ValueError as error:
            return self.failed(draw, str(error))

    def name_of(self, index: int) -> str:
        """A sample as messages name it: its own name, and the file of its latents."""
        clip = self.clips[index]
        return f"{clip.name} ({clip.video_latents.file})"

    def failed(self, draw: Draw, reason: str) -> Batch:
        """What stands for a sample that could not be read."""
        return Batch([], self.clips[draw.index].bucket, failed=[(draw, reason)])

    def _read(self, draw: Draw) -> Batch:
        clip = self.clips[draw.index]
        return Batch(
            bucket=clip.bucket,
            draws=[draw],
            names=[clip.name],
            video_moments=read_tensor(clip.video_latents)[None],
            image_moments=self._image_moments(clip, draw)[None] if self.with_images else None,
            prompt_embeds=read_tensor(clip.prompt_embeds)[None],
        )

    def _image_moments(self, clip: PreparedClip, draw: Draw) -> torch.Tensor:
        """The image under one of the strengths of noise that it was prepared with, another another time."""
        moments = read_tensor(clip.image_latents)
        if moments.ndim == 4:  # the original script wrote one encoding
            return moments
        return moments[random.Random(f"{clip.name}-{draw.epoch}-{draw.copy}").randrange(len(moments))]


def collate(samples: Sequence[Batch]) -> Batch:
    """Join batches of one bucket."""

    def joined(name: str) -> torch.Tensor | None:
        tensors = [tensor for sample in samples if (tensor := getattr(sample, name)) is not None]
        return torch.cat(tensors) if tensors else None

    return Batch(
        bucket=samples[0].bucket,
        draws=[draw for sample in samples for draw in sample.draws],
        names=[name for sample in samples for name in sample.names],
        videos=joined("videos"),
        images=joined("images"),
        video_moments=joined("video_moments"),
        image_moments=joined("image_moments"),
        prompt_embeds=joined("prompt_embeds"),
        failed=[failure for sample in samples for failure in sample.failed],
    )


def without_failures(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, as long as every clip of them decodes.

    Raises:
        UserError: one does not.
    """
    for batch in batches:
        if batch.failed:
            title = "a clip cannot be read; mend or remove it, or (with raw clips) leave it out by --on_bad_clip skip:"
            raise UserError(listing(title, [reason for _, reason in batch.failed]))
        yield batch


def make_loader(
    dataset: Dataset, batches: Iterable[list[Draw]], *, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """Load batches in `num_workers` processes (0: in this one), in the order given.

    Args:
        batches: one pass over them is one pass over the loader.
    """
    return DataLoader(
        WatchedDataset(dataset, num_workers),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),  # torch warns about it where there is no GPU
        # A loader takes a base seed from a generator; from the global one it would move the training's random numbers.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_start_worker,
    )


def _start_worker(number: int) -> None:
    outlive_signals()


def check_prepared(clips: Sequence[PreparedClip], configs: ModelConfigs) -> None:
    """Check, by one clip, that the tensors of prepared folders fit the model, and that no image latents are missing.

    Raises:
        UserError: they were prepared with a model of another shape, or without images for an image-to-video model.
    """
    clip = clips[0]
    without = [clip.name for clip in clips if clip.image_latents is None] if configs.is_image_to_video else []
    if without:
        title = (
            f"--load_tensors: {len(without)} samples were prepared without image latents, which image-to-video needs"
        )
        raise UserError(listing(f"{title}; prepare the data again with --save_image_latents:", without))
    try:
        channels = read_tensor(clip.video_latents).shape[0]
        length, text_dim = read_tensor(clip.prompt_embeds).shape
    except ValueError as error:
        raise UserError(f"--load_tensors: {error}; remove the file and prepare the data again") from error
    tokens = configs.transformer["max_text_seq_length"]
    if length != tokens:
        raise UserError(
            f"--load_tensors: {clip.prompt_embeds.file} is {length} tokens long, the model takes {tokens}; prepare "
            f"the data with --max_sequence_length {tokens}"
        )
    expected = (2 * configs.vae["latent_channels"], configs.transformer["text_embed_dim"])
    if (channels, text_dim) != expected:
        raise UserError(
            f"--load_tensors: {clip.video_latents.file} and its prompt embedding have {channels} and {text_dim} "
            f"channels; the model needs {expected[0]} and {expected[1]}: prepare the data with the model to be trained"
        )


class DeviceCopies:
    """Copies batches to a device; on a GPU by a stream of their own, so that no copy waits for the computation.

    The training loop does not wait for the GPU: when it asks for a batch, the GPU is still busy with what came before,
    and the copy is done before the computation comes to it. From pinned memory the loop does not wait for the copy
    either.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device, ready for what is computed there from now on."""
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            moved = batch.to(self.device)
        computation = torch.cuda.current_stream(self.device)
        computation.wait_stream(self.stream)
        for tensor in (getattr(moved, part.name) for part in fields(moved)):
            if isinstance(tensor, torch.Tensor):
                # The memory is the side stream's: without this it would copy the next batch over one still in use.
                tensor.record_stream(computation)
        return moved
