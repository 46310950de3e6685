"""Encode the captions and clips of a preparation in batches, and write them in its layout."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX

from common.bars import tqdm
from common.errors import UserError
from common.files import atomic_write
from common.ranks import launch_rank
from common.remote import on_this_machine
from common.stores import StoreFailure
from data.clips import BadClip, ClipSample
from data.sampler import Draw
from dataset import LISTED, Batch, ClipDataset, make_loader
from diffusion.latents import image_noise_scales
from diffusion.randomness import step_generator
from flags.preparation import PreparationFlags
from flags.settings import PreparationSettings
from models.configs import CPU, DTYPES
from models.encoding import encode_noised_images, encode_prompts, encode_videos
from models.source import ModelSource
from preparation.claims import Claims, SharedBatches
from preparation.layouts import Batches, Layout, Sample
from preparation.stages import run_stages
from prepared.folder import STAGING, read_empty_prompt, write_empty_prompt


logger = logging.getLogger(__name__)

EMPTY_PROMPT = [[""]]  # no caption's key is empty


@dataclass(frozen=True)
class Preparation:
    """What is prepared, by this process and others that share the folder."""

    settings: PreparationSettings
    source: ModelSource
    layout: Layout
    samples: Sequence[Sample]
    claims: Claims
    device: torch.device

    @cached_property
    def captions(self) -> SharedBatches:
        """The captions to embed, by their keys; EMPTY_PROMPT is the empty prompt's."""
        layout = self.layout
        if not self.settings.preparation.save_latents_and_embeddings:
            return SharedBatches(self.claims, {}, layout.captions_left)
        parts = layout.captions_to_do(self.settings.encoding.batch_size)

        def left(batches: Batches) -> Batches:
            if batches != EMPTY_PROMPT:
                return layout.captions_left(batches)
            return batches if read_empty_prompt(layout.folder) is None else []

        return SharedBatches(self.claims, {"empty-prompt": EMPTY_PROMPT, **parts}, left)

    @cached_property
    def clips(self) -> SharedBatches:
        """The clips to encode, by the names of their samples."""
        parts = self.layout.clips_to_do(self.settings.encoding.batch_size)
        broken = BrokenClips(self.layout.folder)
        return SharedBatches(self.claims, parts, lambda batches: self.layout.clips_left(batches, broken))

    def is_done(self) -> bool:
        """Return whether all captions and clips are done, by whichever process."""
        return self.captions.are_done() and self.clips.are_done()


def clip_dataset(settings: PreparationSettings, clips: Sequence[ClipSample]) -> ClipDataset:
    """Return the clips as they are encoded."""
    return ClipDataset(
        clips,
        reshape_mode=settings.clips.video_reshape_mode,
        random_flip=settings.clips.random_flip,
        seed=settings.preparation.seed,
        with_images=settings.preparation.save_image_latents,
        condition_frames=settings.preparation.condition_frames,
        control=(settings.control.compute_control or LISTED) if settings.preparation.save_control_latents else None,
        with_masks=settings.masks.use_masks,
        decode_threads=settings.encoding.num_decode_threads,
    )


def embed_captions(work: Preparation) -> None:
    """Embed the captions that are free, each once; the empty prompt, too, for captions that training drops."""
    total, batches = len(work.captions), work.captions.take()
    first = next(batches, None)
    if first is None:
        return
    settings, folder = work.settings, work.layout.folder
    captions = {sample.caption_key: sample.planned.clip.caption for sample in work.samples} | {"": ""}
    in_8bit, max_length = settings.encoding.text_encoder_8bit, settings.preparation.max_sequence_length
    pipeline = work.source.load_text_pipeline(DTYPES[settings.model.dtype], device=work.device, in_8bit=in_8bit)
    done = 0

    def embed(keys: Sequence[str]) -> tuple[Sequence[str], torch.Tensor]:
        nonlocal done
        embeds = encode_prompts(pipeline, [captions[key] for key in keys], max_length)
        done += len(keys)
        progress.update(done + work.captions.num_elsewhere - progress.n)
        return keys, embeds.cpu()

    def write(results: tuple[Sequence[str], torch.Tensor]) -> None:
        keys, embeds = results
        if keys in EMPTY_PROMPT:
            write_empty_prompt(folder, embeds[0])
        else:
            work.layout.write_captions(dict(zip(keys, embeds, strict=True)))

    with progress_bar("Embedding captions", " captions", total) as progress:
        run_stages(chain([first], batches), embed, write, num_writers=settings.encoding.num_artifact_workers)
        progress.update(done + work.captions.num_elsewhere - progress.n)


