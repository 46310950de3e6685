"""The recipe of prepare_dataset.py: clips and captions to latent moments and prompt embeddings on disk."""

import argparse
import hashlib
import logging
import shlex
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKLCogVideoX
from diffusers.training_utils import free_memory
from diffusers.utils import export_to_video
from PIL import Image
from tqdm import tqdm

from buckets import BucketBatchSampler, Draw
from clips import PlannedClip, describe_plan
from dataset import Batch, ClipDataset, make_loader
from files import written_whole
from models import DTYPES, ModelSource, encode_prompts, encode_videos
from prepared import PreparedSettings, claim_folder, listed_names, tensor_file, write_index, write_tensor


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedClip:
    """A clip and the name of its files."""

    name: str
    planned: PlannedClip


def prepare(args: argparse.Namespace, clips: Sequence[PlannedClip]) -> None:
    """Prepare the clips in `args.output_dir`; called on every rank, each of which takes its share.

    Raises:
        UserError: the folder holds other data, or the model cannot be read.
    """
    # Without cpu=True, accelerate leaves the processes of a launch without GPUs alone. The slowest rank may be hours
    # behind the others at the end.
    ranks = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    logging.basicConfig(
        level=logging.INFO if ranks.is_main_process else logging.ERROR, format="%(message)s", force=True
    )
    logger.info("%s", describe_plan(clips))
    source = ModelSource(args.model_id, args.revision, args.variant, args.cache_dir)
    source.configs()
    folder = Path(args.output_dir)
    claim_folder(folder, PreparedSettings(source.fingerprint(), args.dtype, args.max_sequence_length))
    named = [NamedClip(clip_name(planned, args), planned) for planned in clips]
    distinct = list({clip.name: clip for clip in named}.values())

    if args.save_latents_and_embeddings:
        embed_captions(args, source, folder, distinct, ranks)
        free_memory()
    encode_clips(args, source, folder, distinct, ranks)

    ranks.wait_for_everyone()
    if ranks.is_main_process:
        dropped = listed_names(folder) - {clip.name for clip in named}
        if dropped:
            logger.warning("%d clips that were prepared here earlier are no longer listed", len(dropped))
        index = [(clip.name, clip.planned.clip.caption, clip.planned.bucket) for clip in named]
        write_index(folder, index, with_tensors=args.save_latents_and_embeddings, with_images=args.save_image_latents)
        flags = f"--data_root {shlex.quote(str(folder))}"
        flags += " --load_tensors" if args.save_latents_and_embeddings else ""
        logger.info("prepared %d clips in %s; train on them with %s", len(named), folder, flags)


def clip_name(planned: PlannedClip, args: argparse.Namespace) -> str:
    """Name a clip's files after its own file and a digest of all that they are made from.

    The same clip gets the same name in every run, so that a second run finds what is done; a clip, caption or
    cut that changed gets a new one, so that nothing stale is taken for it.
    """
    with open(planned.clip.video, "rb") as file:
        media = hashlib.file_digest(file, "sha256").hexdigest()
    augmentation = (args.video_reshape_mode, args.random_flip, args.seed)
    facts = (media, planned.clip.caption, planned.bucket, planned.frame_indices, augmentation)
    stem = planned.clip.video.stem.encode()[:100].decode(errors="ignore")  # file names have at most 255 bytes
    return f"{stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def embed_captions(
    args: argparse.Namespace, source: ModelSource, folder: Path, clips: Sequence[NamedClip], ranks: PartialState
) -> None:
    """Embed each distinct caption once and write it for every clip that has it and is not done."""
    names_of: dict[str, list[str]] = {}
    for clip in clips:
        names_of.setdefault(clip.planned.clip.caption, []).append(clip.name)
    # Shared out before looking at what is done: that changes while other ranks work.
    share = list(names_of.items())[ranks.process_index :: ranks.num_processes]
    todo = [
        (caption, missing)
        for caption, names in share
        if (missing := [name for name in names if not tensor_file(folder, "prompt_embeds", name).is_file()])
    ]
    if not todo:
        return
    pipeline = source.load_text_pipeline(DTYPES[args.dtype]).to(ranks.device)
    for caption, names in tqdm(todo, desc="Embedding captions", disable=not ranks.is_local_main_process):
        embeds = encode_prompts(pipeline, [caption], args.max_sequence_length)[0]
        for name in names:
            write_tensor(folder, "prompt_embeds", name, embeds)


