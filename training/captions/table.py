"""The table of captions, and the file with the captions of an unfinished run.

Each caption is appended to `captions.jsonl.part` at once, so that a killed run loses none. The table itself
is replaced atomically.
"""

import json
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import UserError
from common.files import atomic_write
from common.text_files import digest_lines, index_lines, read_json


AUTHOR_COLUMN = "captioned_by"  # marks tables that this script wrote
USER = "user"


@dataclass(frozen=True)
class Caption:
    """A caption and who wrote it."""

    text: str
    author: str  # the model's name, or USER


@dataclass(frozen=True)
class CaptionSettings:
    """Everything besides the clip that an answer depends on."""

    model: str
    prompt: str | None  # None: the built-in one
    num_frames: int
    skipped: tuple[int, int]  # frames at the start and at the end
    max_size: int
    temperature: float
    max_tokens: int

    @property
    def digest(self) -> str:
        """A hash of all fields."""
        return digest_lines([json.dumps(asdict(self))])


def clip_key(row: Mapping[str, object]) -> str:
    """Return what tells a row's clip from others: its path, with its frames if it is a part of a file."""
    part = [str(row.get(name) or "") for name in ("start_frame", "end_frame")]
    return f"{row['video']}:{'-'.join(part)}" if any(part) else str(row["video"])


class CaptionFile:
    """A JSONL table with one row per clip: `video`, `caption`, `captioned_by`, and the clip's other columns.

    The file need not exist; one that this class did not write is a UserError.
    """

    def __init__(self, path: Path):
        self.path = path
        self._part = path.with_name(f"{path.name}.part")
        self._lock = threading.Lock()
        self._rows = self._read()
        self._appended = self._recover()

    def captions(self) -> dict[str, Caption]:
        """Return the captions of the table and of a stopped run that are not empty, by the clips' keys."""
        filled = [row for row in self._rows if row["caption"].strip()]
        found = {clip_key(row): Caption(row["caption"], row.get(AUTHOR_COLUMN, USER)) for row in filled}
        return found | {video: caption for video, caption, _ in self._appended}

    def unfinished(self, settings: CaptionSettings) -> dict[str, Caption]:
        """Return the captions of an unfinished run that were requested with these settings."""
        return {video: caption for video, caption, digest in self._appended if digest == settings.digest}

    def check_writable(self) -> None:
        """Check that the folder is writable, before the model is asked."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path.parent).close()
        except OSError as error:
            raise UserError(f"--output_file: {self.path} cannot be written ({error.strerror})") from error

    def append(self, video: str, caption: Caption, settings: CaptionSettings) -> None:
        """Append a caption to the file of the unfinished run. Thread-safe."""
        line = {"video": video, "caption": caption.text, "author": caption.author, "settings": settings.digest}
        with self._lock:
            size = self._part.stat().st_size if self._part.exists() else 0
            try:
                with open(self._part, "ab") as file:
                    file.write(index_lines([line]).encode())
            except OSError as error:
                with suppress(OSError):
                    os.truncate(self._part, size)  # half a line would corrupt the next one
                reason = f"({error.strerror}); finished captions are kept"
                raise UserError(f"{self._part} cannot be written {reason}") from error
            self._appended.append((video, caption, settings.digest))

    def write(self, rows: Sequence[Mapping[str, str]], folder: Path | None, *, finished: bool) -> None:
        """Replace the table.

        Args:
            rows: of the listed clips. Rows of other captioned clips whose files exist are kept after them.
            folder: where the clips' relative paths start.
            finished: `rows` holds all captions asked for, so that the appended ones can be deleted.
        """
        listed = {clip_key(row) for row in rows}
        earlier = {clip_key(row): row for row in self._rows}
        kept = [
            {"video": key} | earlier.get(key, {}) | {"caption": caption.text, AUTHOR_COLUMN: caption.author}
            for key, caption in self.captions().items()
            if key not in listed and os.path.exists(os.path.join(folder or "", earlier.get(key, {}).get("video", key)))
        ]
        if rows or kept:
            with atomic_write(self.path) as partial:
                partial.write_text(index_lines([*rows, *kept]), encoding="utf-8")
        if finished:
            self._part.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        rows = read_json(self.path)
        if rows and not any(isinstance(row, dict) and AUTHOR_COLUMN in row for _, row in rows):
            raise UserError(
                f"--output_file: {self.path} exists already, and caption_dataset.py did not write it; choose another "
                "name; if it is the list of the clips, pass it as --dataset_file"
            )
        for place, row in rows:
            fields = (row.get("video"), row.get("caption") or "") if isinstance(row, dict) else (None,)
            if not all(isinstance(field, str) for field in fields):
                raise UserError(
                    f"--output_file: {self.path}: {place} has no video or no text as its caption; fix it, or remove "
                    "the line to have the clip captioned again"
                )
        return [row | {"caption": row.get("caption") or ""} for _, row in rows]

    def _recover(self) -> list[tuple[str, Caption, str]]:
        """Return what an earlier run appended; a half-written last line is removed."""
        if not self._part.exists():
            return []
        try:
            content = self._part.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self._part, content.rfind(b"\n") + 1)
        except OSError as error:
            raise UserError(f"{self._part} cannot be read or repaired ({error.strerror})") from error
        lines = [line for _, line in read_json(self._part)]
        fields = {"video", "caption", "author", "settings"}
        if not all(isinstance(line, dict) and line.keys() == fields for line in lines):
            raise UserError(f"{self._part} is not what caption_dataset.py left there; remove it")
        return [(line["video"], Caption(line["caption"], line["author"]), line["settings"]) for line in lines]
