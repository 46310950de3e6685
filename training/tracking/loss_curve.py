"""The loss of a run as a picture in its folder, and the numbers behind it, which go on when the run is resumed."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image, ImageDraw, ImageFont

from common.files import atomic_write


METRICS_FILE = "metrics.jsonl"
PICTURE_FILE = "loss.png"

_SECONDS = 20.0  # between two drawings, at the least; each takes some hundredths of one
_SIZE, _SCALE = (960, 480), 2  # of the picture; it is drawn larger, for smooth lines
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 40, 20, 50  # margins
_PAPER, _RULE, _TEXT = "#ffffff", "#e2e2e6", "#505058"
_STEP, _MEAN, _HELD_OUT = "#c3d6ee", "#1f5fb4", "#d2601a"
_WINDOWS = 40  # of the mean, that the curve has; of 100 steps at most
_MANY, _SHOWN = 200, 99.0  # of so many losses, so many percent are inside the picture: the rest would flatten it

Points = Sequence[tuple[int, float]]  # (step, value), in the order of the steps


class LossCurve(GeneralTracker):
    """Keeps what is logged in `metrics.jsonl`, a line for each call, and draws the losses in `loss.png`.

    Args:
        folder: of the run.
        resumed_at: the step that it goes on after; what was logged later comes once more. None for a new run.
    """

    name = "loss_curve"
    requires_logging_directory = False
    tracker = None

    def __init__(self, folder: Path, resumed_at: int | None):
        super().__init__()
        self.folder = folder
        self.points: dict[str, list[tuple[int, float]]] = {"loss": [], "validation_loss": []}
        kept = _read_metrics(folder / METRICS_FILE, resumed_at) if resumed_at is not None else []
        with atomic_write(folder / METRICS_FILE) as partial:
            partial.write_text("".join(f"{json.dumps(values)}\n" for values in kept), encoding="utf-8")
        for values in kept:
            self._remember(values)
        self.file = open(folder / METRICS_FILE, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.drawn_at = time.monotonic()

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Note the numbers among `values`; draw, if that was not done just now."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.file.write(f"{json.dumps({'step': step} | numbers)}\n")
        self._remember({"step": step} | numbers)
        if time.monotonic() - self.drawn_at > _SECONDS:
            self._draw()

    def finish(self) -> None:
        """Draw what there is."""
        self.file.close()
        self._draw()

    def _remember(self, values: dict[str, Any]) -> None:
        for name, points in self.points.items():
            if isinstance(values.get(name), int | float) and math.isfinite(values[name]):
                points.append((values["step"], values[name]))

    def _draw(self) -> None:
        if self.points["loss"]:
            picture = draw_losses(self.points["loss"], self.points["validation_loss"])
            with atomic_write(self.folder / PICTURE_FILE) as partial:
                picture.save(partial, format="PNG")
        self.drawn_at = time.monotonic()


def _read_metrics(file: Path, last_step: int) -> list[dict[str, Any]]:
    """What was logged up to a step; lines that a killed process or an editor has spoilt are left out."""
    metrics = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int) and values["step"] <= last_step:
            metrics.append(values)
    return metrics


@dataclass(frozen=True)
class _Axes:
    """Where a step and a value lie in the picture."""

    steps: tuple[float, float]  # first and last
    values: tuple[float, float]  # lowest and highest

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Pixels from the left and from the top; values beyond the axis lie on its end."""
        width, height = _SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _TOP - _BOTTOM
        across = (step - self.steps[0]) / (self.steps[1] - self.steps[0])
        up = (min(max(value, self.values[0]), self.values[1]) - self.values[0]) / (self.values[1] - self.values[0])
        return _SCALE * (_LEFT + across * width), _SCALE * (_TOP + (1 - up) * height)


