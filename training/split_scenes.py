"""Cut footage into clips of one scene each: films in, clips and their table out.

    python training/split_scenes.py --data_root my-footage --output_dir my-clips

Look at my-clips/sheets, then pass my-clips/clips.csv as --dataset_file to score_clips.py, caption_dataset.py or
prepare_dataset.py. A run that was stopped or killed continues when it is started again.
"""

import logging
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from args import parse_split_args
from common.bars import tqdm
from common.errors import UserError, listing, one_line_errors
from common.logs import log_without_tokens
from common.remote import default_cache_folder
from common.startup import announce
from data.buckets import Bucket
from data.clips import BadClip, Clip, plan_clips
from data.folder import visible_files
from flags.footage import CLIPS_TABLE
from flags.settings import SplittingSettings
from footage.output import SKIPPED_FILE, OutputFolder
from footage.pool import worker_processes
from footage.split import SHEETS, Film, Record, split_film
from planning.describe import report_skipped
from planning.plan import check_bad_clips
from planning.samples import RawData
from video.cache import FileCache
from video.media import IMAGE_SUFFIXES, is_clip
from video.probe import probe_files


def find_footage(root: Path) -> RawData:
    """List and probe the videos in a folder and its subfolders, or the one file.

    Copies of a file count once. A folder without videos is a UserError.
    """
    files = [root] if root.is_file() else [root / name for name in visible_files(root)]
    files = [file for file in files if file == root or (is_clip(file) and file.suffix.lower() not in IMAGE_SUFFIXES)]
    if not files:
        raise UserError(f"--data_root: {root} has no videos, neither directly nor in its subfolders")
    infos = probe_files(files, FileCache(default_cache_folder()))
    first_of: dict[str, Path] = {}
    for file, info in infos.items():
        if isinstance(info, str):
            continue
        if info.is_image or info.fps <= 0:
            infos[file] = (
                "is a still image" if info.is_image else "has no frame rate; convert it (ffmpeg -i OLD NEW.mp4)"
            )
        elif first_of.setdefault(info.content, file) != file:
            tqdm.write(f"{file} is a copy of {first_of[info.content]} and is not split again")
    clips = [Clip(file, "", str(root)) for file in files if isinstance(infos[file], str) or file in first_of.values()]
    return RawData(*plan_clips(clips, infos, [Bucket(1, 16, 16)]))  # the bucket has no effect: nothing is resized


def split_films(films: Sequence[Film], settings: SplittingSettings) -> list[BadClip]:
    """Split films, several at a time; return those that cannot be decoded, with the reason."""
    num_workers = min(settings.footage.num_workers, len(films))
    num_threads = max(1, (os.cpu_count() or 1) // max(1, num_workers))
    folder = Path(settings.footage.output_dir)
    split = partial(split_film, folder=folder, flags=settings.scenes, num_threads=num_threads)
    outcomes = _in_this_process(films, split) if num_workers <= 1 else _in_processes(films, split, num_workers)
    return [
        BadClip(str(film.path), settings.footage.data_root, str(error).removeprefix(f"{film.path}: "))
        for film, error in outcomes
        if error is not None
    ]


def _in_this_process(films: Sequence[Film], split: partial) -> Iterator[tuple[Film, ValueError | None]]:
    for film in films:
        try:
            split(film, show_bars=True)
            yield film, None
        except ValueError as error:
            yield film, error


def _in_processes(films: Sequence[Film], split: partial, num_workers: int) -> Iterator[tuple[Film, ValueError | None]]:
    try:
        with worker_processes(num_workers) as pool:
            # The longest first, so that no process works on one alone at the end.
            jobs = {pool.submit(split, film): film for film in sorted(films, key=lambda film: -film.info.num_frames)}
            for job in tqdm(as_completed(jobs), "Splitting", len(jobs), unit=" films", delay=0):
                try:
                    job.result()
                    yield jobs[job], None
                except ValueError as error:
                    yield jobs[job], error
    except BrokenProcessPool as error:
        raise UserError(
            "a process died, most likely because memory ran out; lower --num_workers. Finished films are kept"
        ) from error


def summarize(records: Sequence[Record], num_clips: int) -> str:
    """Return what was found in all films, on one line, and the films without a cut."""
    scenes = [scene for record in records for scene in record.scenes]
    seconds = sum(record.frames / record.fps for record in records)
    kept = sum(scene.seconds for scene in scenes if not scene.skipped)
    reasons = Counter(scene.skipped for scene in scenes if scene.skipped)
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
    uncut = [record.source for record in records if not record.cuts]
    line = (
        f"{len(records)} films of {_clock(seconds)}, {sum(len(record.cuts) for record in records)} cuts: {num_clips} "
        f"clips of {_clock(kept)}; skipped scenes: {skipped}"
    )
    return "\n".join([line, *([listing("no cuts found in:", uncut, most=3)] if uncut else [])])


def _clock(seconds: float) -> str:
    return f"{seconds // 3600:.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:02.0f}"


def split_scenes(settings: SplittingSettings) -> None:
    """Split all footage that is not done, and write the tables; raises UserError as the parts do."""
    from common.folder_lock import locked_folder  # with filelock, which --help does not need

    footage, folder = settings.footage, Path(settings.footage.output_dir)
    data = find_footage(Path(footage.data_root))
    check_bad_clips(data, footage.on_bad_clip)
    with locked_folder(folder):
        output = OutputFolder(folder, settings.scenes)
        output.start()
        films = [Film(sample.clip.video, sample.info) for sample in data.clips]
        remaining = [film for film in films if not output.is_done(film)]
        if len(remaining) < len(films):
            tqdm.write(f"{len(films) - len(remaining)} of {len(films)} films are done already")
        failures = split_films(remaining, settings) if remaining else []
        report_skipped([*data.bad, *failures], folder)
        records = output.records()
        num_clips = output.write_tables(records)
        print(summarize(records, num_clips))
        if failures and footage.on_bad_clip == "error":
            title = f"{len(failures)} of {len(films)} films cannot be split; fix or remove them, or skip them with "
            raise UserError(listing(f"{title}--on_bad_clip skip:", failures, most=len(failures)))
        if not num_clips:
            raise UserError(f"there are no clips: see {folder / SKIPPED_FILE}; lower --min_seconds or --margin_frames")
        root = Path(footage.data_root)
        flags = ["--dataset_file", str(folder / CLIPS_TABLE)]
        flags += ["--data_root", str(root.parent if root.is_file() else root)] if settings.scenes.list else []
        print(f"look at {folder / SHEETS}, then score, caption or prepare with: {shlex.join(flags)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the flags of `argv`, or of the command line if it is None."""
    with one_line_errors():
        settings = parse_split_args(argv)
        log_without_tokens(logging.INFO)
        announce("reading the footage")
        split_scenes(settings)


if __name__ == "__main__":
    main()
