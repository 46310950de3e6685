"""The steps of prepare_dataset.py: from clips and captions to latent moments and prompt embeddings on disk.

The ranks of a launch share only the output folder; ranks on several machines meet once, at the start, to check that
they share it and see the same clips. Each rank does its share of the batches, and the one that finds everything done
writes the index: no rank waits for another, so that a slow one causes no time-out.
"""

import hashlib
import logging
import re
import shlex
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers.training_utils import free_memory

from cli.schema import flag_values
from common.bars import tqdm
from common.errors import UserError, listing
from common.files import atomic_write, refresh_names
from common.folder_lock import locked_folder
from common.logs import log_without_tokens
from common.ranks import launch_rank, launch_size, local_rank, num_machines
from common.remote import RemotePath, on_this_machine, to_path
from common.text_files import digest_lines
from data.buckets import Bucket
from data.clips import ClipSample
from data.prepared import STAGING, PreparedSettings, caption_key, claim_folder, read_empty_prompt, write_settings
from diffusion.tasks import ImageToVideo, SizeFlags, TextToVideo
from flags.data import PREPARED_FLAGS
from flags.model import EncoderFlags
from flags.settings import PreparationSettings
from models.configs import CPU, DTYPES, ModelConfigs, precision_warning
from models.fingerprints import fingerprint_encoders
from models.source import ModelSource
from parallel.preflight import check_preparation
from planning.plan import RawData, describe_plan, report_skipped
from preparation.encode import BrokenClips, Preparation, embed_captions, encode_clips
from preparation.layouts import FileLayout, Layout, Sample, ShardLayout


logger = logging.getLogger(__name__)

BUCKET_FLAGS = SizeFlags("--height_buckets, --width_buckets", "--frame_buckets, --max_num_frames")


def prepare(settings: PreparationSettings, data: RawData) -> None:
    """Prepare the clips in `settings.preparation.output_dir`; called on every rank, each of which does its share.

    Raises UserError if the folder holds other data, or another preparation writes to it, the model cannot be read, or
    clips cannot be decoded.
    """
    rank, num_ranks, flags = launch_rank(), launch_size(), settings.preparation
    log_without_tokens(logging.INFO if rank == 0 else logging.ERROR)
    source = model_source(settings.model)
    configs = source.configs()
    if rank == 0:
        log_plan(settings, data, source, num_ranks)
    folder = to_path(flags.output_dir)
    samples = [name_sample(planned, settings) for planned in data.clips]
    names = [sample.name + sample.caption_key for sample in samples]
    check_preparation(flag_values(settings), folder, source.fingerprint(), names)
    if isinstance(folder, RemotePath):
        check_store(folder)
    if flags.save_latents_and_embeddings:
        source.download("vae", "text_encoder", "tokenizer")
        warn_of_overflow(DTYPES[settings.model.dtype], source)
    wanted = settings_of(settings, source)
    # Processes that write the same tensors may share the folder, such as the ranks, or an orphan of a killed launch.
    with locked_folder(on_this_machine(folder), digest_lines([repr(wanted), *names])):
        prepared = claim_folder(folder, wanted)
        layout = make_layout(settings, folder, samples, configs)
        device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else CPU
        work = Preparation(settings, source, layout, samples, rank, num_ranks, device)
        if flags.save_latents_and_embeddings:
            embed_captions(work)
            free_memory()
        encode_clips(work)
        finish(work, data, prepared)


def check_store(folder: RemotePath) -> None:
    """Check, before models are loaded, that one machine prepares and may write to a store."""
    if num_machines() > 1:
        raise UserError(
            f"--output_dir: only one machine can prepare in {folder}, because unfinished work is on its disk; start "
            "one, or prepare in a folder that all machines share and copy it"
        )
    if launch_rank() == 0:
        trial = folder / ".writable"
        with atomic_write(trial):
            pass
        trial.unlink()


def model_source(model: EncoderFlags) -> ModelSource:
    """Return the location of the model whose encoders are used."""
    return ModelSource(model.model_id, model.revision, model.variant, model.cache_dir)


def warn_of_overflow(dtype: torch.dtype, source: ModelSource) -> None:
    """Warn if the text encoder, which is on this machine, was trained for larger numbers than `dtype` holds."""
    if dtype == torch.float16 and (
        warning := precision_warning(dtype, source.stored_dtype("text_encoder"), "--dtype")
    ):
        logger.warning("warning: %s", warning)


def log_plan(settings: PreparationSettings, data: RawData, source: ModelSource, num_ranks: int = 1) -> None:
    """Log the buckets of the clips, with warnings, one of them if the model cannot be trained at their sizes."""
    sizes = {"batch_size": settings.encoding.batch_size, "num_ranks": num_ranks}
    configs = source.configs()
    logger.info("%s", describe_plan(data, settings, source, configs, **sizes))
    task = ImageToVideo(0, False) if configs.is_image_to_video else TextToVideo()
    try:
        task.check_model(configs, {sample.bucket for sample in data.clips}, BUCKET_FLAGS)
    except UserError as error:
        logger.warning("warning: training will refuse these sizes: %s", error)


def settings_of(settings: PreparationSettings, source: ModelSource) -> PreparedSettings:
    """Return the settings that are recorded in the folder."""
    flags, dtype, encoding = flag_values(settings), settings.model.dtype, settings.encoding
    return PreparedSettings(
        layout=settings.preparation.layout,
        encoders=fingerprint_encoders(source.local_folder(), settings.model.variant),
        # Part of the precision, because folders of older versions have no field for it.
        dtype=f"{dtype}, text encoder in 8 bits" if encoding.text_encoder_8bit else dtype,
        max_sequence_length=settings.preparation.max_sequence_length,
        tiling=encoding.use_tiling,
        model=source.fingerprint(),
        flags={name: flags[name] for name in PREPARED_FLAGS},
    )


