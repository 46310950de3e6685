"""Measure every clip, into a table that `--keep` chooses by, and a page that shows where to draw the line.

    python training/score_clips.py --data_root my-clips
    python training/prepare_dataset.py --data_root my-clips --keep "motion > 0.2 and duplicate == 0" ...

A run that was stopped or killed continues when it is started again, and only new and changed clips are measured.
"""

import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from args import parse_score_args
from checks.files import check_writable
from common.bars import tqdm
from common.errors import UserError, listing, one_line_errors
from common.files import path_of_script
from common.logs import log_without_tokens
from common.remote import default_cache_folder
from common.startup import announce
from common.stores import is_url
from data.buckets import Bucket
from data.clips import BadClip, plan_clips
from data.sources import DataSource, read_clips
from flags.data import SourceFlags
from flags.scores import SCORES_FILE
from flags.settings import ScoringSettings
from planning.plan import check_bad_clips, data_sources
from planning.samples import RawData
from video.cache import FileCache
from video.probe import probe_files


# Flags on the clips that the printed command has too.
_REPEATED = ("data_root", "dataset_file", "dataset_name", "dataset_config_name", "dataset_split")
_REPEATED += ("video_column", "caption_column", "allow_outside_paths")


def plan_scores(source: DataSource, table: Path, skip: tuple[int, int]) -> tuple[RawData, dict[Path, str]]:
    """List and probe the clips, each with its first usable frame; also return the SHA-256 of each readable file.

    An unreadable list is a UserError.
    """
    cache = default_cache_folder()
    clips, bad = read_clips(source, cache / "media", captions_file=table)  # which need no captions
    infos = probe_files([clip.video for clip in clips], FileCache(cache))
    one_frame = [Bucket(1, 16, 16)]  # its size has no effect, because nothing is resized
    planned, unusable = plan_clips(clips, infos, one_frame, skip_start=skip[0], skip_end=skip[1])
    digests = {path: info.sha256 for path, info in infos.items() if not isinstance(info, str)}
    return RawData(planned, [*bad, *unusable]), digests


def write_scores(settings: ScoringSettings) -> None:
    """Write the table and the page of scores; raises UserError if clips cannot be used or scored."""
    announce("loading OpenCV")
    from footage.models import check_models
    from footage.score_page import write_score_page
    from footage.score_table import check_table, score_rows, write_table
    from footage.scoring import Measures, score_clips

    (source,) = data_sources(settings.sources)
    flags, skip = settings.scores, (settings.sources.skip_frames_start, settings.sources.skip_frames_end)
    table = Path(flags.output_file) if flags.output_file else source.folder / SCORES_FILE
    wanted = Measures(flags.text, Path(flags.aesthetic_model) if flags.aesthetic_model else None)
    if not is_url(str(table)):
        check_writable(str(table.parent), "--output_file")
    check_table(table)
    check_models(wanted.text, wanted.aesthetic_model)
    data, digests = plan_scores(source, table, skip)
    check_bad_clips(data, settings.sources.on_bad_clip)
    if data.bad:
        tqdm.write(listing(f"{len(data.bad)} of the clips cannot be used and are skipped:", data.bad))
    num_workers = min(flags.num_workers or os.cpu_count(), len(data.clips))
    outcomes = list(zip(data.clips, score_clips(data.clips, wanted, skip, num_workers), strict=True))
    scored = [outcome for outcome in outcomes if not isinstance(outcome[1], str)]
    failures = [BadClip(str(one.clip.video), one.clip.source, why) for one, why in outcomes if isinstance(why, str)]
    if scored:
        samples, scores = zip(*scored, strict=True)
        rows = score_rows(samples, scores, table.parent, flags.duplicate_bits, digests)
        write_table(rows, table)
        page, command = table.with_suffix(".html"), keep_command(settings, table)
        write_score_page(rows, samples, page, command)
        print(f"wrote {table}: {len(rows)} clips; choose thresholds in {page}, then:\n{command}")
    if failures:
        title = f"{len(failures)} of {len(data.clips)} clips do not decode and got no scores:"
        if settings.sources.on_bad_clip == "error":
            raise UserError(listing(title, failures, most=len(failures)))
        tqdm.write(listing(title, failures))


def keep_command(settings: ScoringSettings, table: Path) -> str:
    """Return a command that prepares the clips of these flags that fulfil a condition."""
    words = ["python", path_of_script("prepare_dataset.py")]
    defaults = replace(SourceFlags(), caption_column="caption")
    for name in _REPEATED:
        value = getattr(settings.sources, name)
        if value != getattr(defaults, name):
            words += [f"--{name}", *([] if value is True else [str(value)])]
    words += ["--scores", str(table)] if settings.scores.output_file else []
    return f"{shlex.join(words)} --keep 'motion > 0.2 and duplicate == 0' ..."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the flags of `argv`, or of the command line if it is None."""
    with one_line_errors():
        settings = parse_score_args(argv)
        log_without_tokens(logging.WARNING)
        announce("reading the data")
        write_scores(settings)


if __name__ == "__main__":
    main()
