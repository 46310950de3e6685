"""The steps of prepare_dataset.py: from clips and captions to latent moments and prompt embeddings on disk.

Any number of processes prepare one folder together: the ranks of a launch, or processes that were started one by one.
They share only the folder, in which each claims parts of the work; one that finds all of it done lists the samples.
Ranks of a launch on several machines also meet at the start, to check that they see the same folder and clips.
"""

import logging
import re
import shlex
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from diffusers.training_utils import free_memory

from cli.schema import flag_values, replace_flags
from common.bars import tqdm
from common.errors import UserError, listing
from common.files import atomic_write, refresh_names
from common.folder_lock import locked_folder
from common.logs import log_without_tokens
from common.ranks import launch_rank, launch_size, local_rank, num_machines
from common.remote import RemotePath, on_this_machine, to_path
from common.text_files import digest_lines
from common.units import in_bytes
from data.buckets import Bucket
from data.clips import ClipSample
from diffusion.control_to_video import RESTS, ControlToVideo
from diffusion.image_to_video import ImageToVideo
from diffusion.task import SizeFlags
from diffusion.text_to_video import TextToVideo
from flags.data import PREPARED_FLAGS
from flags.model import EncoderFlags
from flags.settings import PreparationSettings
from memory.activation_bytes import encoding_bytes
from models.configs import CPU, DTYPES, ModelConfigs, precision_warning
from models.fingerprints import fingerprint_encoders
from models.source import ModelSource
from parallel.preflight import check_preparation
from planning.describe import SKIPPED_FILE, describe_plan, report_skipped
from planning.samples import RawData
from preparation.claims import Claims, WorkIsOver
from preparation.encode import BrokenClips, Preparation, embed_captions, encode_clips
from preparation.layouts import FileLayout, Layout, Sample, ShardLayout
from preparation.report import write_report
from prepared.folder import (
    STAGING,
    PreparedSettings,
    caption_key,
    claim_folder,
    read_prepared_settings,
    sample_digest,
    write_settings,
)
from video.condition_frames import FIRST, num_condition_latents
from video.controls import INPAINT


logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0  # between looks at what other processes have done
INDEX = "index"  # the part of the work that comes last: listing the samples
MARGIN = 0.25  # beyond the activations: weights, workspaces of convolutions, fragmentation
BUCKET_FLAGS = SizeFlags("--height_buckets, --width_buckets", "--frame_buckets, --max_num_frames")


def prepare(settings: PreparationSettings, data: RawData) -> None:
    """Prepare the clips in `settings.preparation.output_dir`, together with other processes that do the same.

    Raises UserError if the folder holds other data, or another preparation writes to it, the model cannot be read, or
    clips cannot be decoded.
    """
    flags = settings.preparation
    log_without_tokens(logging.INFO if launch_rank() == 0 else logging.ERROR)
    source = model_source(settings.model)
    configs = source.configs()
    check_frames(settings, data, configs)
    if launch_rank() == 0:
        log_plan(settings, data, source, launch_size())
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
    tiled = partial(with_tiling, wanted, folder, settings, configs, set(data.buckets))
    # Processes that write the same tensors may share the folder, such as the ranks, or an orphan of a killed launch.
    # The bits of a tensor depend on how clips are batched.
    encoding = settings.encoding
    work_id = digest_lines([repr(wanted), f"{encoding.batch_size} {encoding.use_slicing}", *names])

    def begin() -> None:
        claim_folder(folder, tiled())
        BrokenClips(folder).forget()  # those of an earlier run are tried again

    here = on_this_machine(folder), on_this_machine(folder / STAGING)
    with locked_folder(here[0], work_id, begin), Claims(here[1] / "claims") as claims:
        prepared = claim_folder(folder, tiled())
        settings = replace_flags(settings, use_tiling=prepared.tiling)
        try:
            while claims.is_elsewhere(INDEX):
                time.sleep(POLL_SECONDS)
            layout = make_layout(settings, folder, samples, configs)
            device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else CPU
            prepare_together(Preparation(settings, source, layout, samples, claims, device), data, prepared)
        except WorkIsOver:
            logger.info("another process has listed the samples of %s", folder)


def prepare_together(work: Preparation, data: RawData, prepared: PreparedSettings) -> None:
    """Do what no other living process does, until all is done, and list the samples if no other process does."""
    do_free_work(work)
    pause = 0.1
    while not finish(work, data, prepared):
        if pause == 0.1:
            logger.info("waiting for other processes, to do what they leave if they die")
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)
        refresh_names(work.layout.folder)  # to see what other machines have written
        do_free_work(work)


def do_free_work(work: Preparation) -> None:
    """Embed and encode what belongs to no living process."""
    embed_captions(work)
    free_memory()
    encode_clips(work)
    free_memory()


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
    """Log the buckets of the clips, with warnings, one of them if training will refuse the model or their sizes."""
    sizes = {"batch_size": settings.encoding.batch_size, "num_ranks": num_ranks}
    configs = source.configs()
    logger.info("%s", describe_plan(data, settings, source, configs, **sizes))
    if refusal := refusal_of_training(settings, data, configs):
        logger.warning("warning: %s", refusal)


def check_frames(settings: PreparationSettings, data: RawData, configs: ModelConfigs) -> None:
    """Raise a UserError, before anything is encoded, if no model samples as many frames with a control."""
    counts = {sample.bucket.num_frames for sample in data.clips}
    if settings.preparation.save_control_latents and any(count % 8 not in RESTS for count in counts):
        raise UserError(refusal_of_training(settings, data, configs))


