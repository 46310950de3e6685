"""Turn the benchmarks' JSON into the tables and charts of assets/docs/memory.md.

    make tables

Needs no torch, and matplotlib only for the charts. Rows that were not measured on a GPU say so; calculated figures
have a separate column and chart.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memory_rows import FACTORY, ROWS, Row


GB = 2**30
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "assets" / "docs" / "memory.md"
CALCULATED_CHART, MEASURED_CHART = "memory_calculated.png", "memory_measured.png"
NOT_MEASURED = "not measured"
BEGIN, END = "<!-- {}: written by `make tables` -->", "<!-- end of {} -->"
VERSIONS = ("torch", "diffusers")
BYTES = ("allocated", "reserved", "inactive", "host")  # last words of the figures of a step that are bytes
PARTS = {"weights": "#4c72b0", "optimizer states": "#dd8452", "gradients": "#c44e52", "activations": "#55a868"}


def main() -> None:
    """Write page and charts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no_charts", action="store_true", help="write only the tables")
    args = parser.parse_args()
    measured, calculated = read_rows("memory.json"), read_rows("memory_calculated.json")
    speed, block = read_rows("speed_gpu.json"), read_rows("block_gpu.json")
    page = fill_page(PAGE.read_text(encoding="utf-8"), measured, calculated, speed, block)
    PAGE.write_text(page, encoding="utf-8")
    if not args.no_charts:
        draw_charts(PAGE.parent, measured, calculated)


def read_rows(name: str) -> dict[str, Any]:
    """Return the rows of a JSON file; none if it does not exist."""
    file = ROOT / "benchmarks" / name
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}


def fill_page(page: str, measured: Mapping, calculated: Mapping, speed: Mapping, block: Mapping) -> str:
    """Return the page with its tables replaced; speed and block are the rows of gpu_speed.py and gpu_block.py.

    Raises:
        ValueError: the page lacks the marks of a table.
    """
    tables = {
        "published rows": memory_table([row for row in ROWS if row.published], measured, calculated),
        "further rows": memory_table([row for row in ROWS if not row.published], measured, calculated),
        "parts": parts_table(ROWS, calculated),
        "machine": machine_line(measured),
        "speed": speed_table(speed),
        "block": speed_table(block),
    }
    for name, table in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"{PAGE} lacks the lines '{begin}' and '{end}'")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


