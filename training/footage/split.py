"""Cut the scenes of one video into clips, with contact sheets and a record that is written last."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.bars import tqdm
from common.files import atomic_write, slug
from flags.footage import DETECTORS, SceneFlags
from footage.cuts import make_detector, survey_video
from footage.scenes import Scene, glance_step, plan_scenes
from video.contact_sheet import SheetRow, draw_contact_sheet
from video.io import stream_frames, write_video
from video.probe import VideoInfo


CLIPS, SHEETS, RECORDS = "clips", "sheets", "sources"  # folders below --output_dir

_ROWS_PER_SHEET = 50
_THUMBNAIL = (444, 296)  # pixels; twice a cell of the sheet


@dataclass(frozen=True)
class Film:
    """One file of footage."""

    path: Path
    info: VideoInfo

    @property
    def digest(self) -> str:
        """A short hash of its content."""
        return self.info.content[:12]

    @property
    def key(self) -> str:
        """The name of its record, sheets and folder of clips."""
        return f"{slug(self.path.stem) or 'video'}-{self.digest}"


@dataclass(frozen=True)
class Record:
    """What was found in a film that is done."""

    key: str
    source: str  # absolute path
    frames: int
    fps: float
    cuts: list[int]
    scenes: list[Scene]


def clip_file(key: str, scene: Scene) -> str:
    """Return the path below --output_dir of the clip of a film's scene."""
    name = key.rpartition("-")[0]  # without the digest
    return f"{CLIPS}/{key}/{name}-{scene.start:06d}-{scene.end:06d}.mp4"


def split_film(film: Film, folder: Path, flags: SceneFlags, num_threads: int = 1, show_bars: bool = False) -> None:
    """Write the clips of a film that do not exist, its contact sheets, then its record.

    Raises ValueError, which names the file, if it cannot be decoded, and UserError if the folder cannot be written.
    """

    def progress(frames: Iterable[Any]) -> tqdm:
        what = f"Finding cuts in {film.path.name}"
        return tqdm(frames, what, film.info.num_frames, unit=" frames", disable=not show_bars)

    survey = survey_video(
        film.path,
        film.info,
        make_detector(flags.detector, flags.threshold or DETECTORS[flags.detector]),
        glance_every=glance_step(film.info, flags.min_seconds),
        num_threads=num_threads,
        progress=progress,
    )
    scenes = plan_scenes(survey, film.info, flags)
    kept = [scene for scene in scenes if not scene.skipped]
    rows = []
    written = _write_clips(film, kept, folder, flags, num_threads)
    for row in tqdm(written, f"Cutting {film.path.name}", len(kept), unit=" clips", disable=not show_bars):
        rows.append(row)
        if len(rows) % _ROWS_PER_SHEET == 0 or len(rows) == len(kept):
            number = -(-len(rows) // _ROWS_PER_SHEET)
            shown = rows[(number - 1) * _ROWS_PER_SHEET :]
            draw_contact_sheet(shown, folder / SHEETS / f"{film.key}-{number}.png")
    source, info = str(film.path.absolute()), film.info
    record = Record(film.key, source, info.num_frames, info.fps, survey.cuts, scenes)
    with atomic_write(folder / RECORDS / f"{film.key}.json") as partial:
        partial.write_text(json.dumps(asdict(record)), encoding="utf-8")


def _write_clips(
    film: Film, scenes: list[Scene], folder: Path, flags: SceneFlags, num_threads: int
) -> Iterator[SheetRow]:
    """Write the missing clips in one pass over the film; yield a row of the contact sheet for each."""
    files = [folder / clip_file(film.key, scene) for scene in scenes]
    shown = [(scene.start, (scene.start + scene.end - 1) // 2, scene.end - 1) for scene in scenes]
    wanted = [
        list(dict.fromkeys(three)) if flags.list or file.exists() else range(scene.start, scene.end)
        for scene, file, three in zip(scenes, files, shown, strict=True)
    ]
    frames = stream_frames(film.path, chain.from_iterable(wanted), num_threads)
    for scene, file, three, indices in zip(scenes, files, shown, wanted, strict=True):
        thumbnails: list[np.ndarray] = []
        top, bottom, left, right = scene.box
        cropped = (frame[top:bottom, left:right] for frame in islice(frames, len(indices)))
        noted = _with_thumbnails(zip(indices, cropped, strict=True), three, thumbnails)
        if isinstance(indices, range):
            part = film.info.part(scene.start, scene.end)
            with atomic_write(file) as partial:
                rate = Fraction(part.fps).limit_denominator(10_000)
                write_video(partial, noted, rate, times=part.frame_times, num_threads=num_threads)
        else:
            list(noted)
        size = f"{len(range(scene.start, scene.end))}x{bottom - top}x{right - left}"
        where = f"{film.path.name}, frames {scene.start} to {scene.end - 1}"
        yield SheetRow(thumbnails, f"{size} · {scene.seconds:.1f} s", where)


def _with_thumbnails(
    frames: Iterable[tuple[int, np.ndarray]], shown: tuple[int, ...], thumbnails: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Pass frames through, and add small copies of those that are shown to `thumbnails`."""
    for index, frame in frames:
        if index in shown:
            image = Image.fromarray(np.ascontiguousarray(frame))
            image.thumbnail(_THUMBNAIL, Image.Resampling.BILINEAR)
            thumbnails.append(np.asarray(image))
        yield frame