def refusal_of_training(settings: PreparationSettings, data: RawData, configs: ModelConfigs) -> str:
    """Return why training will refuse the model or the sizes of the clips; "" if it will not."""
    task = TextToVideo()
    if configs.is_image_to_video or settings.preparation.save_image_latents:
        task = ImageToVideo(0, False, settings.preparation.condition_frames)
    if settings.preparation.save_control_latents:
        task = ControlToVideo()
    try:
        configs = task.model_configs(configs)
        task.check_model(configs, {sample.bucket for sample in data.clips}, BUCKET_FLAGS)
    except UserError as error:
        return f"{task.name} training will refuse this: {error}"
    return ""


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


def with_tiling(
    wanted: PreparedSettings,
    folder: Path,
    settings: PreparationSettings,
    configs: ModelConfigs,
    buckets: Collection[Bucket],
) -> PreparedSettings:
    """Return the settings with a decision on tiles: the flag's, or the folder's, or that of this GPU's free memory."""
    if wanted.tiling is not None:
        return wanted
    tiling = read_prepared_settings(folder).get("tiling")
    if tiling is None:
        is_on_gpu = torch.cuda.is_available() and settings.preparation.save_latents_and_embeddings
        tiling = is_on_gpu and needs_tiles(settings, configs, buckets, torch.cuda.mem_get_info(local_rank())[0])
    return replace(wanted, tiling=tiling)


def needs_tiles(
    settings: PreparationSettings, configs: ModelConfigs, buckets: Collection[Bucket], free_bytes: int
) -> bool:
    """Return whether encoding full frames would not fit into the free memory of a GPU, and say so."""
    batch_size = 1 if settings.encoding.use_slicing else settings.encoding.batch_size
    itemsize = DTYPES[settings.model.dtype].itemsize
    needed, largest = max((encoding_bytes(configs.vae, one, batch_size, itemsize), one) for one in buckets)
    needed = int(needed * (1 + MARGIN))
    if needed <= free_bytes:
        return False
    sizes = f"{in_bytes(needed, 1024)}, {in_bytes(free_bytes, 1024)} are free"
    logger.info("encoding %s takes %s: the VAE encodes tiles; --no-use_tiling turns that off", largest, sizes)
    return True


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
        frames = settings.preparation.condition_frames
        facts += [] if frames == FIRST else [frames]
    if settings.preparation.save_control_latents:
        facts.append(settings.control.compute_control or planned.control.content)
    fills, has_mask = settings.control.compute_control == INPAINT, settings.masks.use_masks
    if fills or has_mask:
        # With both, the mask is also a tensor of its own.
        facts.append(("control and mask" if fills and has_mask else "mask", planned.mask and planned.mask.content))
    if settings.preparation.layout == "files":
        facts.append(caption_key(clip.caption))
    # For file names and lists: not hidden, on one line, and within 255 bytes.
    stem = re.sub(r"[^\w.-]+", "_", clip.video.stem).lstrip(".").encode()[:100].decode(errors="ignore")
    return Sample(f"{stem}-{sample_digest(facts)}", caption_key(clip.caption), planned)


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
        with_controls=flags.save_control_latents,
        with_masks=settings.masks.use_masks,
    )


def latent_bytes(settings: PreparationSettings, configs: ModelConfigs, bucket: Bucket) -> int:
    """Return the bytes of a sample's latents, with those of its image and its control, and its mask."""
    flags, (frames, height, width) = settings.preparation, bucket.latent_shape
    if flags.save_image_latents:
        frames += flags.num_image_latents * num_condition_latents(flags.condition_frames)
    if flags.save_control_latents:
        frames += bucket.latent_shape[0]
    masks = 2 * prod(bucket.latent_shape) if settings.masks.use_masks else 0
    return 2 * configs.vae["latent_channels"] * frames * height * width * DTYPES[settings.model.dtype].itemsize + masks


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


def finish(work: Preparation, data: RawData, prepared: PreparedSettings) -> bool:
    """List the samples, in one process, when all are done; return whether they are listed.

    Raises UserError if clips did not decode, and --on_bad_clip is error.
    """
    settings, layout = work.settings, work.layout
    if not (work.is_done() and any(is_mine for _, is_mine in work.claims.take([INDEX]))):
        return False
    refresh_names(layout.folder)
    broken = BrokenClips(layout.folder).read()
    missing = {sample.name for sample in layout.missing(broken.keys())}
    if gone := missing - broken.keys():
        raise UserError(f"{len(gone)} samples were removed from {layout.folder} while others were prepared; run again")
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
    report_skipped(bad, layout.folder, data.dropped)
    unlisted = layout.write_index(kept)
    write_settings(layout.folder, prepared)
    shutil.rmtree(on_this_machine(layout.folder / STAGING), ignore_errors=True)
    used = RawData([sample.planned for sample in kept], bad, data.dropped)
    write_report(settings, used, work.source, complete=SKIPPED_FILE)
    if unlisted:
        logger.warning("%d samples that were prepared here earlier are no longer listed", unlisted)
    has_tensors = settings.preparation.save_latents_and_embeddings
    flags = f"--data_root {shlex.quote(str(layout.folder))}" + (" --load_tensors" if has_tensors else "")
    # Not logged, because only the first rank logs.
    tqdm.write(f"prepared {len(kept)} samples in {layout.folder}; train on them with {flags}")
    return True
