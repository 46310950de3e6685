"""Caption clips with a vision-language model, into a table that training reads.

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --limit-mm-per-prompt '{"image": 8}'
    python training/caption_dataset.py --data_root my-clips --endpoint http://localhost:8000/v1

Then pass my-clips/captions.jsonl as --dataset_file, with the same --data_root. A run that was stopped or killed
continues when it is started again.
"""

import logging
import os
import re
import shlex
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from args import parse_caption_args
from captions.pool import Captioner, caption_clip, caption_clips
from captions.table import AUTHOR_COLUMN, USER, Caption, CaptionFile, CaptionSettings, clip_key
from captions.text import Questions
from common.bars import tqdm
from common.errors import UserError, listing, one_line_errors
from common.hub_token import HubToken
from common.logs import log_without_tokens
from common.remote import default_cache_folder
from common.startup import announce
from data.buckets import Bucket
from data.clips import BadClip, Clip, ClipSample, plan_clips
from data.paths import listed_path
from data.sources import DataSource, read_clips
from flags.captions import CAPTIONS_FILE
from flags.settings import CaptioningSettings
from planning.keep import keep_clips
from planning.plan import check_bad_clips, data_sources
from planning.samples import RawData
from video.cache import FileCache
from video.probe import probe_files


def plan_captions(source: DataSource, captions_file: Path, num_frames: int, skip_start: int, skip_end: int) -> RawData:
    """List and probe the clips, and choose the frames that the model sees; an unreadable list is a UserError."""
    cache = default_cache_folder()
    clips, bad = read_clips(source, cache / "media", captions_file=captions_file)
    infos = probe_files([clip.video for clip in clips], FileCache(cache))
    kept, dropped, unscored = keep_clips(clips, infos, source)
    buckets = [Bucket(count, 16, 16) for count in range(1, num_frames + 1)]  # any number of frames; none is resized
    planned, unusable = plan_clips(
        kept, infos, buckets, skip_start=skip_start, skip_end=skip_end, hold_last_frame=True
    )
    return RawData(planned, [*bad, *unscored, *unusable], dropped)


def make_captioner(settings: CaptioningSettings, stopped: threading.Event) -> Captioner:
    """Connect to or load the model of the flags; raises UserError if it cannot be reached or loaded."""
    answers = {"temperature": settings.captions.temperature, "max_tokens": settings.captions.max_tokens}
    if settings.model.endpoint is None:
        announce(f"loading PyTorch, transformers and {settings.model.model}")
        from captions.model import ModelCaptioner

        return ModelCaptioner(settings.model.model, **answers)
    from captions.endpoint import EndpointCaptioner

    key = os.environ.get(settings.model.api_key_variable, "").strip()
    if not re.fullmatch("[!-~]*", key):  # a space or line break, mostly of two keys in one variable
        raise UserError(
            f"the key in the environment variable {settings.model.api_key_variable} has characters that no key has"
        )
    return EndpointCaptioner(
        settings.model.endpoint,
        settings.model.model,
        HubToken(key) if key else None,  # hidden from messages
        **answers,
        timeout=settings.model.timeout,
        max_retries=settings.model.max_retries,
        stopped=stopped,
    )


def caption_row(clip: Clip, caption: Caption, folder: Path | None) -> dict[str, str]:
    """Return the table row of a clip: path, caption, author of the caption, and the clip's other columns."""
    row = {"video": listed_path(clip.video, folder), "caption": caption.text, AUTHOR_COLUMN: caption.author}
    if clip.image is not None:
        row["image"] = listed_path(clip.image, folder)
    return row | {name: value for name, value in clip.metadata.items() if name not in row}


