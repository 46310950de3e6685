"""Load clips as tensors: raw clips are decoded in DataLoader workers, prepared ones read; both become a `Batch`."""

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError, listing
from common.failures import WatchedDataset
from common.read_ahead import ReadAhead
from common.remote import is_used
from common.signals import outlive_signals
from data.buckets import Bucket
from data.clips import ClipSample
from data.sampler import Draw
from models.configs import ModelConfigs
from models.encoding import encode_mask
from models.prompts import PromptCache
from prepared.folder import read_tensor
from video.condition_frames import FIRST, given_frames
from video.controls import INPAINT, NOWHERE_WHITE, compute_control, has_white
from video.io import read_frames, reshape_frames
from video.probe import VideoInfo


if TYPE_CHECKING:
    from prepared.index import PreparedClip, PreparedIndex

logger = logging.getLogger(__name__)

LISTED = "listed"  # controls are clips, and not computed


@dataclass
class Batch:
    """Samples of one bucket. Tensors that a dataset does not have are None."""

    names: list[str]
    bucket: Bucket
    videos: torch.Tensor | None = None  # [B, F, 3, H, W], uint8
    images: torch.Tensor | None = None  # [B, N, 3, H, W], uint8: given frames for image-to-video
    video_moments: torch.Tensor | None = None  # [B, 2C, F', H / 8, W / 8], unscaled
    image_moments: torch.Tensor | None = None  # [B, 2C, M, H / 8, W / 8], of the noised images
    controls: torch.Tensor | None = None  # [B, F, 3, H, W], uint8: what control-to-video follows
    control_moments: torch.Tensor | None = None  # [B, 2C, F', H / 8, W / 8], unscaled
    masks: torch.Tensor | None = None  # [B, F', H / 8, W / 8], float16, in [0, 1]: where the loss counts
    prompt_embeds: torch.Tensor | None = None  # [B, 226, D]
    draws: list[Draw] = field(default_factory=list)
    failed: list[tuple[Draw, str]] = field(default_factory=list)  # undecodable clips with reasons; not in `draws`

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are not None, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors without waiting for the copies, which is safe from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Pin the tensors; DataLoader calls this with `pin_memory=True`."""
        return self._map(torch.Tensor.pin_memory)

    @property
    def parts(self) -> list["Batch"]:
        """The batch itself, as the only part of a batch of one bucket."""
        return [self]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors.items()})


@dataclass
class MixedBatch:
    """Samples of several buckets, a batch for each bucket; the transformer computes them as one sequence."""

    parts: list[Batch]

    @property
    def names(self) -> list[str]:
        """The samples' names, part by part."""
        return [name for part in self.parts for name in part.names]

    @property
    def draws(self) -> list[Draw]:
        """The samples' draws, part by part."""
        return [draw for part in self.parts for draw in part.draws]

    @property
    def failed(self) -> list[tuple[Draw, str]]:
        """Undecodable clips with reasons."""
        return [failure for part in self.parts for failure in part.failed]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of all parts, by part and field."""
        return {f"{n}.{name}": value for n, part in enumerate(self.parts) for name, value in part.tensors.items()}

    def to(self, device: torch.device) -> "MixedBatch":
        """Move the tensors without waiting for the copies, which is safe from pinned memory."""
        return MixedBatch([part.to(device) for part in self.parts])

    def pin_memory(self) -> "MixedBatch":
        """Pin the tensors; DataLoader calls this with `pin_memory=True`."""
        return MixedBatch([part.pin_memory() for part in self.parts])


@dataclass(eq=False)
class _Clips(Dataset):
    """Clips that a draw reads as a batch of one."""

    clips: "Sequence[ClipSample] | Sequence[PreparedClip]"

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: Draw) -> Batch:
        """Read a clip as a batch of one; if it cannot be read, as an empty batch with `failed`."""
        try:
            return self._read(draw)
        except ValueError as error:
            return self.failed(draw, str(error))

    def failed(self, draw: Draw, reason: str) -> Batch:
        """Return the empty batch of a clip that could not be read."""
        return Batch([], self.clips[draw.index].bucket, failed=[(draw, reason)])


@dataclass(eq=False)
class ClipDataset(_Clips):
    """Raw clips, which are decoded, resized and flipped when they are read.

    Together with the epoch and the clip's content, `seed` determines flips and random crops, whichever worker reads
    the clip and wherever it is listed.
    """

    _: KW_ONLY
    reshape_mode: str  # center, random or none, as in `reshape_frames`
    random_flip: float | None  # probability that a clip is mirrored left to right, drawn once per clip and epoch
    seed: int
    prompts: PromptCache | None = None  # the captions' embeddings; None omits `prompt_embeds`
    with_images: bool = False  # fill `images`, from the clip's own image and its frames
    condition_frames: str = FIRST  # which of its frames, as in `video.condition_frames`
    control: str | None = None  # fill `controls`: LISTED for the clips' own, or a kind of `video.controls`
    with_masks: bool = False  # fill `masks`
    replace_failed: bool = False  # replace an undecodable clip, so that batches keep their size on every rank
    decode_threads: int = 1  # for each clip; 0 lets the decoder choose
    has_warned: bool = field(default=False, init=False)  # of a black mask, as there may be many

    def __getitem__(self, draw: Draw) -> Batch:
        """Read a clip as a batch of one; with `replace_failed`, the next readable one of its bucket if it fails."""
        batch = super().__getitem__(draw)
        if not (batch.failed and self.replace_failed):
            return batch
        logger.warning("warning: a clip that does not decode is replaced by another one: %s", batch.failed[0][1])
        failed = self.clips[draw.index].clip
        for index in [*range(draw.index + 1, len(self)), *range(draw.index)]:
            planned = self.clips[index]
            if planned.bucket == batch.bucket and planned.clip.regularization == failed.regularization:
                other = super().__getitem__(Draw(index, draw.epoch))
                if not other.failed:
                    # With the noise of the failed clip, as this one also has a draw of its own.
                    return replace(other, draws=[draw])
        return batch

    def files_of(self, draw: Draw) -> list[Path]:
        """Return the files that a draw reads."""
        clip = self.clips[draw.index].clip
        others = [clip.image] if self.with_images else []
        others += [clip.control] if self.control == LISTED else []
        others += [clip.mask] if self.with_masks or self.control == INPAINT else []
        return [clip.video, *(file for file in others if file is not None)]

    def name_of(self, index: int) -> str:
        """Return a clip's name for messages: its file, and where it is listed."""
        clip = self.clips[index].clip
        return f"{clip.video} ({clip.source})"

    def _read(self, draw: Draw) -> Batch:
        planned = self.clips[draw.index]
        clip = planned.clip
        frames = read_frames(clip.video, planned.frame_indices, self.decode_threads, seekable=planned.info.seekable)
        video = self._shape(frames, planned, draw.epoch)
        images, mask = None, None
        if (self.with_masks or self.control == INPAINT) and planned.mask is not None:
            mask = self._companion(clip.mask, planned.mask, planned, draw.epoch)
        loss_mask = None if clip.regularization else mask  # that counts everywhere, also if its control needs the mask
        if self.with_images:
            images = video[given_frames(self.condition_frames, len(video))]
            # The image of a split clip belongs to its first part.
            if clip.image is not None and planned.part == 0:
                images[:1] = self._shape(read_frames(clip.image, [0]), planned, draw.epoch)
        return Batch(
            bucket=planned.bucket,
            draws=[draw],
            names=[str(clip.video)],
            videos=video[None],
            images=None if images is None else images[None],
            controls=None if self.control is None else self._control(video, mask, planned, draw.epoch)[None],
            masks=_latent_mask(loss_mask, planned.bucket)[None] if self.with_masks else None,
            prompt_embeds=None if self.prompts is None else self.prompts.load(clip.caption)[None],
        )

    def _control(
        self, video: torch.Tensor, mask: torch.Tensor | None, planned: ClipSample, epoch: int
    ) -> torch.Tensor:
        """Return the control of a clip's shaped frames, `[F, 3, H, W]`: the same frames, cropped and flipped alike."""
        if self.control != LISTED:
            masks = None if mask is None else mask.permute(0, 2, 3, 1).numpy()
            computed = compute_control(video.permute(0, 2, 3, 1).numpy(), self.control, masks)
            return torch.from_numpy(computed).permute(0, 3, 1, 2)
        return self._companion(planned.clip.control, planned.control, planned, epoch)

    def _companion(self, file: Path, info: VideoInfo, planned: ClipSample, epoch: int) -> torch.Tensor:
        """Return the frames of a control or a mask that belong to those of a clip, `[F, 3, H, W]`; a still to all."""
        indices = planned.frame_indices if info.num_frames > 1 else [0]
        frames = read_frames(file, indices, self.decode_threads, seekable=info.seekable)
        if file == planned.clip.mask and not has_white(frames):  # wherever it is cropped
            if self.control == INPAINT:
                raise ValueError(f"nothing to fill, because the mask {file} {NOWHERE_WHITE}")
            if not self.has_warned:
                logger.warning("warning: a sample may teach nothing, because its mask %s %s", file, NOWHERE_WHITE)
            self.has_warned = True
        return self._shape(frames, planned, epoch).expand(len(planned.frame_indices), -1, -1, -1)

    def _shape(self, frames: np.ndarray, planned: ClipSample, epoch: int) -> torch.Tensor:
        """Resize `[F, H, W, 3]` to `[F, 3, H, W]` in the bucket's size; clip and image get the same crop and flip."""
        chance = random.Random(f"{self.seed}-{epoch}-{planned.info.sha256}-{planned.frame_indices[0]}")
        _, height, width = planned.bucket
        shaped = reshape_frames(torch.from_numpy(frames).permute(0, 3, 1, 2), height, width, self.reshape_mode, chance)
        return shaped.flip(-1) if chance.random() < (self.random_flip or 0) else shaped