def encode_clips(work: Preparation) -> None:
    """Decode, encode and write the clips that are free; the three overlap."""
    total, batches = len(work.clips), work.clips.take()
    first = next(batches, None)
    if first is None:
        return
    settings, encoding, samples = work.settings, work.settings.encoding, work.samples
    index_of = {sample.name: index for index, sample in enumerate(samples)}
    broken = BrokenClips(work.layout.folder)
    vae = None
    if settings.preparation.save_latents_and_embeddings:
        dtype, slicing, tiling = DTYPES[settings.model.dtype], encoding.use_slicing, bool(encoding.use_tiling)
        vae = work.source.load_vae(dtype, slicing=slicing, tiling=tiling, device=work.device)

    def draws() -> Iterator[list[Draw]]:
        for names in chain([first], batches):
            broken.forget(names)
            yield [Draw(index_of[name], 0) for name in names]

    done = 0

    def encode(batch: Batch) -> tuple[dict, dict] | None:
        nonlocal done
        for draw, reason in batch.failed:
            if isinstance(reason, StoreFailure):
                raise UserError(reason)
            broken.add(samples[draw.index], reason)
        names = [samples[draw.index].name for draw in batch.draws]
        tensors = encode_batch(settings.preparation, vae, batch, names) if vae is not None and names else {}
        done += len(names) + len(batch.failed)
        progress.update(done + work.clips.num_elsewhere - progress.n)
        return (tensors, dict(zip(names, batch.videos, strict=True))) if names else None

    loader = make_loader(
        clip_dataset(settings, [sample.planned for sample in samples]),
        draws(),
        num_workers=settings.loader.dataloader_num_workers,
        pin_memory=settings.loader.pin_memory,
    )
    with progress_bar("Encoding clips", " clips", total) as progress:
        write, num_writers = work.layout.write_clips, encoding.num_artifact_workers
        times = run_stages(loader, encode, lambda results: write(*results), num_writers=num_writers)
        progress.update(done + work.clips.num_elsewhere - progress.n)
    logger.info("encoded %d clips: %s", done, times)


def progress_bar(title: str, unit: str, total: int) -> tqdm:
    """Return a bar over the items of all processes; of the ranks of a launch, only the first shows it."""
    return tqdm(total=total, desc=title, unit=unit, delay=0, disable=launch_rank() != 0)


def encode_batch(
    flags: PreparationFlags, vae: AutoencoderKLCogVideoX, batch: Batch, names: Sequence[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Encode a batch to moments, by name: `video_latents` `[2C, F', h, w]`, maybe `image_latents` `[K, 2C, M, h, w]`,
    `control_latents` `[2C, F', h, w]` and `mask` `[F', h, w]`.

    The images of an image-to-video sample are encoded K times, under noise of different strength: the objective needs
    fresh noise on the pixels at every step, but training must not need the VAE. Each step picks one of the K.
    """
    moments = encode_videos(vae, batch.videos).cpu()
    tensors = {name: {"video_latents": moments[position]} for position, name in enumerate(names)}
    if flags.save_image_latents:
        for name, images in zip(names, batch.images, strict=True):
            generator = step_generator(CPU, flags.seed, name)
            scales = image_noise_scales(flags.num_image_latents, generator)
            tensors[name]["image_latents"] = encode_noised_images(vae, images, scales, generator).cpu()
    if flags.save_control_latents:
        moments = encode_videos(vae, batch.controls).cpu()
        for name, control in zip(names, moments, strict=True):
            tensors[name]["control_latents"] = control
    if batch.masks is not None:
        for name, mask in zip(names, batch.masks, strict=True):
            tensors[name]["mask"] = mask
    return tensors


class BrokenClips:
    """Notes on clips that could be probed but not decoded, for all processes of a preparation."""

    def __init__(self, folder: Path):
        self.folder = on_this_machine(folder / STAGING) / "broken"

    def add(self, sample: Sample, reason: str) -> None:
        """Note a sample whose clip cannot be decoded."""
        video = str(sample.planned.clip.video)
        note = [video, sample.planned.clip.source, reason.removeprefix(f"{video}: ")]
        with atomic_write(self.folder / f"{sample.name}.json") as path:
            path.write_text(json.dumps(note), encoding="utf-8")

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Drop the notes on samples that are tried again; None for all."""
        for name in self.read() if names is None else names:
            (self.folder / f"{name}.json").unlink(missing_ok=True)

    def __contains__(self, name: object) -> bool:
        return (self.folder / f"{name}.json").exists()

    def read(self) -> dict[str, BadClip]:
        """Return all notes by sample name."""
        notes = self.folder.glob("[!.]*.json")
        return {note.stem: BadClip(*json.loads(note.read_text(encoding="utf-8"))) for note in notes}
