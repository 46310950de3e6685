"""Clips as tensors: raw ones decoded in DataLoader workers, prepared ones read from disk; both become a `Batch`."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from buckets import Bucket, Draw
from clips import PlannedClip
from errors import UserError
from models import ModelConfigs
from prepared import PreparedClip, read_tensor
from prompts import PromptCache
from video import flip_frames, read_frames, reshape_frames


@dataclass
class Batch:
    """Samples of one bucket. What a dataset does not have is None."""

    names: list[str]
    bucket: Bucket
    videos: torch.Tensor | None = None  # [B, F, 3, H, W], uint8
    video_moments: torch.Tensor | None = None  # [B, 2C, F', H / 8, W / 8], unscaled
    prompt_embeds: torch.Tensor | None = None  # [B, 226, D]

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
        seed: of flips and random crops; with epoch and index it decides them, whatever worker reads the clip.
        prompts: where the captions' embeddings are; None leaves `prompt_embeds` out.
        decode_threads: of the decoder, for each clip; 0 lets it choose.
    """

    def __init__(
        self,
        clips: Sequence[PlannedClip],
        *,
        reshape_mode: str,
        random_flip: float | None,
        seed: int,
        prompts: PromptCache | None = None,
        decode_threads: int = 1,
    ):
        self.clips = clips
        self.reshape_mode = reshape_mode
        self.random_flip = random_flip or 0.0
        self.seed = seed
        self.prompts = prompts
        self.decode_threads = decode_threads

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: Draw) -> Batch:
        """Read one clip as a batch of one."""
        planned = self.clips[draw.index]
        chance = random.Random(f"{self.seed}-{draw.epoch}-{draw.index}")
        frames = torch.from_numpy(read_frames(planned.clip.video, planned.frame_indices, self.decode_threads)).permute(
            0, 3, 1, 2
        )
        video = reshape_frames(frames, planned.bucket.height, planned.bucket.width, self.reshape_mode, chance)
        if chance.random() < self.random_flip:
            video = flip_frames(video)
        return Batch(
            names=[str(planned.clip.video)],
            bucket=planned.bucket,
            videos=video[None],
            prompt_embeds=None if self.prompts is None else self.prompts.load(planned.clip.caption)[None],
        )


class PreparedDataset(Dataset):
    """Moments and embeddings that `prepare_dataset.py` wrote."""

    def __init__(self, clips: Sequence[PreparedClip]):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: Draw) -> Batch:
        """Read one clip as a batch of one."""
        clip = self.clips[draw.index]
        return Batch(
            names=[clip.name],
            bucket=clip.bucket,
            video_moments=read_tensor(clip.video_latents)[None],
            prompt_embeds=read_tensor(clip.prompt_embeds)[None],
        )


def collate(samples: Sequence[Batch]) -> Batch:
    """Join batches of one bucket."""

    def joined(name: str) -> torch.Tensor | None:
        tensors = [getattr(sample, name) for sample in samples]
        return None if tensors[0] is None else torch.cat(tensors)

    return Batch(
        names=[name for sample in samples for name in sample.names],
        bucket=samples[0].bucket,
        videos=joined("videos"),
        video_moments=joined("video_moments"),
        prompt_embeds=joined("prompt_embeds"),
    )


def make_loader(
    dataset: Dataset, batches: Iterable[list[Draw]], *, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """Load batches in `num_workers` processes (0: in this one), in the order given.

    Args:
        batches: one pass over them is one pass over the loader.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),  # torch warns about it where there is no GPU
        # A loader takes a base seed from a generator; from the global one it would move the training's random numbers.
        generator=torch.Generator().manual_seed(0),
    )


def check_prepared(clip: PreparedClip, configs: ModelConfigs) -> None:
    """Check by one clip that the tensors of a prepared folder fit the model.

    Raises:
        UserError: they were prepared with a model of another shape.
    """
    try:
        channels = read_tensor(clip.video_latents).shape[0]
        length, text_dim = read_tensor(clip.prompt_embeds).shape
    except ValueError as error:
        raise UserError(f"--load_tensors: {error}; remove the file and prepare the data again") from error
    tokens = configs.transformer["max_text_seq_length"]
    if length != tokens:
        raise UserError(
            f"--load_tensors: {clip.prompt_embeds} is {length} tokens long, the model takes {tokens}; prepare the "
            f"data with --max_sequence_length {tokens}"
        )
    expected = (2 * configs.vae["latent_channels"], configs.transformer["text_embed_dim"])
    if (channels, text_dim) != expected:
        raise UserError(
            f"--load_tensors: {clip.video_latents} and its prompt embedding have {channels} and {text_dim} channels; "
            f"the model needs {expected[0]} and {expected[1]}: prepare the data with the model to be trained"
        )
