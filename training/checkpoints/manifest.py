"""Record the size and digest of a folder's files, and find damage before anything is loaded."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.bars import tqdm
from common.run_folder import MANIFEST


_THREADS = 8  # hashing releases the GIL
_PIECE = 2**20  # bytes per read


def write_manifest(folder: Path) -> None:
    """List every file of a folder in its manifest."""
    entries = _entries(folder, _files(folder), "Hashing")
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """Return how a folder differs from its manifest; None if it does not.

    Every byte is read, which takes some seconds per ten gigabytes.
    """
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {name: entry["size"] for name, entry in expected.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"it has no readable {MANIFEST}"
    try:
        for name, size in sizes.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes of {size}"
        entries = _entries(folder, list(expected), "Verifying")
    except OSError as error:
        return f"it cannot be read ({error})"
    differing = [name for name, entry in entries.items() if entry != expected[name]]
    return f"{differing[0]} has changed since it was written" if differing else None


def size_of(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum((folder / name).stat().st_size for name in _files(folder))


def _files(folder: Path) -> list[str]:
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in paths if path != Path(MANIFEST)]


def _entries(folder: Path, files: list[str], doing: str) -> dict[str, dict[str, int | str]]:
    """Return size and digest of each file, with a progress bar over the bytes."""
    total = sum((folder / name).stat().st_size for name in files)
    with (
        tqdm(desc=f"{doing} {folder.name}", total=total, unit="B", unit_scale=True, leave=False) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        return dict(zip(files, pool.map(lambda name: _entry(folder / name, bar), files), strict=True))


def _entry(file: Path, bar: tqdm) -> dict[str, int | str]:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            bar.update(count)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}
