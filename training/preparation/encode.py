"""Encode captions and clips of a preparation, batch by batch, into its layout."""

import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX

from common.bars import tqdm
from common.files import atomic_write
from common.ranks import launch_rank, launch_size, local_rank
from data.clips import BadClip, ClipSample
from data.prepared import (
    STAGING,
    read_empty_prompt,
    write_empty_prompt,
)
from data.sampler import Draw
from dataset import Batch, ClipDataset, make_loader
from diffusion.latents import image_noise_scales
from diffusion.randomness import step_generator
from flags.settings import PreparationSettings
from models.configs import DTYPES
from models.encoding import encode_noised_image, encode_prompts, encode_videos
from models.source import ModelSource
from preparation.layouts import Layout, Sample


@dataclass(frozen=True)
class Rank:
    """This process among those of the launch, as torchrun and `accelerate launch` tell it."""

    index: int
    count: int
    device: torch.device

    @staticmethod
    def of_environment() -> "Rank":
        """Read it; a process of its own is the only one."""
        device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
        return Rank(launch_rank(), launch_size(), device)


def clip_dataset(settings: PreparationSettings, clips: Sequence[ClipSample]) -> ClipDataset:
    """The clips as they are to be encoded."""
    return ClipDataset(
        clips,
        reshape_mode=settings.clips.video_reshape_mode,
        random_flip=settings.clips.random_flip,
        seed=settings.preparation.seed,
        with_images=settings.preparation.save_image_latents,
        decode_threads=settings.encoding.num_decode_threads,
    )


def embed_captions(
    settings: PreparationSettings, source: ModelSource, layout: Layout, samples: Sequence[Sample], rank: Rank
) -> None:
    """Embed each caption of this rank's share that is not embedded yet, once; rank 0 embeds the empty prompt too."""
    batches = layout.captions_to_do(settings.encoding.batch_size, rank.index, rank.count)
    needs_empty_prompt = rank.index == 0 and read_empty_prompt(layout.folder) is None
    if not batches and not needs_empty_prompt:
        return
    captions = {sample.caption_key: sample.planned.clip.caption for sample in samples}
    pipeline = source.load_text_pipeline(
        DTYPES[settings.model.dtype], device=rank.device, in_8bit=settings.encoding.text_encoder_8bit
    )
    if needs_empty_prompt:
        # What dropped captions become in training, where no text encoder is loaded.
        write_empty_prompt(layout.folder, encode_prompts(pipeline, [""], settings.preparation.max_sequence_length)[0])
    with progress_bar("Embedding captions", " captions", batches, rank) as progress:
        for keys in batches:
            embeds = encode_prompts(
                pipeline, [captions[key] for key in keys], settings.preparation.max_sequence_length
            )
            layout.write_captions(dict(zip(keys, embeds, strict=True)))
            progress.update(len(keys))


def encode_clips(
    settings: PreparationSettings, source: ModelSource, layout: Layout, samples: Sequence[Sample], rank: Rank
) -> None:
    """Decode, encode and write this rank's share of the clips that are not done; the three overlap."""
    batches = layout.clips_to_do(settings.encoding.batch_size, rank.index, rank.count)
    if not batches:
        return
    index_of = {sample.name: index for index, sample in enumerate(samples)}
    broken = BrokenClips(layout.folder)
    for names in batches:
        broken.forget(names)
    vae = None
    if settings.preparation.save_latents_and_embeddings:
        vae = source.load_vae(
            DTYPES[settings.model.dtype],
            slicing=settings.encoding.use_slicing,
            tiling=settings.encoding.use_tiling,
            device=rank.device,
        )
    loader = make_loader(
        clip_dataset(settings, [sample.planned for sample in samples]),
        [[Draw(index_of[name], 0) for name in batch] for batch in batches],
        num_workers=settings.loader.dataloader_num_workers,
        pin_memory=settings.loader.pin_memory,
    )
    writing: deque[Future] = deque()
    with (
        progress_bar("Encoding clips", " clips", batches, rank) as progress,
        ThreadPoolExecutor(settings.encoding.num_artifact_workers) as writers,
    ):
        for names, batch in zip(batches, loader, strict=True):
            for draw, reason in batch.failed:
                clip = samples[draw.index].planned.clip
                broken.add(samples[draw.index], reason.removeprefix(f"{clip.video}: "))
            names_left = [samples[draw.index].name for draw in batch.draws]
            if names_left:
                tensors = {} if vae is None else encode_batch(settings, vae, batch, names_left)
                videos = dict(zip(names_left, batch.videos, strict=True))
                writing.append(writers.submit(layout.write_clips, tensors, videos))
            # Waiting for the oldest bounds how many clips lie in memory, and brings a writer's error to light.
            while len(writing) > 2 * settings.encoding.num_artifact_workers:
                writing.popleft().result()
            progress.update(len(names))
        for future in writing:
            future.result()


def encode_batch(
    settings: PreparationSettings, vae: AutoencoderKLCogVideoX, batch: Batch, names: Sequence[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Encode a batch to moments, by name: `video_latents` `[2C, F', h, w]`, maybe `image_latents` `[K, 2C, 1, h, w]`.

    The image of an image-to-video sample is encoded K times, under noise of different strength: the objective wants
    fresh noise on the pixels at every step, and training must not need the VAE. A step picks one of the K.
    """
    moments = encode_videos(vae, batch.videos).cpu()
    tensors = {name: {"video_latents": moments[position]} for position, name in enumerate(names)}
    if settings.preparation.save_image_latents:
        for position, name in enumerate(names):
            generator = step_generator(torch.device("cpu"), settings.preparation.seed, name)
            scales = image_noise_scales(settings.preparation.num_image_latents, generator)
            image = encode_noised_image(vae, batch.images[position], scales, generator)
            tensors[name]["image_latents"] = image.cpu()
    return tensors


class BrokenClips:
    """Notes on clips that were probed but did not decode, for whichever rank comes last."""

    def __init__(self, folder: Path):
        self.folder = folder / STAGING / "broken"

    def add(self, sample: Sample, reason: str) -> None:
        """Note a sample whose clip cannot be decoded."""
        clip = sample.planned.clip
        with atomic_write(self.folder / f"{sample.name}.json") as path:
            path.write_text(json.dumps([str(clip.video), clip.source, reason]), encoding="utf-8")

    def forget(self, names: Sequence[str]) -> None:
        """Drop the notes of an earlier run on samples that this rank tries again."""
        for name in names:
            (self.folder / f"{name}.json").unlink(missing_ok=True)

    def read(self) -> dict[str, BadClip]:
        """All notes, by sample name."""
        return {
            path.stem: BadClip(*json.loads(path.read_text(encoding="utf-8")))
            for path in self.folder.glob("[!.]*.json")
        }


def progress_bar(title: str, unit: str, batches: Sequence[Sequence[str]], rank: Rank) -> tqdm:
    """A bar over the items of this rank's batches; only the first rank shows its own."""
    return tqdm(total=sum(map(len, batches)), desc=title, unit=unit, delay=0, disable=rank.index != 0)