@dataclass(eq=False)
class PreparedDataset(_Clips):
    """Moments and embeddings written by `prepare_dataset.py`."""

    with_images: bool = field(default=False, kw_only=True)  # fill `image_moments`
    with_controls: bool = field(default=False, kw_only=True)  # fill `control_moments`
    with_masks: bool = field(default=False, kw_only=True)  # fill `masks`

    def files_of(self, draw: Draw) -> list[Path]:
        """Return the files that a draw reads."""
        clip = self.clips[draw.index]
        return [clip.video_latents.file, clip.prompt_embeds.file]

    def name_of(self, index: int) -> str:
        """Return a sample's name for messages, with the file of its latents."""
        clip = self.clips[index]
        return f"{clip.name} ({clip.video_latents.file})"

    def _read(self, draw: Draw) -> Batch:
        clip = self.clips[draw.index]
        image_moments = read_tensor(clip.image_latents) if self.with_images else None
        # The encodings of an image were prepared under different noise; the original script wrote only one.
        if self.with_images and image_moments.ndim > 4:
            chance = random.Random(f"{clip.name}-{draw.epoch}-{draw.copy}")
            image_moments = image_moments[chance.randrange(len(image_moments))]
        return Batch(
            bucket=clip.bucket,
            draws=[draw],
            names=[clip.name],
            video_moments=read_tensor(clip.video_latents)[None],
            image_moments=image_moments[None] if self.with_images else None,
            control_moments=read_tensor(clip.control_latents)[None] if self.with_controls else None,
            masks=self._mask(clip)[None] if self.with_masks else None,
            prompt_embeds=read_tensor(clip.prompt_embeds)[None],
        )

    def _mask(self, clip: "PreparedClip") -> torch.Tensor:
        return _latent_mask(None, clip.bucket) if clip.mask is None else read_tensor(clip.mask)


