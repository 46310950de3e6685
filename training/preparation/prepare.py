"""The recipe of prepare_dataset.py: clips and captions to latent moments and prompt embeddings on disk.

The ranks of a launch share nothing but the output folder; those on several machines meet once, at the start, to find
out whether they do, and see the same clips. Each does its part of the batches, and whichever finds everything finished
writes the index: no rank waits for another, so no slow one can run into a time-out.
"""

import argparse
import hashlib
import json
import logging
import re
import shlex
import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.training_utils import free_memory

from common.bars import tqdm
from common.errors import UserError, listing
from common.files import refresh_names, written_whole
from common.hub_token import log_without_tokens
from common.ranks import launch_rank, launch_size, local_rank, num_machines
from data.buckets import Bucket, Draw
from data.clips import BadClip, PlannedClip
from data.plan import RawData, describe, report_skipped
from data.prepared import (
    STAGING,
    PreparedSettings,
    claim_folder,
    read_empty_prompt,
    write_empty_prompt,
    write_settings,
)
from dataset import Batch, ClipDataset, make_loader
from diffusion.latents import image_noise_scales, step_generator
from flags.checks import PREPARED_FLAGS
from models.fingerprints import fingerprint_encoders
from models.source import (
    DTYPES,
    ModelConfigs,
    ModelSource,
    encode_noised_image,
    encode_prompts,
    encode_videos,
    precision_warning,
)
from parallel.preflight import check_preparation
from preparation.layouts import FileLayout, Sample, ShardLayout


logger = logging.getLogger(__name__)
Layout = ShardLayout | FileLayout


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


def prepare(args: argparse.Namespace, data: RawData) -> None:
    """Prepare the clips in `args.output_dir`; called on every rank, each of which takes its share.

    Raises:
        UserError: the folder holds other data, the model cannot be read, or clips turned out not to decode.
    """
    rank = Rank.of_environment()
    log_without_tokens(logging.INFO if rank.index == 0 else logging.ERROR)
    source = ModelSource(args.model_id, args.revision, args.variant, args.cache_dir)
    configs = source.configs()
    if rank.index == 0:
        log_plan(args, data, source, configs, rank.count)
    folder = Path(args.output_dir)
    samples = [name_sample(planned, args) for planned in data.clips]
    check_preparation(args, folder, source.fingerprint(), (sample.name + sample.caption_key for sample in samples))
    if args.save_latents_and_embeddings:
        source.download_encoders()
        warn_of_overflow(DTYPES[args.dtype], source)
    settings = claim_folder(folder, settings_of(args, source))
    layout = make_layout(args, folder, samples, configs)

    if args.save_latents_and_embeddings:
        embed_captions(args, source, layout, samples, rank)
        free_memory()
    encode_clips(args, source, layout, samples, rank)
    finish(args, layout, settings, data, samples)


def warn_of_overflow(dtype: torch.dtype, source: ModelSource) -> None:
    """Say so where the encoders were made for larger numbers than their precision has; they are on this machine."""
    if dtype == torch.float16 and (
        warning := precision_warning(dtype, source.stored_dtype("text_encoder"), "--dtype")
    ):
        logger.warning("warning: %s", warning)


def log_plan(
    args: argparse.Namespace, data: RawData, source: ModelSource, configs: ModelConfigs, num_ranks: int = 1
) -> None:
    """Say which buckets the clips get, and what stands out."""
    mode = args.video_reshape_mode
    plan = describe(data, source, configs, batch_size=args.batch_size, num_ranks=num_ranks, reshape_mode=mode)
    logger.info("%s", plan)


def clip_dataset(args: argparse.Namespace, clips: Sequence[PlannedClip]) -> ClipDataset:
    """The clips as they are to be encoded."""
    return ClipDataset(
        clips,
        reshape_mode=args.video_reshape_mode,
        random_flip=args.random_flip,
        seed=args.seed,
        with_images=args.save_image_latents,
        decode_threads=args.num_decode_threads,
    )


def settings_of(args: argparse.Namespace, source: ModelSource) -> PreparedSettings:
    """What the folder is prepared with."""
    return PreparedSettings(
        layout=args.layout,
        encoders=fingerprint_encoders(source.local_folder(), args.variant),
        # Written as the precision, which the folders of before have too.
        dtype=f"{args.dtype}, text encoder in 8 bits" if args.text_encoder_8bit else args.dtype,
        max_sequence_length=args.max_sequence_length,
        tiling=args.use_tiling,
        model=source.fingerprint(),
        flags={name: getattr(args, name) for name in PREPARED_FLAGS},
    )


