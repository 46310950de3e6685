"""The output folder of split_scenes.py: its settings, the table of clips, and what is skipped.

split.json            the flags that clips depend on, and digests of the tables that were written
sources/<film>.json   a film that is done: its cuts and scenes
clips/<film>/         its clips
sheets/<film>-1.png   its contact sheets
clips.csv             the table of all clips, for --dataset_file
skipped_scenes.csv    scenes that became no clips
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_write, remove_partials
from flags.footage import CLIPS_TABLE, DETECTORS, SceneFlags
from footage.scenes import Scene
from footage.split import CLIPS, RECORDS, Film, Record, clip_file


SETTINGS_FILE, SKIPPED_FILE = "split.json", "skipped_scenes.csv"


class OutputFolder:
    """The folder, for clips with these flags.

    Raises UserError if it has clips with other flags, or if the table of clips was edited.
    """

    def __init__(self, folder: Path, flags: SceneFlags):
        self.folder, self.flags = folder, flags
        self._settings = asdict(flags) | {"threshold": flags.threshold or DETECTORS[flags.detector]}
        self._digests: list[str] = []
        self._starts_again = False  # with other flags, because the earlier ones gave no clip
        file, table = folder / SETTINGS_FILE, folder / CLIPS_TABLE
        if file.exists():
            try:
                earlier = json.loads(file.read_text(encoding="utf-8"))
                self._digests = earlier["tables"]
                earlier = earlier["settings"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"--output_dir: {file} cannot be read ({error}); pass another folder") from error
            changed = [name for name, value in self._settings.items() if earlier.get(name) != value]
            scenes = [scene for record in self.records() for scene in record.scenes]
            self._starts_again = bool(changed) and all(scene.skipped for scene in scenes)
            if changed and not self._starts_again:
                values = ", ".join(f"--{name} {earlier.get(name)}, not {self._settings[name]}" for name in changed)
                raise UserError(
                    f"--output_dir: {folder} has clips made with {values}; pass the same flags, or another folder"
                )
        if table.exists() and _digest(table.read_bytes()) not in self._digests:
            raise UserError(
                f"--output_dir: {table} was edited or is not the table of split_scenes.py, and would be replaced; "
                "rename it, or pass another folder"
            )

    def start(self) -> None:
        """Record the flags before the first clip is written, and remove what killed runs left."""
        for folder in (self.folder, *self.folder.glob("*/"), *self.folder.glob(f"{CLIPS}/*/")):
            remove_partials(folder)
        if self._starts_again:
            for record in (self.folder / RECORDS).glob("*.json"):
                record.unlink()
        self._save()

    def _save(self) -> None:
        with atomic_write(self.folder / SETTINGS_FILE) as partial:
            partial.write_text(json.dumps({"settings": self._settings, "tables": self._digests}), encoding="utf-8")

    def is_done(self, film: Film) -> bool:
        """Return whether a film of this content is done, under this name or another."""
        return any((self.folder / RECORDS).glob(f"*-{film.digest}.json"))

    def records(self) -> list[Record]:
        """Return the films that are done, in the order of their paths."""
        found = []
        for file in (self.folder / RECORDS).glob("[!.]*.json"):
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
                scenes = [Scene(**scene | {"box": tuple(scene["box"])}) for scene in values["scenes"]]
                found.append(Record(**values | {"scenes": scenes}))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file} is damaged ({error}); remove it to split its film again") from error
        return sorted(found, key=lambda record: (record.source, record.key))

    def write_tables(self, records: Sequence[Record]) -> int:
        """Write the tables of clips and of skipped scenes; return the number of clips.

        Clips that were removed are not listed.
        """
        clips = [
            self._row(record, scene)
            for record in records
            for scene in record.scenes
            if not scene.skipped and (self.flags.list or (self.folder / clip_file(record.key, scene)).exists())
        ]
        skipped = [
            {"source": record.source} | _frames(scene, "start_frame", "end_frame") | {"reason": scene.skipped}
            for record in records
            for scene in record.scenes
            if scene.skipped
        ]
        if clips:
            table = _csv(clips)
            if _digest(table) not in self._digests:
                self._digests.append(_digest(table))
                self._save()  # before the table, so that a killed run does not take it for an edited one
            _write(self.folder / CLIPS_TABLE, table)
        if skipped:
            _write(self.folder / SKIPPED_FILE, _csv(skipped))
        return len(clips)

    def _row(self, record: Record, scene: Scene) -> dict[str, Any]:
        top, bottom, left, right = scene.box
        size = {"fps": f"{record.fps:.6g}", "height": bottom - top, "width": right - left}
        if self.flags.list:
            return {"video": record.source} | _frames(scene, "start_frame", "end_frame") | size
        # Other names for the frames: start_frame and end_frame would be those of the clip's own file.
        where = {"video": clip_file(record.key, scene), "source": record.source}
        return where | _frames(scene, "source_start", "source_end") | size


def _frames(scene: Scene, start: str, end: str) -> Mapping[str, Any]:
    return {start: scene.start, end: scene.end, "seconds": f"{scene.seconds:.3f}"}


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _write(file: Path, content: bytes) -> None:
    with atomic_write(file) as partial:
        partial.write_bytes(content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