def _latent_mask(frames: torch.Tensor | None, bucket: Bucket) -> torch.Tensor:
    """Return a mask at the size of the latents, `[F', H / 8, W / 8]`; without frames, the loss counts everywhere."""
    return torch.ones(bucket.latent_shape, dtype=torch.float16) if frames is None else encode_mask(frames)


def collate(samples: Sequence[Batch]) -> Batch | MixedBatch:
    """Join samples to a batch, or to a mixed one if they are of several buckets."""
    by_bucket: dict[Bucket, list[Batch]] = {}
    for sample in samples:
        by_bucket.setdefault(sample.bucket, []).append(sample)
    parts = [_join(of_bucket) for of_bucket in by_bucket.values()]
    return parts[0] if len(parts) == 1 else MixedBatch(parts)


def _join(samples: Sequence[Batch]) -> Batch:
    tensors = [sample.tensors for sample in samples if sample.names]
    return Batch(
        bucket=samples[0].bucket,
        draws=[draw for sample in samples for draw in sample.draws],
        names=[name for sample in samples for name in sample.names],
        failed=[failure for sample in samples for failure in sample.failed],
        **{name: torch.cat([parts[name] for parts in tensors]) for name in next(iter(tensors), {})},
    )


def without_failures(batches: Iterable[Batch | MixedBatch]) -> Iterator[Batch | MixedBatch]:
    """Yield the batches; raise a UserError at the first clip that cannot be read."""
    for batch in batches:
        if batch.failed:
            title = "a clip cannot be read; fix or remove it, or (raw clips only) skip it with --on_bad_clip skip:"
            raise UserError(listing(title, [reason for _, reason in batch.failed]))
        yield batch