def encode_clips(
    args: argparse.Namespace, source: ModelSource, folder: Path, clips: Sequence[NamedClip], ranks: PartialState
) -> None:
    """Decode, encode and write this rank's share of the clips that are not done; the three overlap."""
    sampler = BucketBatchSampler(
        [clip.planned.bucket for clip in clips], args.batch_size, seed=args.seed, shuffle=False
    )
    share = sampler.epoch_batches(0)[ranks.process_index :: ranks.num_processes]
    todo = [[index for index in batch if not is_done(args, folder, clips[index].name)] for batch in share]
    todo = [batch for batch in todo if batch]
    if not todo:
        return
    vae = None
    if args.save_latents_and_embeddings:
        vae = source.load_vae(DTYPES[args.dtype], slicing=args.use_slicing, tiling=args.use_tiling).to(ranks.device)
    loader = make_loader(
        ClipDataset(
            [clip.planned for clip in clips],
            reshape_mode=args.video_reshape_mode,
            random_flip=args.random_flip,
            seed=args.seed,
            decode_threads=args.num_decode_threads,
        ),
        [[Draw(index, 0) for index in batch] for batch in todo],
        num_workers=args.dataloader_num_workers,
        pin_memory=args.pin_memory,
    )
    progress = tqdm(
        total=sum(map(len, todo)), desc="Encoding clips", unit="clip", disable=not ranks.is_local_main_process
    )
    writing: deque[Future] = deque()
    with progress, ThreadPoolExecutor(args.num_artifact_workers) as writers:
        for indices, batch in zip(todo, loader, strict=True):
            tensors = {} if vae is None else encode_batch(vae, batch, first_frames=args.save_image_latents)
            for position, index in enumerate(indices):
                clip_tensors = {kind: values[position].cpu() for kind, values in tensors.items()}
                frames = batch.videos[position]
                writing.append(writers.submit(write_clip, args, folder, clips[index], frames, clip_tensors))
            # Waiting for the oldest bounds how many clips lie in memory, and brings a writer's error to light.
            while len(writing) > 2 * args.num_artifact_workers:
                writing.popleft().result()
            progress.update(len(indices))
        for future in writing:
            future.result()


def encode_batch(vae: AutoencoderKLCogVideoX, batch: Batch, *, first_frames: bool) -> dict[str, torch.Tensor]:
    """Encode a batch to moments: `video_latents` `[B, 2C, F', h, w]`, maybe `image_latents` `[B, 2C, 1, h, w]`."""
    moments = {"video_latents": encode_videos(vae, batch.videos)}
    if first_frames:
        moments["image_latents"] = encode_videos(vae, batch.videos[:, :1])
    return moments


def write_clip(
    args: argparse.Namespace, folder: Path, clip: NamedClip, frames: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> None:
    """Write a clip's files; `frames` are `[F, 3, H, W]`, uint8. The tensors come last: they tell that it is done."""
    images = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).numpy()]
    with written_whole(folder / "videos" / f"{clip.name}.mp4") as path:
        export_to_video(images, str(path), fps=args.target_fps)
    with written_whole(folder / "prompts" / f"{clip.name}.txt") as path:
        path.write_text(clip.planned.clip.caption, encoding="utf-8")
    if args.save_image_latents:
        with written_whole(folder / "images" / f"{clip.name}.png") as path:
            images[0].save(path)
    for kind, tensor in tensors.items():
        write_tensor(folder, kind, clip.name, tensor)


def is_done(args: argparse.Namespace, folder: Path, name: str) -> bool:
    """Whether an earlier run wrote all of a clip's files that `write_clip` would."""
    files = [folder / "videos" / f"{name}.mp4", folder / "prompts" / f"{name}.txt"]
    if args.save_image_latents:
        files.append(folder / "images" / f"{name}.png")
    if args.save_latents_and_embeddings:
        files.append(tensor_file(folder, "video_latents", name))
        if args.save_image_latents:
            files.append(tensor_file(folder, "image_latents", name))
    return all(file.is_file() for file in files)
