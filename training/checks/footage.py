"""Check the flags of split_scenes.py."""

import os
from pathlib import Path

from checks.files import check_writable
from common.errors import UserError
from flags.settings import SplittingSettings


def check_splitting(settings: SplittingSettings) -> None:
    """Raise UserError if the footage does not exist, clips would be among it, or flags contradict each other."""
    root, folder, scenes = Path(settings.footage.data_root), Path(settings.footage.output_dir), settings.scenes
    if not os.path.exists(root):
        raise UserError(f"--data_root: {root} does not exist")
    if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
        beside = root.absolute().with_name(f"{root.absolute().name}-clips")
        raise UserError(
            f"--output_dir: {folder} is in --data_root, where clips would become footage; pass a folder beside it, "
            f"such as {beside}"
        )
    check_writable(settings.footage.output_dir)
    if scenes.max_seconds < 2 * scenes.min_seconds:
        raise UserError(
            f"--max_seconds: {scenes.max_seconds:g} is less than twice --min_seconds {scenes.min_seconds:g}, so that "
            "the halves of a scene that is a little longer would be too short"
        )
    if scenes.list and scenes.crop_bars:
        raise UserError("--crop_bars: not possible with --list, whose table has frames but no rows; omit one of them")
