"""What `--dry_run` does: show what would be made of the clips, as a table, clip by clip and as a picture."""

import argparse
import logging
from pathlib import Path

from common.errors import listing
from common.hub_token import log_without_tokens
from common.ranks import launch_rank
from data.buckets import Draw
from data.clips import PlannedClip
from data.plan import RawData
from data.report import write_plan
from dataset import Batch
from models.source import ModelSource
from preparation.prepare import clip_dataset, log_plan
from video.contact_sheet import SheetRow, draw_contact_sheet, sample_for_sheet


logger = logging.getLogger(__name__)


def rehearse(args: argparse.Namespace, data: RawData) -> None:
    """Print the plan, and write it in detail and as a picture; nothing is encoded. Of several ranks, one does.

    Raises:
        UserError: the model cannot be read.
    """
    if launch_rank() > 0:
        return
    log_without_tokens(logging.INFO)
    source = ModelSource(args.model_id, args.revision, args.variant, args.cache_dir)
    log_plan(args, data, source, source.configs())
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if data.bad:
        logger.warning("%s", listing(f"{len(data.bad)} of the clips cannot be used:", data.bad, most=len(data.bad)))
    write_plan(data.clips, data.bad, folder / "plan.csv")
    shown = sample_for_sheet(data.clips)
    dataset = clip_dataset(args, shown)
    batches = [dataset[Draw(index, 0)] for index in range(len(shown))]
    for batch in batches:
        for _, reason in batch.failed:
            logger.warning("warning: a clip does not decode: %s", reason)
    rows = [sheet_row(planned, batch) for planned, batch in zip(shown, batches, strict=True) if not batch.failed]
    draw_contact_sheet(rows, folder / "contact_sheet.png")
    logger.info("wrote %s and %s", folder / "plan.csv", folder / "contact_sheet.png")


def sheet_row(planned: PlannedClip, batch: Batch) -> SheetRow:
    """First, middle and last frame of a clip as the model sees it."""
    frames = batch.videos[0].permute(0, 2, 3, 1).numpy()
    shown = dict.fromkeys((0, len(frames) // 2, len(frames) - 1))
    title = f"{planned.bucket} · {planned.clip.video.name}" + (f" · part {planned.part + 1}" if planned.part else "")
    return SheetRow([frames[index] for index in shown], title, planned.clip.caption)
