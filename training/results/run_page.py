"""The page of a run, and that of several runs, made only from the files in their folders."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from markupsafe import Markup

from common.errors import one_line
from common.files import path_of_script
from common.run_folder import CONFIG_FILE, NOTES_FILE, REPORT_FILE, STRENGTHS_FOLDER, VALIDATION_FOLDER
from common.units import in_words
from pages.charts import Curve, line_chart
from pages.page import Section, render_page, write_page
from pages.parts import (
    code,
    details,
    facts,
    grid,
    paragraph,
    progress,
    table,
    verdict,
    warnings,
)
from results.run_record import FAILED, FINISHED, RUNNING, STOPPED, RunRecord, has_lora, read_run
from results.run_videos import ShownVideo, beside_video, describe_video, video_rows
from tracking.verdict import Points, smoothed


_MOST_COLUMNS = 6  # validations of a prompt
_MOST_WARNINGS = 5  # at the top; the others are in a list
_RECENT = 3  # validations: a best one before them is not a chance
_WINDOWS = 20  # of the running mean
_KILLED = "killed"  # a state that no run can note
STEPS = "optimizer steps"
_VERDICTS = {
    "learning": ("good", "It learned."),
    "unchanged": ("unsure", "It has hardly learned yet."),
    "overfitting": ("bad", "It {learned}overfitted."),
    "diverging": ("bad", "It did not learn: the training diverged."),
    "worse": ("bad", "It {learned}got worse."),
}


def write_run_page(folder: Path) -> Path:
    """Write the page of a run into its folder; a UserError if that is not the folder of a run."""
    file = folder / REPORT_FILE
    write_page(file, render_run(read_run(folder), file.parent))
    return file


def render_run(record: RunRecord, page_folder: Path) -> str:
    """Return the page of a run.

    Args:
        page_folder: where the page will be, for its links.
    """
    summary = record.facts.get("summary", {})
    what = [summary.get("training"), summary.get("model") or record.flags.get("pretrained_model_name_or_path")]
    lead = "\n".join(one_line(text) for text in [*filter(None, what), summary.get("data")] if text)
    sections = [
        Section("Result", _result(record)),
        Section("Loss", _losses(record)),
        Section("Videos", _videos(record, page_folder)),
        Section("Speed and memory", [grid(_speeds(record), is_wide=True)]),
        Section("Warnings and skipped steps", _notes(record)),
        Section("Commands", list(_commands(record))),
        Section("Settings", _settings(record)),
    ]
    return render_page(f"Run: {record.folder.resolve().name}", sections, lead)


def describe_verdict(record: RunRecord) -> tuple[str, str, str]:
    """Return how good a run is ("good", "bad", "unsure"), that in a sentence, and the reason."""
    losses, skipped = [value for _, value in record.curve("loss")], len(record.skipped)
    if record.state["state"] == FAILED and skipped:
        return "bad", "It did not learn: the training diverged.", f"It ended after {skipped} skipped steps."
    if record.verdict is not None:
        kind, title = _VERDICTS[record.verdict.kind]
        sentence, points = record.verdict.sentence, record.curve("validation_loss")
        best, (first, _) = record.best[0] if record.best else 0, points[0]
        if record.verdict.kind == "learning" and best < points[-_RECENT:][0][0]:
            kind, title = "unsure", f"It learned up to step {best:,}, and no more since."
        title = title.format(learned=f"learned up to step {best:,}, then " if best > first else "")
        return kind, title, f"{sentence[:1].upper()}{sentence[1:]}."
    count = min(50, len(losses) // 2)
    if count < 10:
        return "unsure", "It is too early to say.", "There are too few losses yet."
    first, last = fmean(losses[:count]), fmean(losses[-count:])
    told = f"The training loss went from {first:.4f} (first {count} steps) to {last:.4f} (last {count})"
    return "unsure", "Whether it learned is unknown.", f"{told}; without held-out clips, nothing shows overfitting."


def _result(record: RunRecord) -> list[Markup]:
    state = _KILLED if record.was_killed else record.state["state"]
    (best_step, best), news = record.best or (None, None), f"{record.updated:%Y-%m-%d %H:%M}"
    total, shown = record.total_steps or record.step, f"{record.step:,} of {record.total_steps or record.step:,} steps"
    left = record.seconds_left
    how = {
        RUNNING: f"{shown} at {news}" + (f", about {in_words(left)} left without validations" if left else ""),
        _KILLED: f"{shown}; no news since {news}: it was probably killed; the command below continues it",
        FINISHED: f"finished: {shown}",
        STOPPED: f"stopped after {shown}; it can be continued",
        FAILED: f"failed after {shown}",
    }.get(state, f"{shown}; how it ended was not recorded")
    latest = [value for _, value in record.curve("validation_loss")][-1:]
    pairs = [
        ("best step", best_step),
        ("its validation loss", best),
        ("validation loss now", latest[0] if latest else None),
        ("training so far" if state == RUNNING else "time", in_words(record.seconds) if record.seconds else None),
        ("skipped steps", len(record.skipped)),
        ("warnings", len(record.warnings)),
        ("last logged", news),
    ]
    first = [note["warning"] for note in record.warnings[:_MOST_WARNINGS]]
    more = len(record.warnings) - len(first)
    first += [f"{more} more warnings are listed below"] if more > 0 else []
    return [
        verdict(*describe_verdict(record)),
        progress(min(record.step / total, 1) if total else 0, how),
        warnings([f"The run failed: {record.state['why']}"] if record.state.get("why") else []),
        facts((name, value) for name, value in pairs if value is not None),
        warnings(first),
    ]


def loss_curves(record: RunRecord, names: tuple[str, str], colours: tuple[int, int]) -> list[Curve]:
    """Return the validation loss and, thinner where there is one, the running mean of the training loss.

    Args:
        names: of the curves.
        colours: of the curves.
    """
    validation = record.curve("validation_loss")
    mean = Curve(names[1], running_mean(record.curve("loss")), is_thin=bool(validation), colour=colours[1])
    return [Curve(names[0], validation, has_dots=True, colour=colours[0]), mean]


def running_mean(losses: Points) -> Points:
    """Return the running mean of losses, over a twentieth of the run."""
    if not losses:
        return []
    return [(step, mean) for (step, _), mean in zip(losses, smoothed(losses, _WINDOWS)[1].tolist(), strict=True)]


def _losses(record: RunRecord) -> list[Markup]:
    names = ("validation loss, held-out clips", "training loss, running mean")
    kept = Curve("regularization loss", running_mean(record.curve("regularization_loss")), is_thin=True, colour=2)
    charts = [line_chart([*loss_curves(record, names, (0, 1)), kept], "Loss", STEPS, "loss")]
    bands = [(name.rsplit("=", 1)[1], record.curve(name)) for name in record.names("validation_loss/t=")]
    chosen = [bands[round(place * (len(bands) - 1) / 2)] for place in range(3)] if len(bands) > 2 else bands
    of_bands = [Curve(f"timestep {name}", points, has_dots=True) for name, points in chosen]
    note = "a low timestep has little noise: details; a high one has much: layout and motion"
    charts += [line_chart(of_bands, "Validation loss by timestep", STEPS, "loss", note)]
    rates = record.curve("lr")
    if len({rate for _, rate in rates}) > 1:
        charts += [line_chart([Curve("", rates, colour=2)], "Learning rate", STEPS)]
    norms = line_chart([Curve("", record.curve("grad_norm"), colour=3)], "Gradients", STEPS, "norm")
    return [grid([*charts, norms], is_wide=True)]


def _speeds(record: RunRecord) -> Iterator[Markup]:
    for name, title, unit in (
        ("throughput/samples_per_second", "Throughput", "samples a second"),
        ("throughput/step_seconds", "Time of a step", "seconds"),
    ):
        yield line_chart([Curve("", record.curve(name), colour=1)], title, STEPS, unit)
    parts = [(name, name.split("/")[1].removesuffix("_seconds")) for name in record.names("throughput/")]
    shown = [Curve(short, record.curve(name)) for name, short in parts if short in _PHASES]
    yield line_chart(shown, "Parts of a step", STEPS, "seconds")
    peaks = record.names("memory/")
    curves = [Curve(name.split("peak_")[-1].removesuffix("_gb"), record.curve(name)) for name in peaks]
    yield line_chart(curves, "Peak memory so far", STEPS, "GB")


_PHASES = ("data", "forward", "backward", "optimizer")


def choose_steps(steps: Sequence[int], best: int | None) -> list[int]:
    """Choose a few steps, evenly spread, with the first, the last and the best one."""
    count = min(_MOST_COLUMNS, len(steps))
    chosen = {steps[round(place * (len(steps) - 1) / max(count - 1, 1))] for place in range(count)}
    return sorted(chosen | ({best} & set(steps)))


def _videos(record: RunRecord, page_folder: Path) -> list[Markup]:
    best, rows = record.best[0] if record.best else None, {}
    for name, files in record.videos.items():
        rows[describe_video(record, name)[0]] = beside_video(record, name) + [
            ShownVideo(
                f"step {step:,}" if step else "before training", files[step], "best validation loss" * (step == best)
            )
            for step in choose_steps(list(files), best)
        ]
    if rows and record.strengths:
        title = f"{next(iter(rows))}, at several strengths of the LoRA"
        base = [ShownVideo("base model", files[0]) for files in list(record.videos.values())[:1] if 0 in files]
        rows[title] = base + [
            ShownVideo(f"strength {strength:g}", file) for strength, file in record.strengths.items()
        ]
    note = "The same noise at each step; the training clip is the one whose caption is nearest to the prompt."
    return [paragraph(note), *video_rows(rows, page_folder)] if rows else []


def _notes(record: RunRecord) -> list[Markup]:
    skipped = [(note["skipped"], note.get("what", ""), note.get("clips", "")) for note in record.skipped]
    told = [(note.get("step", 0), note["time"][:19].replace("T", " "), note["warning"]) for note in record.warnings]
    title = "Steps that changed nothing, as the value was not finite, and what they would have trained on"
    return [
        table(("step", "not finite", "clips"), skipped, title, complete=NOTES_FILE) if skipped else Markup(),
        table(("after step", "time", "warning"), told, "Warnings", complete=NOTES_FILE) if told else Markup(),
    ]


def _commands(record: RunRecord) -> Iterator[Markup]:
    if start := record.facts.get("start"):
        yield paragraph("Resume it, or with a higher --max_train_steps train it longer:")
        flags = ["--config", record.folder / CONFIG_FILE, "--output_dir", record.folder]
        yield code(shlex.join([*start, *map(str, flags), "--resume_from_checkpoint", "latest"]))
    best = record.best[0] if record.best else record.step
    again = shlex.join(["python", path_of_script("compare_runs.py"), str(record.folder)])
    if (sample := record.facts.get("sample")) and record.results:
        yield paragraph("Sample with the result, as in validation, and compare it with the base model:")
        yield code(_command(record, [*sample, "--compare"]))
        if "--lora" in sample:
            file = f"{shlex.quote(str(record.folder / STRENGTHS_FOLDER))}/$strength.mp4"
            yield paragraph("Sample it at several strengths, and show them on this page:")
            yield code(
                f"for strength in 0.5 1 1.5; do\n  {_command(record, sample)} --lora_scale $strength \\\n"
                f"    --output_file {file} --overwrite\ndone\n{again}"
            )
        if best != record.step and has_lora(record, best):
            yield paragraph(f"Sample with the weights of step {best:,}, whose validation loss is the lowest:")
            yield code(_command(record, sample, record.folder / VALIDATION_FOLDER / f"step-{best}"))
    if (publish := record.facts.get("publish")) and record.results:
        yield paragraph("Publish it, without checkpoints and without what names folders of this machine:")
        yield code(_command(record, publish))
    yield paragraph("Make this page again from the files in the folder:")
    yield code(again)


def _command(record: RunRecord, words: Sequence[str], folder: Path | None = None) -> str:
    """Return a command of the run with the present name of its folder, or that of another one."""
    written = record.facts.get("output_dir")
    return shlex.join(str(folder or record.folder) if word == written else word for word in words)


def _settings(record: RunRecord) -> list[Markup]:
    summary = [(name, text) for name, text in record.facts.get("summary", {}).items()]
    versions = {"this toolkit": record.facts.get("revision")} | record.facts.get("versions", {})
    given, flags = set(record.facts.get("given", record.flags)), record.flags
    rows = [(f"--{name}", as_text(value), "yes" if name in given else "") for name, value in flags.items()]
    passed = [row for row in rows if row[2]]
    parts = [table(("", ""), summary, "What is trained on what")] if summary else []
    parts += [paragraph(", ".join(f"{name} {number}" for name, number in versions.items() if number))]
    parts += [table(("flag", "value"), [row[:2] for row in passed], "Flags that were passed")] if passed else []
    return [*parts, details("All flags", [table(("flag", "value", "passed"), rows, "Flags")])] if rows else parts


def as_text(value: object) -> str:
    """Return the value of a flag as it is shown."""
    if isinstance(value, list | tuple):
        return " ".join(map(as_text, value))
    return "-" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)
