"""Encode the captions and clips of a preparation in batches, and write them in its layout."""

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
from common.remote import on_this_machine
from data.clips import BadClip, ClipSample
from data.prepared import STAGING, read_empty_prompt, write_empty_prompt
from data.sampler import Draw
from dataset import Batch, ClipDataset, make_loader
from diffusion.latents import image_noise_scales
from diffusion.randomness import step_generator
from flags.preparation import PreparationFlags
from flags.settings import PreparationSettings
from models.configs import CPU, DTYPES
from models.encoding import encode_noised_image, encode_prompts, encode_videos
from models.source import ModelSource
from preparation.layouts import Layout, Sample


@dataclass(frozen=True)
class Preparation:
    """What is prepared, and this rank's place in the launch."""

    settings: PreparationSettings
    source: ModelSource
    layout: Layout
    samples: Sequence[Sample]  # of all ranks
    rank: int
    num_ranks: int
    device: torch.device

    def progress_bar(self, title: str, unit: str, batches: Sequence[Sequence[str]]) -> tqdm:
        """Return a bar over the items of this rank's batches; only the first rank shows its own."""
        return tqdm(total=sum(map(len, batches)), desc=title, unit=unit, delay=0, disable=self.rank != 0)


def clip_dataset(settings: PreparationSettings, clips: Sequence[ClipSample]) -> ClipDataset:
    """Return the clips as they are encoded."""
    return ClipDataset(
        clips,
        reshape_mode=settings.clips.video_reshape_mode,
        random_flip=settings.clips.random_flip,
        seed=settings.preparation.seed,
        with_images=settings.preparation.save_image_latents,
        decode_threads=settings.encoding.num_decode_threads,
    )


def embed_captions(work: Preparation) -> None:
    """Embed each caption of this rank's share once, unless it is done; rank 0 embeds the empty prompt too."""
    layout, encoding = work.layout, work.settings.encoding
    max_length = work.settings.preparation.max_sequence_length
    batches = layout.captions_to_do(encoding.batch_size, work.rank, work.num_ranks)
    needs_empty_prompt = work.rank == 0 and read_empty_prompt(layout.folder) is None
    if not batches and not needs_empty_prompt:
        return
    captions = {sample.caption_key: sample.planned.clip.caption for sample in work.samples}
    dtype = DTYPES[work.settings.model.dtype]
    pipeline = work.source.load_text_pipeline(dtype, device=work.device, in_8bit=encoding.text_encoder_8bit)
    if needs_empty_prompt:
        # Replaces dropped captions in training, where no text encoder is loaded.
        write_empty_prompt(layout.folder, encode_prompts(pipeline, [""], max_length)[0])
    with work.progress_bar("Embedding captions", " captions", batches) as progress:
        for keys in batches:
            embeds = encode_prompts(pipeline, [captions[key] for key in keys], max_length)
            layout.write_captions(dict(zip(keys, embeds, strict=True)))
            progress.update(len(keys))


def encode_clips(work: Preparation) -> None:
    """Decode, encode and write this rank's share of the clips that are not done; the three overlap."""
    settings, encoding, samples = work.settings, work.settings.encoding, work.samples
    batches = work.layout.clips_to_do(encoding.batch_size, work.rank, work.num_ranks)
    if not batches:
        return
    index_of = {sample.name: index for index, sample in enumerate(samples)}
    broken = BrokenClips(work.layout.folder)
    for names in batches:
        broken.forget(names)
    vae = None
    if settings.preparation.save_latents_and_embeddings:
        dtype, slicing, tiling = DTYPES[settings.model.dtype], encoding.use_slicing, encoding.use_tiling
        vae = work.source.load_vae(dtype, slicing=slicing, tiling=tiling, device=work.device)
    loader = make_loader(
        clip_dataset(settings, [sample.planned for sample in samples]),
        [[Draw(index_of[name], 0) for name in batch] for batch in batches],
        num_workers=settings.loader.dataloader_num_workers,
        pin_memory=settings.loader.pin_memory,
    )
    writing: deque[Future] = deque()
    with (
        work.progress_bar("Encoding clips", " clips", batches) as progress,
        ThreadPoolExecutor(encoding.num_artifact_workers) as writers,
    ):
        for names, batch in zip(batches, loader, strict=True):
            for draw, reason in batch.failed:
                broken.add(samples[draw.index], reason)
            decoded = [samples[draw.index].name for draw in batch.draws]
            if decoded:
                tensors = {} if vae is None else encode_batch(settings.preparation, vae, batch, decoded)
                videos = dict(zip(decoded, batch.videos, strict=True))
                writing.append(writers.submit(work.layout.write_clips, tensors, videos))
            # Waiting for the oldest bounds the clips in memory, and raises a writer's error.
            while len(writing) > 2 * encoding.num_artifact_workers:
                writing.popleft().result()
            progress.update(len(names))
        for future in writing:
            future.result()


def encode_batch(
    flags: PreparationFlags, vae: AutoencoderKLCogVideoX, batch: Batch, names: Sequence[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Encode a batch to moments, by name: `video_latents` `[2C, F', h, w]`, maybe `image_latents` `[K, 2C, 1, h, w]`.

    The image of an image-to-video sample is encoded K times, under noise of different strength: the objective needs
    fresh noise on the pixels at every step, but training must not need the VAE. Each step picks one of the K.
    """
    moments = encode_videos(vae, batch.videos).cpu()
    tensors = {name: {"video_latents": moments[position]} for position, name in enumerate(names)}
    if flags.save_image_latents:
        for name, image in zip(names, batch.images, strict=True):
            generator = step_generator(CPU, flags.seed, name)
            scales = image_noise_scales(flags.num_image_latents, generator)
            tensors[name]["image_latents"] = encode_noised_image(vae, image, scales, generator).cpu()
    return tensors


class BrokenClips:
    """Notes on clips that could be probed but not decoded, for the rank that finishes last."""

    def __init__(self, folder: Path):
        self.folder = on_this_machine(folder / STAGING) / "broken"

    def add(self, sample: Sample, reason: str) -> None:
        """Note a sample whose clip cannot be decoded."""
        video = str(sample.planned.clip.video)
        note = [video, sample.planned.clip.source, reason.removeprefix(f"{video}: ")]
        with atomic_write(self.folder / f"{sample.name}.json") as path:
            path.write_text(json.dumps(note), encoding="utf-8")

    def forget(self, names: Sequence[str]) -> None:
        """Drop the notes of an earlier run on samples that this rank tries again."""
        for name in names:
            (self.folder / f"{name}.json").unlink(missing_ok=True)

    def read(self) -> dict[str, BadClip]:
        """Return all notes by sample name."""
        notes = self.folder.glob("[!.]*.json")
        return {note.stem: BadClip(*json.loads(note.read_text(encoding="utf-8"))) for note in notes}
