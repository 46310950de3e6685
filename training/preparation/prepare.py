"""The recipe of prepare_dataset.py: clips and captions to latent moments and prompt embeddings on disk.

The ranks of a launch share nothing but the output folder; those on several machines meet once, at the start, to find
out whether they do, and see the same clips. Each does its part of the batches, and whichever finds everything finished
writes the index: no rank waits for another, so no slow one can run into a time-out.
"""

import hashlib
import logging
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.training_utils import free_memory

from common.bars import tqdm
from common.errors import UserError, listing
from common.files import refresh_names
from common.logs import log_without_tokens
from common.ranks import num_machines
from data.buckets import Bucket
from data.clips import ClipSample
from data.plan import RawData, describe_plan, report_skipped
from data.prepared import (
    STAGING,
    PreparedSettings,
    claim_folder,
    read_empty_prompt,
    write_settings,
)
from flags.data import PREPARED_FLAGS
from flags.schema import flag_values
from flags.settings import PreparationSettings
from models.configs import DTYPES, ModelConfigs, precision_warning
from models.fingerprints import fingerprint_encoders
from models.source import ModelSource
from parallel.preflight import check_preparation
from preparation.encode import BrokenClips, Rank, embed_captions, encode_clips
from preparation.layouts import FileLayout, Layout, Sample, ShardLayout


logger = logging.getLogger(__name__)


def prepare(settings: PreparationSettings, data: RawData) -> None:
    """Prepare the clips in `settings.preparation.output_dir`; called on every rank, each of which takes its share.

    Raises:
        UserError: the folder holds other data, the model cannot be read, or clips turned out not to decode.
    """
    rank = Rank.of_environment()
    log_without_tokens(logging.INFO if rank.index == 0 else logging.ERROR)
    source = ModelSource(
        settings.model.model_id, settings.model.revision, settings.model.variant, settings.model.cache_dir
    )
    configs = source.configs()
    if rank.index == 0:
        log_plan(settings, data, source, configs, rank.count)
    folder = Path(settings.preparation.output_dir)
    samples = [name_sample(planned, settings) for planned in data.clips]
    check_preparation(
        flag_values(settings), folder, source.fingerprint(), (sample.name + sample.caption_key for sample in samples)
    )
    if settings.preparation.save_latents_and_embeddings:
        source.download("vae", "text_encoder", "tokenizer")
        warn_of_overflow(DTYPES[settings.model.dtype], source)
    prepared = claim_folder(folder, settings_of(settings, source))
    layout = make_layout(settings, folder, samples, configs)

    if settings.preparation.save_latents_and_embeddings:
        embed_captions(settings, source, layout, samples, rank)
        free_memory()
    encode_clips(settings, source, layout, samples, rank)
    finish(settings, layout, prepared, data, samples)


def warn_of_overflow(dtype: torch.dtype, source: ModelSource) -> None:
    """Say so where the encoders were made for larger numbers than their precision has; they are on this machine."""
    if dtype == torch.float16 and (
        warning := precision_warning(dtype, source.stored_dtype("text_encoder"), "--dtype")
    ):
        logger.warning("warning: %s", warning)


def log_plan(
    settings: PreparationSettings, data: RawData, source: ModelSource, configs: ModelConfigs, num_ranks: int = 1
) -> None:
    """Say which buckets the clips get, and what stands out."""
    mode = settings.clips.video_reshape_mode
    plan = describe_plan(
        data, source, configs, batch_size=settings.encoding.batch_size, num_ranks=num_ranks, reshape_mode=mode
    )
    logger.info("%s", plan)


