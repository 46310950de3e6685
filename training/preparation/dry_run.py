"""`--dry_run` of prepare_dataset.py: show the samples that would be made, as tables, as a picture and as a page."""

import logging
import shutil

from common.errors import listing
from common.logs import log_without_tokens
from common.ranks import launch_rank
from common.remote import to_path
from common.stores import is_url
from common.units import in_bytes
from flags.settings import PreparationSettings
from planning.report import write_plan
from planning.samples import RawData
from preparation.prepare import log_plan, model_source, tensor_bytes
from preparation.report import sheet_rows, write_report
from video.contact_sheet import draw_contact_sheet


logger = logging.getLogger(__name__)


def show_plan(settings: PreparationSettings, data: RawData) -> None:
    """Print the plan, and write it in detail, as a picture and as a page, on the first rank; nothing is encoded."""
    if launch_rank() > 0:
        return
    log_without_tokens(logging.INFO)
    if data.bad:
        logger.warning("%s", listing(f"{len(data.bad)} of the clips cannot be used:", data.bad, most=len(data.bad)))
    if data.dropped:
        logger.info("%s", listing(f"{len(data.dropped)} of the clips are dropped by --keep:", data.dropped))
    source = model_source(settings.model)
    log_plan(settings, data, source)
    folder = to_path(settings.preparation.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(data.clips, [*data.bad, *data.dropped], folder / "plan.csv")
    rows = sheet_rows(settings, data.clips)
    draw_contact_sheet(rows, folder / "contact_sheet.png")
    if settings.preparation.save_latents_and_embeddings:
        sizes = tensor_bytes(settings, source.configs(), data.clips)
        parts = ", ".join(f"{kind} {in_bytes(size)}" for kind, size in sizes.items())
        free = "" if is_url(str(folder)) else f"; {in_bytes(shutil.disk_usage(folder).free)} are free"
        logger.info("the tensors take %s on disk: %s%s", in_bytes(sum(sizes.values())), parts, free)
    logger.info("wrote %s and %s", folder / "plan.csv", folder / "contact_sheet.png")
    write_report(settings, data, source, rows, complete="plan.csv")