def name_sample(planned: PlannedClip, args: argparse.Namespace) -> Sample:
    """Name what is made from a clip after its file and a digest of all that it is made from.

    The same clip gets the same name in every run, so that a second run finds what is done; a clip or cut that changed
    gets a new one, so that nothing stale is taken for it. In shards the caption has a name of its own.
    """
    clip = planned.clip
    caption_key = hashlib.sha256(clip.caption.encode()).hexdigest()[:32]
    facts = [planned.info.sha256, planned.bucket, planned.frame_indices, args.video_reshape_mode]
    if args.random_flip or args.video_reshape_mode == "random":
        facts += [args.random_flip, args.seed]
    if args.save_image_latents:
        image = planned.first_frame.sha256 if planned.first_frame and planned.part == 0 else None
        facts += [image, args.num_image_latents, args.seed]
    if args.layout == "files":
        facts.append(caption_key)
    # A part of file names and lists: visible, on one line, and within 255 bytes.
    stem = re.sub(r"[^\w.-]+", "_", clip.video.stem).lstrip(".").encode()[:100].decode(errors="ignore")
    return Sample(f"{stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}", caption_key, planned)


def make_layout(args: argparse.Namespace, folder: Path, samples: Sequence[Sample], configs: ModelConfigs) -> Layout:
    """The layout that the flags ask for."""
    if args.layout == "files":
        return FileLayout(
            folder,
            samples,
            with_tensors=args.save_latents_and_embeddings,
            with_images=args.save_image_latents,
            preview_fps=args.target_fps,
        )
    itemsize = DTYPES[args.dtype].itemsize

    def latent_bytes(bucket: Bucket) -> int:
        frames, height, width = bucket.latent_shape
        frames += args.num_image_latents if args.save_image_latents else 0
        return 2 * configs.vae["latent_channels"] * frames * height * width * itemsize

    return ShardLayout(
        folder,
        samples,
        latent_bytes=latent_bytes,
        embed_bytes=args.max_sequence_length * configs.transformer["text_embed_dim"] * itemsize,
        shard_bytes=args.shard_size_mb * 2**20,
        with_images=args.save_image_latents,
    )


def embed_captions(
    args: argparse.Namespace, source: ModelSource, layout: Layout, samples: Sequence[Sample], rank: Rank
) -> None:
    """Embed each caption of this rank's share that is not embedded yet, once; rank 0 embeds the empty prompt too."""
    batches = layout.captions_to_do(args.batch_size, rank.index, rank.count)
    needs_empty_prompt = rank.index == 0 and read_empty_prompt(layout.folder) is None
    if not batches and not needs_empty_prompt:
        return
    captions = {sample.caption_key: sample.planned.clip.caption for sample in samples}
    pipeline = source.load_text_pipeline(DTYPES[args.dtype], device=rank.device, in_8bit=args.text_encoder_8bit)
    if needs_empty_prompt:
        # What dropped captions become in training, where no text encoder is loaded.
        write_empty_prompt(layout.folder, encode_prompts(pipeline, [""], args.max_sequence_length)[0])
    with progress_bar("Embedding captions", " captions", batches, rank) as progress:
        for keys in batches:
            embeds = encode_prompts(pipeline, [captions[key] for key in keys], args.max_sequence_length)
            layout.write_captions(dict(zip(keys, embeds, strict=True)))
            progress.update(len(keys))