def ask_for_captions(
    settings: CaptioningSettings, table: CaptionFile, clips: Mapping[str, ClipSample]
) -> tuple[dict[str, Caption], list[BadClip]]:
    """Caption clips, except those that a stopped run has captioned with the same settings.

    Takes the clips by their keys in the table, and returns the captions by key, and the clips that got none. A model
    that cannot be reached or loaded, or stops answering, is a UserError.
    """
    table.check_writable()
    stopped = threading.Event()
    captioner = make_captioner(settings, stopped)
    prompt, template = settings.captions.prompt, settings.captions.template
    questions = Questions(prompt, prompt) if prompt else Questions.built_in(template)
    used = CaptionSettings(
        captioner.model,
        prompt if template == "everything" else questions.video,
        settings.frames.num_frames,
        (settings.sources.skip_frames_start, settings.sources.skip_frames_end),
        settings.frames.max_size,
        settings.captions.temperature,
        settings.captions.max_tokens,
    )

    def caption(path: str, planned: ClipSample) -> None:
        text = caption_clip(planned, captioner, questions, settings.frames.max_size)
        table.append(path, Caption(text, captioner.model), used)

    done = table.unfinished(used)
    remaining = {path: planned for path, planned in clips.items() if path not in done}
    failures = caption_clips(
        remaining, caption, 1 if settings.model.endpoint is None else settings.model.num_workers, stopped
    )
    return {path: made for path, made in table.unfinished(used).items() if path in clips}, failures


def caption_dataset(settings: CaptioningSettings) -> None:
    """Write the table of captions; raises UserError if clips cannot be used or got no caption."""
    (source,) = data_sources(settings.sources)
    folder = source.folder
    table = CaptionFile(
        Path(settings.captions.output_file) if settings.captions.output_file else folder / CAPTIONS_FILE
    )
    data = plan_captions(
        source,
        table.path,
        settings.frames.num_frames,
        settings.sources.skip_frames_start,
        settings.sources.skip_frames_end,
    )
    check_bad_clips(data, settings.sources.on_bad_clip)
    if data.bad:
        tqdm.write(listing(f"{len(data.bad)} of the clips cannot be used and are skipped:", data.bad))

    if data.dropped:
        tqdm.write(listing(f"{len(data.dropped)} of the clips are dropped by --keep:", data.dropped))
    earlier = table.captions()
    listed = [(clip_key(caption_row(planned.clip, Caption("", USER), folder)), planned) for planned in data.clips]
    kept = [own_caption(planned.clip) or earlier.get(path) for path, planned in listed]
    wanted = dict(
        item for item, caption in zip(listed, kept, strict=True) if settings.captions.overwrite or caption is None
    )
    made, failures = ask_for_captions(settings, table, wanted) if wanted else ({}, [])

    captions = [made.get(path, caption) for (path, _), caption in zip(listed, kept, strict=True)]
    rows = [
        caption_row(planned.clip, caption, folder)
        for (_, planned), caption in zip(listed, captions, strict=True)
        if caption is not None
    ]
    # With --overwrite, the table does not show which captions are already replaced.
    table.write(rows, folder, finished=not (settings.captions.overwrite and failures))
    if rows:
        flags = table_flags(table.path, folder, allow_outside_paths=settings.sources.allow_outside_paths)
        print(f"wrote {table.path}: {len(rows)} captions, {len(made)} of them new; read and correct them there, then")
        print(f"prepare or train with: {flags}")
    if failures:
        title = f"{len(failures)} of {len(listed)} clips got no caption; run again to caption only these:"
        raise UserError(listing(title, failures, most=len(failures)))


def own_caption(clip: Clip) -> Caption | None:
    """Return the caption that a clip already has."""
    return Caption(clip.caption, clip.metadata.get(AUTHOR_COLUMN, USER)) if clip.caption else None


def table_flags(table: Path, folder: Path | None, *, allow_outside_paths: bool) -> str:
    """Return the flags with which a script reads the table."""
    flags = ["--dataset_file", str(table), "--caption_column", "caption"]
    flags += [] if folder is None else ["--data_root", str(folder)]
    return shlex.join(flags + ["--allow_outside_paths"] * allow_outside_paths)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the flags of `argv`, or of the command line if it is None."""
    with one_line_errors():
        settings = parse_caption_args(argv)
        log_without_tokens(logging.WARNING)
        announce("reading the data")
        caption_dataset(settings)


if __name__ == "__main__":
    main()