def make_loader(
    dataset: Dataset, batches: Iterable[list[Draw]], *, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """Load batches in the given order, in `num_workers` processes (0 for this process)."""
    if is_used() and not isinstance(batches, Iterator):  # which can be iterated over only once
        batches = ReadAhead(batches, dataset.files_of)
    return DataLoader(
        WatchedDataset(dataset, num_workers),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),  # torch warns about it without a GPU
        # The loader draws a base seed; drawn from the global generator, it would change the training's random numbers.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_start_worker,
    )


def _start_worker(number: int) -> None:
    outlive_signals()


def check_prepared(clips: "PreparedIndex", configs: ModelConfigs, *, with_masks: bool = False) -> None:
    """Check that a clip's tensors fit the model, and that no image latents, control latents or masks are missing."""
    clip = clips[0]
    condition = "image" if configs.is_image_to_video else "control"
    if configs.takes_condition and (without := clips.without(f"{condition}_latents")):
        what = f"{len(without)} samples were prepared without {condition} latents, which {condition}-to-video needs"
        command = "MODEL_PATH=... CLIPS=my-clips PREPARED=my-prepared bash prepare_dataset.sh"
        again = f"prepare the clips again, into a new folder: {command} --save_{condition}_latents"
        raise UserError(listing(f"--load_tensors: {what}; {again}", without))
    trained = clips if clips.regularization is None else clips.without_regularization()
    if with_masks and (without := trained.without("mask")):
        title = (
            f"--use_masks: {len(without)} samples were prepared without masks; prepare the clips again, into a new "
        )
        raise UserError(listing(f"{title}folder, with --use_masks:", without))
    try:
        channels = read_tensor(clip.video_latents).shape[0]
        length, text_dim = read_tensor(clip.prompt_embeds).shape
    except ValueError as error:
        raise UserError(f"--load_tensors: {error}; remove the file and prepare the data again") from error
    tokens = configs.transformer["max_text_seq_length"]
    if length != tokens:
        raise UserError(
            f"--load_tensors: {clip.prompt_embeds.file} has {length} tokens, the model takes {tokens}; prepare the "
            f"data with --max_sequence_length {tokens}"
        )
    expected = (2 * configs.vae["latent_channels"], configs.transformer["text_embed_dim"])
    if (channels, text_dim) != expected:
        raise UserError(
            f"--load_tensors: {clip.video_latents.file} and its prompt embedding have {channels} and {text_dim} "
            f"channels; the model needs {expected[0]} and {expected[1]}: prepare the data with the model to train"
        )


class DeviceCopies:
    """Copies batches to a device, on a GPU in a separate stream, so that no copy waits for the computation.

    The training loop runs ahead of the GPU: when it asks for a batch, the GPU is still computing the steps before, and
    the copy finishes meanwhile. From pinned memory the loop does not wait for the copy either.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch | MixedBatch) -> Batch | MixedBatch:
        """Return the batch on the device, ready for the computations that follow."""
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            moved = batch.to(self.device)
        computation = torch.cuda.current_stream(self.device)
        computation.wait_stream(self.stream)
        for tensor in moved.tensors.values():
            # The memory belongs to the side stream, which would otherwise reuse it for the next batch too early.
            tensor.record_stream(computation)
        return moved