def memory_table(rows: Iterable[Row], measured: Mapping, calculated: Mapping) -> str:
    """Return a table of GB in training and, after the slash, in training with validation."""
    with_published = any(row.published for row in rows)
    published = ["published, GB"] if with_published else []
    header = ["run", *published, "measured, GB", "s/step", "calculated, GB", "host, GB"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        result = measured.get(row.name, {})
        lines.append(
            [
                row.name,
                *([published_cell(row)] if with_published else []),
                measured_cell(result),
                f"{result['measured']['seconds a step']:.2f}" if "measured" in result else "",
                peaks_cell(calculated[row.name]["training"], calculated[row.name]["validation"]),
                f"{calculated[row.name]['host'] / GB:.0f}" if calculated[row.name]["host"] else "",
            ]
        )
    return markdown(lines)


def published_cell(row: Row) -> str:
    """Return the figures that others published."""
    return "; ".join(
        f"{published if isinstance(published, str) else f'{published:.1f}'}"
        + (f" / {sampled:.1f}" if sampled else "")
        + f" ({who})"
        for who, (published, sampled) in row.published.items()
    )


def measured_cell(result: Mapping[str, Any]) -> str:
    """Return the peaks that torch reserved, or why they are missing."""
    failed = f": {result['failed'].replace('|', '/')}" if "failed" in result else ""
    if "training reserved" not in result.get("measured", {}):
        return NOT_MEASURED + failed
    measured = result["measured"]
    return peaks_cell(measured["training reserved"], measured.get("validation reserved", 0)) + failed


def peaks_cell(training: int, validation: int) -> str:
    """Return the GB of training, and of training and validation together."""
    both = f" / {max(training, validation) / GB:.1f}" if validation else ""
    return f"{training / GB:.1f}{both}"


def parts_table(rows: Iterable[Row], calculated: Mapping) -> str:
    """Return a table of the parts of a training step's calculated peak."""
    lines = [["run", *(f"{name}, GB" for name in PARTS), "peak, GB"], ["---"] * (len(PARTS) + 2)]
    for row in rows:
        parts = peak_parts(calculated[row.name])
        lines.append([row.name, *(f"{size / GB:.1f}" for size in parts.values()), f"{sum(parts.values()) / GB:.1f}"])
    return markdown(lines)


def peak_parts(account: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of the parts of a training step's peak."""
    weights = account["frozen_weights"] + account["trained_weights"] + account["averaged_weights"]
    start = account["kept_inputs"] + account["kept_activations"]
    earlier = account["earlier_gradients"] if account["last_input"] + account["earlier_gradients"] > start else 0
    gradients = earlier + account["largest_gradient"]
    rest = account["training"] - weights - account["optimizer_states"] - gradients
    return dict(zip(PARTS, (weights, account["optimizer_states"], gradients, rest), strict=True))


def machine_line(measured: Mapping[str, Any]) -> str:
    """Return where and when rows were measured."""
    where = sorted(
        {
            ", ".join([row["device"], row["date"], *(f"{name} {row['versions'][name]}" for name in VERSIONS)])
            for row in measured.values()
            if "measured" in row
        }
    )
    if not where:
        return "Nothing has been measured on a GPU yet."
    return f"Measured on {'; '.join(where)}.\n\n![What was measured]({MEASURED_CHART})"


def speed_table(results: Mapping[str, Any]) -> str:
    """Return a table of figures measured on a GPU at full size, and below it the rows that failed."""
    rows = {name: speed_figures(row["measured"]) for name, row in results.items() if "measured" in row}
    if not rows:
        return "Not measured on a GPU yet."
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [["run", *columns], ["---"] * (len(columns) + 1)]
    for name, row in rows.items():
        lines.append([name, *(row.get(key, "") for key in columns)])
    failed = [f"- {name}: {row['failed']}" for name, row in results.items() if "measured" not in row]
    return "\n".join([markdown(lines), *(["", *failed] if failed else [])])


def speed_figures(measured: Mapping[str, float]) -> dict[str, str]:
    """Format the figures of a row."""
    shown = {key: f"{value:.3g}" for key, value in measured.items() if key.split()[-1] not in BYTES}
    reserved = measured.get("training reserved")
    return shown | ({"reserved, GB": f"{reserved / GB:.1f}"} if reserved else {})


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Format a table whose first line is the header."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_charts(folder: Path, measured: Mapping, calculated: Mapping) -> list[Path]:
    """Write the charts of calculated and, if there are any, of measured figures; return their paths."""
    charts = [draw_calculated(folder / CALCULATED_CHART, calculated)]
    rows = {name: row["measured"] for name, row in measured.items() if "training reserved" in row.get("measured", {})}
    if rows:
        device = next(row["device"] for row in measured.values() if "measured" in row)
        charts.append(draw_measured(folder / MEASURED_CHART, rows, device))
    return charts


def draw_calculated(path: Path, calculated: Mapping[str, Any]) -> Path:
    """Draw stacked bars of a training step's parts, with marks for validation and published figures."""
    largest = {name: max(row["training"], row["validation"]) / GB for name, row in calculated.items()}
    rows = in_groups(largest)
    figure, axes = new_chart(len(rows))
    left = [0.0] * len(rows)
    for part, colour in PARTS.items():
        sizes = [peak_parts(calculated[row.name])[part] / GB for row in rows]
        axes.barh(range(len(rows)), sizes, left=left, color=colour, label=part, height=0.66)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    peaks = [largest[row.name] for row in rows]
    axes.scatter(peaks, range(len(rows)), marker="|", s=130, color="black", label="with validation", zorder=3)
    label(axes, peaks)
    draw_published(axes, rows)
    return finish(figure, axes, path, rows, "Memory at 49x480x720: calculated, not measured")


def draw_measured(path: Path, measured: Mapping[str, Any], device: str) -> Path:
    """Draw bars of the memory that torch reserved in training and with validation."""
    largest = {
        name: max(row["training reserved"], row.get("validation reserved", 0)) / GB for name, row in measured.items()
    }
    rows = in_groups(largest)
    figure, axes = new_chart(len(rows))
    peaks = [largest[row.name] for row in rows]
    training = [measured[row.name]["training reserved"] / GB for row in rows]
    axes.barh(range(len(rows)), peaks, color="#c9d3e6", height=0.66, label="with validation")
    axes.barh(range(len(rows)), training, color="#4c72b0", height=0.66, label="training")
    label(axes, peaks)
    draw_published(axes, rows)
    return finish(figure, axes, path, rows, f"Memory at 49x480x720: reserved on an {device}")


def in_groups(peaks: Mapping[str, float]) -> list[Row]:
    """Return the rows with a peak, bottom first: full fine-tuning, then LoRA, the largest model and peak first."""
    rows = [row for row in ROWS if row.name in peaks]
    return sorted(rows, key=lambda row: (row.method == "lora", row.model == "2b", -peaks[row.name]))


def label(axes: Any, peaks: Sequence[float]) -> None:
    """Write each peak in a column to the right of the bars."""
    for number, peak in enumerate(peaks):
        axes.annotate(
            f"{peak:.1f}", (1, number), (4, -3), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=9,
        )  # fmt: skip


def new_chart(num_rows: int) -> tuple[Any, Any]:
    """Return an empty figure and its axes with room for so many bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.31 * num_rows), layout="constrained")
    return figure, figure.subplots()


def draw_published(axes: Any, rows: Sequence[Row]) -> None:
    """Mark the published memory of the original factory, training and validation together."""
    points = [
        (max(size for size in row.published[FACTORY] if isinstance(size, float)), number)
        for number, row in enumerate(rows)
        if isinstance(row.published.get(FACTORY, ("",))[0], float)
    ]
    if points:
        x, y = zip(*points, strict=True)
        axes.scatter(
            x, y, marker="D", s=34, color="none", edgecolors="#8c1d40", linewidths=1.5, zorder=4,
            label="published by the original factory, with validation",
        )  # fmt: skip


def finish(figure: Any, axes: Any, path: Path, rows: Sequence[Row], title: str) -> Path:
    """Label a chart and write it."""
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9)
    axes.set_xlabel("GB of GPU memory (GB = 2^30 bytes)")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    for card in (8, 12, 16, 24, 48, 80):
        axes.axvline(card, color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(f"{card}", (card, 1), (2, -10), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=7, color="#888888")  # fmt: skip
    axes.set_xlim(0)
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