def name_sample(planned: ClipSample, settings: PreparationSettings) -> Sample:
    """Name a sample after its file and a digest of everything that its tensors depend on.

    An unchanged clip has the same name in every run, so that a second run finds what is done; a changed clip or cut
    gets a new name, so that stale tensors are not used. In shards the caption has its own name.
    """
    clip = planned.clip
    facts = [planned.info.content, planned.bucket, planned.frame_indices, settings.clips.video_reshape_mode]
    if settings.clips.random_flip or settings.clips.video_reshape_mode == "random":
        facts += [settings.clips.random_flip, settings.preparation.seed]
    if settings.preparation.save_image_latents:
        image = planned.first_frame.content if planned.first_frame and planned.part == 0 else None
        facts += [image, settings.preparation.num_image_latents, settings.preparation.seed]
    if settings.preparation.layout == "files":
        facts.append(caption_key(clip.caption))
    # For file names and lists: not hidden, on one line, and within 255 bytes.
    stem = re.sub(r"[^\w.-]+", "_", clip.video.stem).lstrip(".").encode()[:100].decode(errors="ignore")
    return Sample(
        f"{stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}", caption_key(clip.caption), planned
    )


def make_layout(
    settings: PreparationSettings, folder: Path, samples: Sequence[Sample], configs: ModelConfigs
) -> Layout:
    """Return the layout that the flags ask for."""
    flags = settings.preparation
    if flags.layout == "files":
        return FileLayout(
            folder,
            samples,
            with_tensors=flags.save_latents_and_embeddings,
            with_images=flags.save_image_latents,
            preview_fps=flags.target_fps,
        )
    return ShardLayout(
        folder,
        samples,
        latent_bytes=partial(latent_bytes, settings, configs),
        embed_bytes=embed_bytes(settings, configs),
        shard_bytes=flags.shard_size_mb * 2**20,
        with_images=flags.save_image_latents,
    )


def latent_bytes(settings: PreparationSettings, configs: ModelConfigs, bucket: Bucket) -> int:
    """Return the bytes of a sample's latents, with those of its image."""
    flags, (frames, height, width) = settings.preparation, bucket.latent_shape
    if flags.save_image_latents:
        frames += flags.num_image_latents if flags.layout == "shards" else 1
    return 2 * configs.vae["latent_channels"] * frames * height * width * DTYPES[settings.model.dtype].itemsize


def embed_bytes(settings: PreparationSettings, configs: ModelConfigs) -> int:
    """Return the bytes of an embedded caption."""
    numbers = settings.preparation.max_sequence_length * configs.transformer["text_embed_dim"]
    return numbers * DTYPES[settings.model.dtype].itemsize


def tensor_bytes(settings: PreparationSettings, configs: ModelConfigs, clips: Sequence[ClipSample]) -> dict[str, int]:
    """Return the bytes of all tensors of prepared clips, by kind; shards hold equal ones only once."""
    samples = [name_sample(planned, settings) for planned in clips]
    buckets = {sample.name: sample.planned.bucket for sample in samples}
    per_sample = settings.preparation.layout == "files"
    captions = len(buckets) if per_sample else len({sample.caption_key for sample in samples})
    return {
        "latents": sum(latent_bytes(settings, configs, bucket) for bucket in buckets.values()),
        "captions": (captions + 1) * embed_bytes(settings, configs),  # and the empty prompt
    }


def finish(work: Preparation, data: RawData, prepared: PreparedSettings) -> None:
    """Write the index if all ranks are done, which only the last one finds.

    Raises UserError if clips did not decode, and --on_bad_clip is error.
    """
    settings, layout = work.settings, work.layout
    has_tensors = settings.preparation.save_latents_and_embeddings
    if num_machines() > 1:
        refresh_names(layout.folder)  # to see what the last rank on another machine has just written
    broken = BrokenClips(layout.folder).read()
    missing = {sample.name for sample in layout.missing(broken.keys())}
    num_elsewhere = len(missing - broken.keys())
    if num_elsewhere or (has_tensors and read_empty_prompt(layout.folder) is None):
        logger.info("%d samples are with other ranks; the last one to finish lists them all", num_elsewhere)
        return
    bad = [*data.bad, *(broken[name] for name in sorted(missing))]
    if missing and settings.sources.on_bad_clip == "error":
        title = (
            f"{len(missing)} of {len(work.samples)} samples do not decode; the others are done and kept: fix or "
            "remove these and run again, or skip them with --on_bad_clip skip:"
        )
        raise UserError(listing(title, bad, most=len(bad)))
    kept = [sample for sample in work.samples if sample.name not in missing]
    if not kept:
        raise UserError(listing("none of the clips can be used:", bad))
    report_skipped(bad, layout.folder)
    try:
        unlisted = layout.write_index(kept)
        write_settings(layout.folder, prepared)
    except FileNotFoundError:
        # Another rank finished at the same time, listed the same samples and has removed the staging folder.
        return
    shutil.rmtree(on_this_machine(layout.folder / STAGING), ignore_errors=True)
    if unlisted:
        logger.warning("%d samples that were prepared here earlier are no longer listed", unlisted)
    flags = f"--data_root {shlex.quote(str(layout.folder))}" + (" --load_tensors" if has_tensors else "")
    # Not logged, because only the first rank logs.
    tqdm.write(f"prepared {len(kept)} samples in {layout.folder}; train on them with {flags}")
