"""`--dry_run` of prepare_dataset.py: show the samples that would be made of the clips, as tables and as a picture."""

import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence

from common.errors import listing
from common.logs import log_without_tokens
from common.ranks import launch_rank
from common.remote import to_path
from common.stores import is_url
from common.units import in_bytes
from data.buckets import Bucket
from data.clips import ClipSample
from data.sampler import Draw
from dataset import Batch
from flags.settings import PreparationSettings
from planning.plan import RawData
from planning.report import write_plan
from preparation.encode import clip_dataset
from preparation.prepare import log_plan, model_source, tensor_bytes
from video.contact_sheet import SheetRow, draw_contact_sheet


logger = logging.getLogger(__name__)


def show_plan(settings: PreparationSettings, data: RawData) -> None:
    """Print the plan, and write it in detail and as a picture, on the first rank; nothing is encoded."""
    if launch_rank() > 0:
        return
    log_without_tokens(logging.INFO)
    if data.bad:
        logger.warning("%s", listing(f"{len(data.bad)} of the clips cannot be used:", data.bad, most=len(data.bad)))
    log_plan(settings, data, model_source(settings.model))
    folder = to_path(settings.preparation.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(data.clips, data.bad, folder / "plan.csv")
    shown = sample_for_sheet(data.clips)
    dataset = clip_dataset(settings, shown)
    batches = [dataset[Draw(index, 0)] for index in range(len(shown))]
    for batch in batches:
        for _, reason in batch.failed:
            logger.warning("warning: a clip does not decode: %s", reason)
    rows = [sheet_row(planned, batch) for planned, batch in zip(shown, batches, strict=True) if not batch.failed]
    draw_contact_sheet(rows, folder / "contact_sheet.png")
    if settings.preparation.save_latents_and_embeddings:
        sizes = tensor_bytes(settings, model_source(settings.model).configs(), data.clips)
        parts = ", ".join(f"{kind} {in_bytes(size)}" for kind, size in sizes.items())
        free = "" if is_url(str(folder)) else f"; {in_bytes(shutil.disk_usage(folder).free)} are free"
        logger.info("the tensors take %s on disk: %s%s", in_bytes(sum(sizes.values())), parts, free)
    logger.info("wrote %s and %s", folder / "plan.csv", folder / "contact_sheet.png")


def sheet_row(planned: ClipSample, batch: Batch) -> SheetRow:
    """Return the first, middle and last frame of a clip as the model sees it."""
    frames = batch.videos[0].permute(0, 2, 3, 1).numpy()
    shown = dict.fromkeys((0, len(frames) // 2, len(frames) - 1))
    title = f"{planned.bucket} · {planned.clip.video.name}" + (f" · part {planned.part + 1}" if planned.part else "")
    return SheetRow([frames[index] for index in shown], title, planned.clip.caption)


def sample_for_sheet(planned: Sequence[ClipSample], most: int = 16) -> list[ClipSample]:
    """Choose at most `most` samples for a sheet, spread over the plan: of every bucket, and more of larger buckets.

    If there are more buckets than places, the largest ones are shown. The choice is deterministic. The samples are
    sorted by bucket, then in the order of the plan.
    """
    samples: dict[Bucket, list[ClipSample]] = defaultdict(list)
    for sample in planned:
        samples[sample.bucket].append(sample)
    largest = sorted(samples, key=lambda bucket: (-len(samples[bucket]), bucket))[:most]
    places = dict.fromkeys(largest, 1)
    for _ in range(most - len(places)):
        more = [bucket for bucket in places if places[bucket] < len(samples[bucket])]
        if not more:
            break
        places[max(more, key=lambda bucket: len(samples[bucket]) / places[bucket])] += 1
    return [
        samples[bucket][(2 * place + 1) * len(samples[bucket]) // (2 * places[bucket])]
        for bucket in sorted(places)
        for place in range(places[bucket])
    ]
