"""What a finished folder holds, by size and digest: damage is found before anything is loaded from it."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from files import flush
from run_folder import MANIFEST


_THREADS = 8  # hashing lets other threads run


def write_manifest(folder: Path) -> None:
    """List every file of a folder in its manifest, flushed to the disk with all of them."""
    files = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: flush(folder / name), files))
        entries = dict(zip(files, pool.map(lambda name: _entry(folder / name), files), strict=True))
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")
    flush(manifest)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, or should have one; None for a whole one.

    Every byte is read: some seconds for each ten gigabytes.
    """
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        missing = [name for name in expected if not (folder / name).is_file()]
        sizes = {name: entry["size"] for name, entry in expected.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"it has no {MANIFEST} that can be read"
    if missing:
        return f"{missing[0]} is missing"
    try:
        for name, size in sizes.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes of {size}"
        with ThreadPoolExecutor(_THREADS) as pool:
            entries = pool.map(lambda name: _entry(folder / name), expected)
            differing = [name for name, entry in zip(expected, entries, strict=True) if entry != expected[name]]
    except OSError as error:
        return f"it cannot be read ({error})"
    return f"{differing[0]} has other bytes than were written" if differing else None


def size_of(folder: Path) -> int:
    """The bytes of all files of a folder."""
    return sum((folder / name).stat().st_size for name in _files(folder))


def _files(folder: Path) -> list[str]:
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in paths if path != Path(MANIFEST)]


def _entry(file: Path) -> dict[str, int | str]:
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}
