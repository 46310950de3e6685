"""Complete checkpoints without weights."""

from pathlib import Path

from checkpoints.manifest import write_manifest
from common.run_folder import STATE_FILE


def make_checkpoint(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text(f'{{"step": {step}, "seed": 42, "settings": {{}}}}\n')
    write_manifest(folder)
    return folder