def draw_losses(losses: Points, validation: Points = ()) -> Image.Image:
    """Draw the loss of each step, its running mean and the validation loss over the steps.

    Args:
        losses: at least one.
        validation: the mean loss of clips that are not trained on; may be empty.
    """
    picture = Image.new("RGB", (_SCALE * _SIZE[0], _SCALE * _SIZE[1]), _PAPER)
    draw = ImageDraw.Draw(picture)
    window = min(100, max(1, len(losses) // _WINDOWS))
    means = running_mean(losses, window)
    axes = _make_axes(losses, validation)
    _draw_axes(draw, axes)
    _draw_line(draw, axes, losses, _STEP, 1)
    _draw_line(draw, axes, means, _MEAN, 3)
    _draw_line(draw, axes, validation, _HELD_OUT, 3)
    for step, value in validation:
        _draw_dot(draw, axes, (step, value), _HELD_OUT, 4)
    legend = [(_STEP, "loss of a step"), (_MEAN, f"mean of {window} steps")] if window > 1 else [(_MEAN, "loss")]
    left = _LEFT
    for color, words in [*legend, *([(_HELD_OUT, "validation loss")] if validation else [])]:
        draw.line([_SCALE * x for x in (left, 20, left + 24, 20)], fill=color, width=4 * _SCALE)
        _write(draw, (left + 32, 20), words, "lm")
        left += 62 + round(_font().getlength(words) / _SCALE)
    return picture.reduce(_SCALE)


def running_mean(points: Points, window: int) -> list[tuple[int, float]]:
    """The mean of each value and of the `window - 1` before it; of as many as there are at the beginning."""
    sums = np.cumsum([0.0, *(value for _, value in points)])
    return [
        (step, float(sums[end] - sums[max(0, end - window)]) / min(end, window))
        for end, (step, _) in enumerate(points, start=1)
    ]


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Up to `most` round numbers between two others, at equal distances of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    distance = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) < most)
    return [number * distance for number in range(math.ceil(low / distance), math.floor(high / distance) + 1)]


def _make_axes(losses: Points, validation: Points) -> _Axes:
    """Axes that show all, but of many losses not the few that are far from the others."""
    values = np.array([value for _, value in losses])
    if len(values) >= _MANY:
        values = np.percentile(values, (100 - _SHOWN, _SHOWN))
    values = [*values, *(value for _, value in validation)]
    low, high = float(min(values)), float(max(values))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    steps = [step for step, _ in [*losses, *validation]]
    return _Axes((min(steps), max(*steps, min(steps) + 1)), (low - margin, high + margin))


def _draw_axes(draw: ImageDraw.ImageDraw, axes: _Axes) -> None:
    for value in round_ticks(*axes.values, most=6):
        start, end = axes.place(axes.steps[0], value), axes.place(axes.steps[1], value)
        draw.line([*start, *end], fill=_RULE, width=_SCALE)
        _write(draw, (start[0] / _SCALE - 8, start[1] / _SCALE), f"{value:.6g}", "rm")
    for step in round_ticks(*axes.steps, most=8):
        if step == round(step):
            across, bottom = axes.place(step, axes.values[0])
            _write(draw, (across / _SCALE, bottom / _SCALE + 8), f"{step:.0f}", "mt")
    _write(draw, (_SIZE[0] / 2, _SIZE[1] - 14), "optimizer steps", "mm")


def _draw_line(draw: ImageDraw.ImageDraw, axes: _Axes, points: Points, color: str, width: int) -> None:
    if len(points) > 1:
        places = [axes.place(step, value) for step, value in points]
        draw.line(places, fill=color, width=width * _SCALE, joint="curve")
    elif points:
        _draw_dot(draw, axes, points[0], color, width)


def _draw_dot(draw: ImageDraw.ImageDraw, axes: _Axes, point: tuple[int, float], color: str, radius: int) -> None:
    across, down = axes.place(*point)
    radius *= _SCALE
    draw.ellipse((across - radius, down - radius, across + radius, down + radius), fill=color)


def _write(draw: ImageDraw.ImageDraw, place: tuple[float, float], words: str, anchor: str) -> None:
    draw.text((_SCALE * place[0], _SCALE * place[1]), words, fill=_TEXT, font=_font(), anchor=anchor)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(14 * _SCALE)