def settings_of(settings: PreparationSettings, source: ModelSource) -> PreparedSettings:
    """Return what the folder is prepared with."""
    flags = flag_values(settings)
    return PreparedSettings(
        layout=settings.preparation.layout,
        encoders=fingerprint_encoders(source.local_folder(), settings.model.variant),
        # Written as the precision, which the folders of before have too.
        dtype=f"{settings.model.dtype}, text encoder in 8 bits"
        if settings.encoding.text_encoder_8bit
        else settings.model.dtype,
        max_sequence_length=settings.preparation.max_sequence_length,
        tiling=settings.encoding.use_tiling,
        model=source.fingerprint(),
        flags={name: flags[name] for name in PREPARED_FLAGS},
    )


def name_sample(planned: ClipSample, settings: PreparationSettings) -> Sample:
    """Name what is made from a clip after its file and a digest of all that it is made from.

    The same clip gets the same name in every run, so that a second run finds what is done; a clip or cut that changed
    gets a new one, so that nothing stale is taken for it. In shards the caption has a name of its own.
    """
    clip = planned.clip
    caption_key = hashlib.sha256(clip.caption.encode()).hexdigest()[:32]
    facts = [planned.info.sha256, planned.bucket, planned.frame_indices, settings.clips.video_reshape_mode]
    if settings.clips.random_flip or settings.clips.video_reshape_mode == "random":
        facts += [settings.clips.random_flip, settings.preparation.seed]
    if settings.preparation.save_image_latents:
        image = planned.first_frame.sha256 if planned.first_frame and planned.part == 0 else None
        facts += [image, settings.preparation.num_image_latents, settings.preparation.seed]
    if settings.preparation.layout == "files":
        facts.append(caption_key)
    # A part of file names and lists: visible, on one line, and within 255 bytes.
    stem = re.sub(r"[^\w.-]+", "_", clip.video.stem).lstrip(".").encode()[:100].decode(errors="ignore")
    return Sample(f"{stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}", caption_key, planned)


def make_layout(
    settings: PreparationSettings, folder: Path, samples: Sequence[Sample], configs: ModelConfigs
) -> Layout:
    """The layout that the flags ask for."""
    if settings.preparation.layout == "files":
        return FileLayout(
            folder,
            samples,
            with_tensors=settings.preparation.save_latents_and_embeddings,
            with_images=settings.preparation.save_image_latents,
            preview_fps=settings.preparation.target_fps,
        )
    itemsize = DTYPES[settings.model.dtype].itemsize

    def latent_bytes(bucket: Bucket) -> int:
        frames, height, width = bucket.latent_shape
        frames += settings.preparation.num_image_latents if settings.preparation.save_image_latents else 0
        return 2 * configs.vae["latent_channels"] * frames * height * width * itemsize

    return ShardLayout(
        folder,
        samples,
        latent_bytes=latent_bytes,
        embed_bytes=settings.preparation.max_sequence_length * configs.transformer["text_embed_dim"] * itemsize,
        shard_bytes=settings.preparation.shard_size_mb * 2**20,
        with_images=settings.preparation.save_image_latents,
    )


def finish(
    settings: PreparationSettings, layout: Layout, prepared: PreparedSettings, data: RawData, samples: Sequence[Sample]
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
    if num_elsewhere or (
        settings.preparation.save_latents_and_embeddings and read_empty_prompt(layout.folder) is None
    ):
        logger.info("%d samples are with other ranks; the last one to finish lists them all", num_elsewhere)
        return
    bad = [*data.bad, *(broken[name] for name in sorted(missing))]
    if missing and settings.sources.on_bad_clip == "error":
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
        write_settings(layout.folder, prepared)
    except FileNotFoundError:
        # Another rank found everything done at the same time, listed the same samples and has tidied up already.
        return
    shutil.rmtree(layout.folder / STAGING, ignore_errors=True)
    if unlisted:
        logger.warning("%d samples that were prepared here earlier are no longer listed", unlisted)
    flags = f"--data_root {shlex.quote(str(layout.folder))}"
    flags += " --load_tensors" if settings.preparation.save_latents_and_embeddings else ""
    # Not by the logger, which is silent on all ranks but the first.
    tqdm.write(f"prepared {len(kept)} samples in {layout.folder}; train on them with {flags}")
