"""Charts of a page: histograms and curves as SVG, and bars of categories."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from pages.parts import MACROS, format_number


_FEW_VALUES = 8  # that may have a bar each
_MOST_BINS, _LEAST_BINS = 24, 5
_MOST_LABELS = 7  # below the axis
_WIDEST = 60  # bar, in the units of the SVG
_FAR = 3  # times the range of 99% of the numbers, from which on the largest share the last bin
_MOST_POINTS, _MOST_DOTS = 400, 60  # of a curve
_MANY = 50  # points of a thin curve, from which on outliers may leave the chart
_TICKS = 5  # along an axis, about
_COLOURS = 6  # that a page has for curves; later curves are dashed


@dataclass(frozen=True)
class Bins:
    """How many numbers are in each bin."""

    counts: Sequence[int]
    labels: Sequence[str]  # "2 to 4", "100 or more"; "30" for a single value
    edges: Sequence[float] | None = None  # one more than bins, each in the bin above. None: a bin is one value
    is_open: bool = False  # the last bin has all numbers from its lower edge on


@dataclass(frozen=True)
class _Box:
    """The lines around the bars, in the units of the SVG."""

    width: int = 360
    height: int = 210
    left: int = 44
    right: int = 344
    top: int = 34
    bottom: int = 170


@dataclass(frozen=True)
class _Bar:
    x: float
    y: float
    width: float
    height: float
    label: str
    count: int


@dataclass(frozen=True)
class Curve:
    """A series of a line chart."""

    name: str
    points: Sequence[tuple[float, float]]  # (x, y) in the order of x; those that are not finite are skipped
    is_thin: bool = False  # noisy: drawn faintly behind the others
    has_dots: bool = False  # each point is marked, and says its values
    colour: int | None = None  # that several charts share; by default its place among the curves


@dataclass(frozen=True)
class _Line:
    curve: Curve
    colour: int
    path: str
    dots: Sequence[tuple[float, float, str]]  # x, y, what it says


def histogram(values: Iterable[float], title: str, unit: str = "", noun: str = "clips") -> Markup:
    """Return a histogram with its range and median as text; nothing without finite numbers.

    Args:
        title: what is counted: "Length".
        unit: below the horizontal axis: "seconds".
        noun: what the vertical axis counts.
    """
    numbers = [value for value in values if math.isfinite(value)]
    if not numbers:
        return Markup()
    bins, box = bin_numbers(numbers), _Box()
    step = _round_step(max(bins.counts) / 5, is_whole=True)
    rise = (box.bottom - box.top) / max(bins.counts)
    y_ticks = [(round(box.bottom - count * rise, 1), count) for count in range(0, max(bins.counts) + 1, int(step))]
    width = (box.right - box.left) / len(bins.counts)
    wide = min(0.8 * width, _WIDEST)
    bars = [
        _Bar(*np.round((box.left + (i + 0.5) * width - wide / 2, box.bottom - n * rise, wide, n * rise), 1), label, n)
        for i, (n, label) in enumerate(zip(bins.counts, bins.labels, strict=True))
    ]
    x_ticks = [(round(box.left + place * width, 1), label) for place, label in _marks(bins)]
    low, middle, high = map(format_number, np.percentile(numbers, [0, 50, 100]))
    spread = f"{low if low == high else f'{low} to {high}'} {unit}".rstrip()
    spread += "" if low == high else f", median {middle}"
    return MACROS.histogram(title, spread, unit, noun, box, bars, x_ticks, y_ticks, len(numbers))


def _marks(bins: Bins) -> list[tuple[float, str]]:
    """Return the labels below the axis, each with its place, in widths of a bin."""
    if bins.edges is None:
        return [(place + 0.5, label) for place, label in enumerate(bins.labels)]
    step = math.ceil(len(bins.edges) / _MOST_LABELS)
    marks = [(place, format_number(edge)) for place, edge in enumerate(bins.edges)][::step]
    if bins.is_open:
        middle = len(bins.counts) - 0.5  # of the last bin
        marks = [(place, label) for place, label in marks if place <= middle - step]
        marks.append((middle, f"\N{GREATER-THAN OR EQUAL TO} {format_number(bins.edges[-2])}"))
    return marks


def bin_numbers(values: Sequence[float]) -> Bins:
    """Count finite numbers, of which there is at least one, in bins with round edges.

    A few values that repeat have a bin each. A few numbers far above the others share the last bin.
    """
    numbers = np.asarray(values, dtype=float)
    distinct, counts = np.unique(numbers, return_counts=True)
    if len(distinct) == 1 or len(distinct) <= min(_FEW_VALUES, len(numbers) // 2):
        return Bins(counts.tolist(), list(map(format_number, distinct)))
    low, usual, high = np.percentile(numbers, [0, 99, 100], method="lower")
    top = usual if high - low > _FAR * (usual - low) > 0 else high
    is_whole = bool((numbers == np.round(numbers)).all())
    num_bins = min(max(round(math.sqrt(len(numbers))), _LEAST_BINS), _MOST_BINS)
    step = _round_step((top - low) / num_bins, is_whole=is_whole)
    edges = step * np.arange(math.floor(low / step), math.floor(top / step) + 2)
    counts, _ = np.histogram(np.clip(numbers, edges[0], edges[-1]), edges)
    last = edges[1:] - 1 if is_whole else edges[1:]
    labels = [
        format_number(start) if start == end else f"{format_number(start)} to {format_number(end)}"
        for start, end in zip(edges[:-1], last, strict=True)
    ]
    if top < high:
        labels[-1] = f"{format_number(edges[-2])} or more"
    return Bins(counts.tolist(), labels, edges.tolist(), is_open=bool(top < high))


def bar_chart(counts: Mapping[str, int], title: str) -> Markup:
    """Return a horizontal bar for each category, with its count, in the order of the mapping; nothing without any."""
    most = max(counts.values(), default=0)
    bars = [(name, count, round(100 * count / most, 1)) for name, count in counts.items()] if most else []
    return MACROS.bar_chart(title, bars) if bars else Markup()


def line_chart(
    curves: Sequence[Curve],
    title: str,
    x_name: str = "",
    y_name: str = "",
    note: str = "",
    *,
    most: float = math.inf,
) -> Markup:
    """Return curves over each other with labelled axes and a legend; nothing without finite points.

    Args:
        note: beside the title, what the curves say.
        most: the end of the vertical axis, at which higher values are drawn.
    """
    curves = [replace(curve, points=_finite(curve.points), colour=_colour(curve, i)) for i, curve in enumerate(curves)]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup()
    (left, right), (low, high) = _ranges(curves, most)
    x_ticks, y_ticks = _ticks(left, right, is_whole=True), _ticks(low, high)
    longest = max(len(format_number(value)) for value in y_ticks)
    box = _Box(400, 250, left=14 + 7 * longest, right=388, top=26, bottom=206)

    def place(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        x, y = np.array(points, float).T
        x = box.left + (x - left) / (right - left) * (box.right - box.left)
        y = box.bottom - (np.clip(y, low, high) - low) / (high - low) * (box.bottom - box.top)
        return list(zip(x.round(1).tolist(), y.round(1).tolist(), strict=True))

    lines = []
    for curve in curves:
        shown = curve.points[:: math.ceil(len(curve.points) / _MOST_POINTS)]
        shown = shown if shown[-1] == curve.points[-1] else [*shown, curve.points[-1]]
        dots = shown if (curve.has_dots and len(shown) <= _MOST_DOTS) or len(shown) == 1 else []
        told = [f"{curve.name}, {x_name} {format_number(x)}: {format_number(y)}" for x, y in dots]
        marked = [(*at, text) for at, text in zip(place(dots), told, strict=True)] if dots else []
        path = "M" + " ".join(f"{x:g},{y:g}" for x, y in place(shown))
        lines.append(_Line(curve, curve.colour % _COLOURS, path, marked))
    x_marks = [(place([(x, low)])[0][0], x) for x in x_ticks]
    y_marks = [(place([(left, y)])[0][1], y) for y in y_ticks]
    return MACROS.line_chart(title, note, lines, box, x_marks, y_marks, x_name, y_name, _COLOURS)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _colour(curve: Curve, place: int) -> int:
    return place if curve.colour is None else curve.colour


def _ranges(curves: Sequence[Curve], most: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the range of each axis; outliers of long thin curves may be outside of the second one."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys: list[float] = []
    for curve in curves:
        values = [y for _, y in curve.points]
        is_noisy = curve.is_thin and len(values) >= _MANY
        ys += np.percentile(values, [2, 98]).tolist() if is_noisy else values
    left, right, low, high = min(xs), max(xs), min(ys), max(min(max(ys), most), min(ys))
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = 0.0 if 0 <= low < margin else low - margin
    return (left, right if right > left else left + 1), (bottom, high + margin)


def _ticks(low: float, high: float, *, is_whole: bool = False) -> list[float]:
    step = _round_step((high - low) / _TICKS, is_whole=is_whole)
    return [round(count * step, 12) for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _round_step(least: float, *, is_whole: bool) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is at least this large; whole numbers from 1 on."""
    if is_whole and least <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
