"""The page of several runs: their curves over each other, the settings that differ, their last videos side by side."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup

from common.run_folder import REPORT_FILE
from common.units import in_words
from pages.charts import Curve, line_chart
from pages.page import Section, render_page
from pages.parts import grid, paragraph, table, verdict, warnings
from results.run_page import STEPS, as_text, describe_verdict, loss_curves
from results.run_record import RunRecord
from results.run_videos import ShownVideo, beside_video, describe_video, link_to, video_rows


_OWN = {"output_dir", "resume_from_checkpoint", "logging_dir", "tracker_name", "report_to"}  # of each run
_OWN |= {"push_to_hub", "hub_model_id", "config"}
_REVISION = "revision of this toolkit"
_MOST_IN_NAME = 3  # settings


def render_comparison(records: Sequence[RunRecord], page_folder: Path) -> str:
    """Return the page of several runs; the links on it start at `page_folder`."""
    differing = differing_settings(records)
    names = name_runs(records, differing)
    sections = [
        Section("Result", _result(records, names, page_folder)),
        Section("Settings that differ", [_settings(differing, names)]),
        Section("Loss", [grid(_charts(records, names), is_wide=True)]),
        Section("Last videos", _videos(records, names, page_folder)),
    ]
    folder = Path(os.path.commonpath([record.folder.resolve() for record in records]))
    return render_page(f"{len(records)} runs: {folder.name}", sections)


def differing_settings(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the flags whose values differ, each with the value of every run; None for one that a run lacks."""
    flags = dict.fromkeys(name for record in records for name in record.flags if name not in _OWN)
    values = {name: [record.flags.get(name) for record in records] for name in flags}
    values[_REVISION] = [record.facts.get("revision") for record in records]
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def name_runs(records: Sequence[RunRecord], differing: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return a short name for each run: its settings that differ if they are few and tell it from the others, or else
    its folder."""
    shown = {name: row for name, row in differing.items() if name != _REVISION}
    columns = [[f"{name} {as_text(value)}" for value in row] for name, row in shown.items()]
    names = [", ".join(words) for words in zip(*columns, strict=True)]
    if 0 < len(shown) <= _MOST_IN_NAME and len(set(names)) == len(names):
        return names
    return [record.folder.resolve().name for record in records]


def _result(records: Sequence[RunRecord], names: Sequence[str], page_folder: Path) -> list[Markup]:
    rows, ranked = [], []
    for record, name in zip(records, names, strict=True):
        best_step, best = record.best or (None, None)
        ranked += [] if best is None else [(best, best_step, name, record)]
        latest = [value for _, value in record.curve("validation_loss")][-1:]
        speeds = [value for _, value in record.curve("throughput/samples_per_second")][-1:]
        seconds = in_words(record.seconds) if record.seconds else None
        page = record.folder / REPORT_FILE
        linked = Markup('<a href="{}">{}</a>').format(link_to(page, page_folder), name) if page.is_file() else name
        row = [linked, describe_verdict(record)[1], best_step, best, *(latest or [None]), record.step, seconds]
        rows.append([*row, *(speeds or [None]), len(record.skipped)])
    header = ("run", "what it shows", "best step", "its validation loss", "last validation loss", "steps", "time")
    parts = [table([*header, "samples/s", "skipped steps"], rows, "Runs")]
    differing = _differently_measured([record for *_, record in ranked])
    if len(ranked) > 1 and not differing:
        best, step, name, record = min(ranked, key=lambda one: one[0])
        kind, title, _ = describe_verdict(record)
        parts.insert(0, verdict(kind, f"Lowest validation loss: {name}", f"{best:.4f} at step {step:,}. {title}"))
    elif len(ranked) > 1:
        parts.insert(0, warnings([f"The runs' validation losses are not comparable: what they measure {differing}."]))
    return parts


def _differently_measured(records: Sequence[RunRecord]) -> str:
    """Return why the validation losses of runs are not comparable; "" if they are."""
    measured = [record.facts.get("measured") for record in records]
    if not all(measured):
        return "was not recorded for all runs, as in earlier versions"
    names = dict.fromkeys(name for one in measured for name in one)
    differing = [name for name in names if any(one.get(name) != measured[0].get(name) for one in measured)]
    return f"differs in {', '.join(differing)}" if differing else ""


def _settings(differing: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Markup:
    rows = [(name, *map(as_text, row)) for name, row in differing.items()]
    return table(("setting", *names), rows, "All other settings are equal") if rows else paragraph("None.")


def _charts(records: Sequence[RunRecord], names: Sequence[str]) -> list[Markup]:
    validation, training, speeds = [], [], []
    for colour, (record, name) in enumerate(zip(records, names, strict=True)):
        one, mean = loss_curves(record, (name, name), (colour, colour))
        validation.append(one)
        training.append(replace(mean, is_thin=False))
        speeds.append(Curve(name, record.curve("throughput/samples_per_second"), colour=colour))
    return [
        line_chart(validation, "Validation loss", STEPS, "loss", most=_usual(validation)),
        line_chart(training, "Training loss, running mean", STEPS, "loss", most=_usual(training)),
        line_chart(speeds, "Throughput", STEPS, "samples a second"),
    ]


def _usual(curves: Sequence[Curve]) -> float:
    """Return twice the median of the highest losses: a run that diverged must not flatten the others' curves."""
    return 2 * median([max(loss for _, loss in curve.points) for curve in curves if curve.points] or [math.inf])


def _videos(records: Sequence[RunRecord], names: Sequence[str], page_folder: Path) -> list[Markup]:
    rows: dict[str, list[ShownVideo]] = {}
    for record, name in zip(records, names, strict=True):
        for video, files in record.videos.items():
            prompt, step = describe_video(record, video)[0], max(files)
            row = rows.setdefault(prompt, beside_video(record, video))
            row.append(ShownVideo(f"{name}, step {step:,}", files[step]))
    return video_rows(rows, page_folder)
