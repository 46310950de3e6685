"""The page that a preparation ends with: what is in the data, how the model sees it, and what was skipped and why."""

import logging
import platform
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from markupsafe import Markup
from PIL import Image

from cli.schema import flag_values
from common.bars import tqdm
from common.errors import UserError
from common.files import path_of_script
from common.remote import to_path
from data.buckets import Bucket
from data.clips import BadClip, ClipSample
from data.sampler import Draw
from flags.settings import PreparationSettings
from models.source import ModelSource
from pages.charts import bar_chart, histogram
from pages.page import Section, render_page, write_page
from pages.parts import code, details, facts, figure, grid, paragraph, table, warnings
from planning.describe import advise, tabulate
from planning.samples import RawData
from preparation.encode import clip_dataset
from video.contact_sheet import SheetRow
from video.probe import VideoInfo


logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"

_PACKAGES = ("torch", "diffusers", "transformers", "av")
_FRAME_SIDE = 240  # pixels at most, of a frame on the page
_LONGEST_CAPTION = 1000  # characters on the page
_MOST_COUNTED = 10_000  # captions whose tokens are counted, in a second
_MOST_SKIPPED = 500  # clips in the table, so that the page stays small
_MOST_REASONS = 12
_MOST_COLUMNS = 30
_OPEN_UP_TO = 20  # rows of a table that is not hidden at first


def write_report(
    settings: PreparationSettings,
    data: RawData,
    source: ModelSource,
    shown: Sequence[SheetRow] | None = None,
    *,
    complete: str,
) -> None:
    """Write the page into the output folder; a warning if that fails, because the data is complete without it.

    Args:
        data: the samples that are prepared, and all other clips with their reasons.
        shown: samples as the model sees them; None decodes some.
        complete: the file in the output folder that lists all skipped clips.
    """
    path = to_path(settings.preparation.output_dir) / REPORT_FILE
    try:
        rows = sheet_rows(settings, data.clips) if shown is None else shown
        write_page(path, render_report(settings, data, source, rows, complete=complete))
    except Exception as error:  # hours of encoding must not end in a traceback
        tqdm.write(f"warning: cannot write {path}: {error}", file=sys.stderr)
    else:
        tqdm.write(f"wrote {path}")  # not logged, because in a preparation only the first rank logs


def render_report(
    settings: PreparationSettings, data: RawData, source: ModelSource, shown: Sequence[SheetRow], *, complete: str
) -> str:
    """Return the page of `write_report`."""
    configs = source.configs()
    plan = tabulate(data, settings, source, configs, batch_size=settings.encoding.batch_size)
    advice = advise(data, settings, configs.transformer)
    folder = to_path(settings.preparation.output_dir)
    sections = [
        Section("Overview", [_overview(data), warnings(plan.notes), *_recommendation(advice)]),
        Section("Buckets", [table(plan.header, plan.rows, "Frames x height x width of the samples")]),
        Section("Clips", [grid(_clip_charts(data, source))]),
        Section("Scores and other columns", [grid(_column_charts(data.clips))]),
        Section("As the model sees them", [grid(map(_strip, shown))]),
        Section("Skipped clips", _skipped([*data.bad, *data.dropped], complete)),
        Section("Settings", _settings(settings)),
    ]
    does = "would be made" if settings.preparation.dry_run else "are prepared"
    lead = f"{len(data.clips):,} samples {does} for {settings.model.model_id}, in {settings.model.dtype}."
    return render_page(f"Data set: {folder.name}", sections, lead)


def _recommendation(advice: str | None) -> list[Markup]:
    reason, _, flags = (advice or "").partition(", add: ")
    return [paragraph(f"Recommended, {reason}:"), code(flags)] if advice else []