def encode_clips(
    args: argparse.Namespace, source: ModelSource, layout: Layout, samples: Sequence[Sample], rank: Rank
) -> None:
    """Decode, encode and write this rank's share of the clips that are not done; the three overlap."""
    batches = layout.clips_to_do(args.batch_size, rank.index, rank.count)
    if not batches:
        return
    index_of = {sample.name: index for index, sample in enumerate(samples)}
    broken = BrokenClips(layout.folder)
    for names in batches:
        broken.forget(names)
    vae = None
    if args.save_latents_and_embeddings:
        vae = source.load_vae(DTYPES[args.dtype], slicing=args.use_slicing, tiling=args.use_tiling, device=rank.device)
    loader = make_loader(
        clip_dataset(args, [sample.planned for sample in samples]),
        [[Draw(index_of[name], 0) for name in batch] for batch in batches],
        num_workers=args.dataloader_num_workers,
        pin_memory=args.pin_memory,
    )
    writing: deque[Future] = deque()
    with (
        progress_bar("Encoding clips", " clips", batches, rank) as progress,
        ThreadPoolExecutor(args.num_artifact_workers) as writers,
    ):
        for names, batch in zip(batches, loader, strict=True):
            for draw, reason in batch.failed:
                clip = samples[draw.index].planned.clip
                broken.add(samples[draw.index], reason.removeprefix(f"{clip.video}: "))
            names_left = [samples[draw.index].name for draw in batch.draws]
            if names_left:
                tensors = {} if vae is None else encode_batch(args, vae, batch, names_left)
                videos = dict(zip(names_left, batch.videos, strict=True))
                writing.append(writers.submit(layout.write_clips, tensors, videos))
            # Waiting for the oldest bounds how many clips lie in memory, and brings a writer's error to light.
            while len(writing) > 2 * args.num_artifact_workers:
                writing.popleft().result()
            progress.update(len(names))
        for future in writing:
            future.result()


def encode_batch(
    args: argparse.Namespace, vae: AutoencoderKLCogVideoX, batch: Batch, names: Sequence[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Encode a batch to moments, by name: `video_latents` `[2C, F', h, w]`, maybe `image_latents` `[K, 2C, 1, h, w]`.

    The image of an image-to-video sample is encoded K times, under noise of different strength: the objective wants
    fresh noise on the pixels at every step, and training must not need the VAE. A step picks one of the K.
    """
    moments = encode_videos(vae, batch.videos).cpu()
    tensors = {name: {"video_latents": moments[position]} for position, name in enumerate(names)}
    if args.save_image_latents:
        for position, name in enumerate(names):
            generator = step_generator(torch.device("cpu"), args.seed, name)
            scales = image_noise_scales(args.num_image_latents, generator)
            image = encode_noised_image(vae, batch.images[position], scales, generator)
            tensors[name]["image_latents"] = image.cpu()
    return tensors


def finish(
    args: argparse.Namespace, layout: Layout, settings: PreparedSettings, data: RawData, samples: Sequence[Sample]
) -> None:
    """Write the index if everything is done; whichever rank comes last finds it so.

    Raises:
        UserError: clips did not decode, and --on_bad_clip is error.
    """
    if num_machines() > 1:
        refresh_names(layout.folder)  # what the last rank on another machine wrote a moment ago must be seen
    broken = BrokenClips(layout.folder).read()
    missing = {sample.name for sample in layout.missing(broken.keys())}
    num_elsewhere = len(missing - broken.keys())
    if num_elsewhere or (args.save_latents_and_embeddings and read_empty_prompt(layout.folder) is None):
        logger.info("%d samples are with other ranks; the last one to finish lists them all", num_elsewhere)
        return
    bad = [*data.bad, *(broken[name] for name in sorted(missing))]
    if missing and args.on_bad_clip == "error":
        title = (
            f"{len(missing)} of {len(samples)} samples do not decode; the others are done and kept: mend or remove "
            "these and run again, or leave them out by --on_bad_clip skip:"
        )
        raise UserError(listing(title, bad, most=len(bad)))
    kept = [sample for sample in samples if sample.name not in missing]
    if not kept:
        raise UserError(listing("none of the clips can be used:", bad))
    report_skipped(bad, layout.folder)
    try:
        unlisted = layout.write_index(kept)
        write_settings(layout.folder, settings)
    except FileNotFoundError:
        # Another rank found everything done at the same time, listed the same samples and has tidied up already.
        return
    shutil.rmtree(layout.folder / STAGING, ignore_errors=True)
    if unlisted:
        logger.warning("%d samples that were prepared here earlier are no longer listed", unlisted)
    flags = f"--data_root {shlex.quote(str(layout.folder))}"
    flags += " --load_tensors" if args.save_latents_and_embeddings else ""
    # Not by the logger, which is silent on all ranks but the first.
    tqdm.write(f"prepared {len(kept)} samples in {layout.folder}; train on them with {flags}")


class BrokenClips:
    """Notes on clips that were probed but did not decode, for whichever rank comes last."""

    def __init__(self, folder: Path):
        self.folder = folder / STAGING / "broken"

    def add(self, sample: Sample, reason: str) -> None:
        """Note a sample whose clip cannot be decoded."""
        clip = sample.planned.clip
        with written_whole(self.folder / f"{sample.name}.json") as path:
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
