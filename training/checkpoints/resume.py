"""Which checkpoint a run resumes from."""

import logging
from pathlib import Path

from checkpoints.manifest import find_damage
from common.errors import UserError
from common.run_folder import list_checkpoints


logger = logging.getLogger(__name__)


def newest_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """Return what `find_checkpoint` returns if nothing is damaged, without reading the files."""
    if resume_from != "latest":
        return None if resume_from is None else Path(resume_from)
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1][1] if checkpoints else None


def find_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """Return the checkpoint to resume from, whose every byte matches its manifest; raise a UserError if none does.

    Args:
        resume_from: a folder; "latest" for the newest undamaged one, with warnings of those skipped; None for none.
    """
    if resume_from is None:
        return None
    if resume_from != "latest":
        if damage := find_damage(Path(resume_from)):
            raise UserError(
                f"--resume_from_checkpoint: {resume_from} is not a complete checkpoint: {damage}; latest skips it"
            )
        return Path(resume_from)
    for _, folder in list_checkpoints(output_dir, finished=False):
        logger.warning("warning: %s is not a checkpoint (it was never finished); skipped", folder)
    checkpoints = [folder for _, folder in list_checkpoints(output_dir)]
    for folder in reversed(checkpoints):
        if (damage := find_damage(folder)) is None:
            return folder
        logger.warning("warning: %s is damaged (%s); skipped", folder, damage)
    if checkpoints:
        raise UserError(
            f"--resume_from_checkpoint latest: every checkpoint in '{output_dir}' is damaged; to start again, set "
            "another --output_dir"
        )
    return None