def _overview(data: RawData) -> Markup:
    used = _first_parts(data.clips)
    names = {(str(sample.clip.video), sample.clip.source) for sample in used}
    # A clip that is split may have samples that decode and others that do not.
    num_skipped = len({(clip.what, clip.source) for clip in (*data.bad, *data.dropped)} - names)
    seconds = sum(_seconds(sample.info) for sample in used)
    return facts(
        [
            ("clips listed", len(used) + num_skipped),
            ("clips used", len(used)),
            ("clips skipped", num_skipped),
            ("samples", len(data.clips)),
            ("total length", _duration(seconds)),
            ("distinct captions", len(set(data.captions))),
        ]
    )


def _clip_charts(data: RawData, source: ModelSource) -> list[Markup]:
    """Return histograms of all clips that can be read, also of those that the flags make unusable."""
    used = _first_parts(data.clips)
    infos = [sample.info for sample in used] + [clip.info for clip in data.bad if clip.info]
    videos = [info for info in infos if not info.is_image]
    captions = data.captions[:: len(data.clips) // _MOST_COUNTED + 1]
    lengths, unit = [len(caption.split()) for caption in captions], "words"
    with suppress(UserError):  # preparing only clips and captions needs no tokenizer
        lengths, unit = source.count_tokens(captions), "tokens"
    rates = [rate for sample in data.clips if (rate := sample.shown_fps) is not None]
    return [
        histogram(filter(None, map(_seconds, videos)), "Length", "seconds"),
        histogram([info.num_frames for info in videos], "Frames", "frames"),
        histogram([info.height for info in infos], "Height", "pixels"),
        histogram([info.width for info in infos], "Width", "pixels"),
        histogram([info.fps for info in videos if info.fps > 0], "Frame rate of the clips", "frames per second"),
        histogram(rates, "Frame rate of the samples", "frames per second", "samples"),
        histogram(lengths, "Length of the captions", unit, "samples"),
    ]


def _column_charts(clips: Sequence[ClipSample]) -> Iterable[Markup]:
    """Yield a histogram for each column of the list of clips that has only numbers, such as scores."""
    texts: dict[str, list[str]] = defaultdict(list)
    for sample in _first_parts(clips):
        for name, text in sample.clip.metadata.items():
            texts[name].append(text)
    for name, column in list(texts.items())[:_MOST_COLUMNS]:
        with suppress(ValueError):
            yield histogram([float(text) for text in column if text.strip()], name)


def _skipped(bad: Sequence[BadClip], complete: str) -> list[Markup]:
    if not bad:
        return []
    reasons = Counter(_kind_of(clip.reason) for clip in bad)
    counts = dict(reasons.most_common(_MOST_REASONS))
    others = reasons.total() - sum(counts.values())
    rows = [(clip.what, clip.reason, clip.source) for clip in bad]
    clips = table(("clip", "reason", "listed in"), rows, "Clips and reasons", most=_MOST_SKIPPED, complete=complete)
    return [
        bar_chart(counts | ({"other reasons": others} if others else {}), "Reasons"),
        clips if len(bad) <= _OPEN_UP_TO else details("The clips", [clips]),
    ]


def _kind_of(reason: str) -> str:
    """Return the part of a reason that many clips share: without numbers and what to do."""
    return re.sub(r"\d+(\.\d+)?", "N", re.split(r"[:;(]", reason)[0]).strip()


def _settings(settings: PreparationSettings) -> list[Markup]:
    versions = {"Python": platform.python_version()} | {package: version(package) for package in _PACKAGES}
    values = flag_values(settings)
    rows = [(f"--{name}", _as_text(value), "yes" if name in settings.given else "") for name, value in values.items()]
    return [
        code(" \\\n  ".join(shlex.join(words) for words in command_of(values, settings.given))),
        paragraph(", ".join(f"{package} {number}" for package, number in versions.items())),
        details("All flags", [table(("flag", "value", "passed"), rows, "Flags of the preparation")]),
    ]


def command_of(values: Mapping[str, Any], given: Iterable[str]) -> list[list[str]]:
    """Return the words of each line of a command with the flags that were given, in the shell or in a file."""
    lines = [["python", path_of_script("prepare_dataset.py")]]
    for name in (name for name in values if name in given):
        value = values[name]
        if isinstance(value, bool):
            lines.append([f"--{name}" if value else f"--no-{name}"])
        else:
            lines.append([f"--{name}", *(map(_as_text, value) if isinstance(value, tuple) else [_as_text(value)])])
    return lines


def _as_text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_as_text, value))
    return "" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)


def _first_parts(clips: Sequence[ClipSample]) -> list[ClipSample]:
    """Return one sample of each clip."""
    return list({id(sample.clip): sample for sample in reversed(clips)}.values())[::-1]


def _seconds(info: VideoInfo) -> float:
    """Return the length of a clip; 0 for a still image, or if its rate is unknown."""
    return info.num_frames / info.fps if info.fps > 0 else 0.0


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours:,} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _strip(row: SheetRow) -> Markup:
    frames = list(map(Image.fromarray, row.frames))
    for frame in frames:
        frame.thumbnail((_FRAME_SIDE, _FRAME_SIDE))
    is_long = len(row.caption) > _LONGEST_CAPTION
    caption = f"{row.caption[:_LONGEST_CAPTION]}…" if is_long else row.caption
    return figure(frames, caption, title=row.title, alt="a frame of the clip")


def sheet_rows(settings: PreparationSettings, clips: Sequence[ClipSample]) -> list[SheetRow]:
    """Return some samples as the model sees them; those that do not decode are named in a warning."""
    shown = sample_for_sheet(clips)
    dataset = clip_dataset(settings, shown)
    rows = []
    for index, planned in enumerate(shown):
        batch = dataset[Draw(index, 0)]
        for _, reason in batch.failed:
            logger.warning("warning: a clip does not decode: %s", reason)
        if not batch.failed:
            frames = batch.videos[0].permute(0, 2, 3, 1).numpy()
            places = dict.fromkeys((0, len(frames) // 2, len(frames) - 1))
            title = f"{planned.bucket} · {planned.clip.video.name}"
            title += f" · part {planned.part + 1}" if planned.part else ""
            rows.append(SheetRow([frames[place].copy() for place in places], title, planned.clip.caption))
            if batch.controls is not None:
                control = batch.controls[0].permute(0, 2, 3, 1).numpy()
                rows.append(SheetRow([control[place].copy() for place in places], "its control", ""))
            if batch.masks is not None:
                masks = batch.masks[0].float().numpy().repeat(8, axis=1).repeat(8, axis=2)[..., None]
                of_place = {place: masks[(place + 3 * (len(frames) % 4)) // 4] for place in places}  # 4k + 1: 1, 4, 4
                shown = [(frames[place] * mask).astype(frames.dtype) for place, mask in of_place.items()]
                rows.append(SheetRow(shown, "its loss counts where it is not black", ""))
    return rows


def sample_for_sheet(planned: Sequence[ClipSample], most: int = 16) -> list[ClipSample]:
    """Choose at most `most` samples for a sheet, spread over the plan: of every bucket, and more of larger buckets.

    If there are more buckets than places, the largest ones are shown. The choice is deterministic. The samples are
    sorted by bucket, then in the order of the plan.
    """
    samples: dict[Bucket, list[ClipSample]] = defaultdict(list)
    for sample in planned:
        samples[sample.bucket].append(sample)
    largest = sorted(samples, key=lambda bucket: (-len(samples[bucket]), bucket))[:most]
    places = dict.fromkeys(largest, 1)
    for _ in range(most - len(places)):
        more = [bucket for bucket in places if places[bucket] < len(samples[bucket])]
        if not more:
            break
        places[max(more, key=lambda bucket: len(samples[bucket]) / places[bucket])] += 1
    return [
        samples[bucket][(2 * place + 1) * len(samples[bucket]) // (2 * places[bucket])]
        for bucket in sorted(places)
        for place in range(places[bucket])
    ]
