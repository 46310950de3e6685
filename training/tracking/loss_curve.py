"""The losses of a run, as numbers and as a picture in its folder; both continue when the run is resumed."""

import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.tracking import GeneralTracker

from common.files import atomic_write
from common.run_folder import METRICS_FILE, PICTURE_FILE
from common.text_files import read_rows
from tracking.verdict import Points, Verdict, best_point, judge, smoothed


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


VALIDATION = "validation_loss"

_SECONDS = 20.0  # at least, between two drawings; each takes some tenths of one
_SIZE, _WITH_BANDS = (9.6, 4.8), (9.6, 7.2)  # of the picture, in 100 pixels
_STEP, _MEAN, _VALIDATION = "#c3d6ee", "#1f5fb4", "#d2601a"
_WINDOWS = 10  # of the running mean behind a validation loss, whose steps are far apart
_BANDS = (("little noise", "#2a9d8f"), ("middle", "#8a6fc4"), ("much noise", "#b5446e"))  # timesteps
_MANY = 200  # losses, from which on outliers would flatten the curve and may leave the picture
_SHOWN = (1, 99)  # percentiles of many losses that are always inside the picture
_AT_TIMESTEP = re.compile(rf"{VALIDATION}/t=(\d+)")


class LossCurve(GeneralTracker):
    """A tracker that appends each call to `metrics.jsonl` as a line and draws the losses in `loss.png`.

    Args:
        folder: of the run.
        resumed_at: the step that the run continues after; what was logged later is dropped. None for a new run.
    """

    name = "loss_curve"
    requires_logging_directory = False
    tracker = None

    def __init__(self, folder: Path, resumed_at: int | None):
        super().__init__()
        self.folder = folder
        self.points: dict[str, list[tuple[int, float]]] = {"loss": [], VALIDATION: []}
        self.at_timesteps: dict[int, list[tuple[int, float]]] = defaultdict(list)  # validation losses
        file = folder / METRICS_FILE
        kept = _read_metrics(file, resumed_at) if resumed_at is not None else []
        with atomic_write(file) as partial:
            partial.write_text("".join(f"{json.dumps(values)}\n" for values in kept), encoding="utf-8")
            if kept:  # the time of a run that was killed ends with its last value
                os.utime(partial, (time.time(), file.stat().st_mtime))
        for values in kept:
            self._remember(values)
        self.file = open(file, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.drawn_at = time.monotonic()
        self.said = {self._bad_kind()}  # before the run was resumed

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Append the numbers among `values`; draw, unless the picture is recent."""
        numbers = {"step": step} | {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.file.write(f"{json.dumps(numbers)}\n")
        self._remember(numbers)
        if time.monotonic() - self.drawn_at > _SECONDS:
            self._draw()

    def finish(self) -> None:
        """Draw all losses."""
        self.file.close()
        self._draw()

    def verdict(self) -> Verdict | None:
        """Return what the losses so far show."""
        return judge(self.points[VALIDATION], self.points["loss"])

    def news(self) -> str | None:
        """Return early signs of overfitting or of divergence in a sentence, the first time that there are any."""
        kind = self._bad_kind()
        if kind in self.said:
            return None
        self.said.add(kind)
        verdict = self.verdict()
        return verdict and verdict.sentence

    def best_with(self, step: int, loss: float) -> dict[str, float]:
        """Return the best step and its validation loss, that of `step` included, by the names of trackers' values."""
        best = best_point([*self.points[VALIDATION], (step, loss)])
        return {f"{VALIDATION}/best_step": best[0], f"{VALIDATION}/best": best[1]} if best else {}

    def _bad_kind(self) -> str | None:
        verdict = self.verdict()
        return verdict.kind if verdict and verdict.is_bad else None

    def _remember(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if not isinstance(value, int | float):
                continue
            if name == VALIDATION or (name == "loss" and math.isfinite(value)):
                self.points[name].append((values["step"], value))
            elif match := _AT_TIMESTEP.fullmatch(name):
                self.at_timesteps[int(match[1])].append((values["step"], value))

    def _draw(self) -> None:
        if self.points["loss"] or self.points[VALIDATION]:
            picture = draw_losses(self.points["loss"], self.points[VALIDATION], self.at_timesteps)
            with atomic_write(self.folder / PICTURE_FILE) as partial:
                picture.savefig(partial, format="png", dpi=100)
        self.drawn_at = time.monotonic()


def _read_metrics(file: Path, last_step: int) -> list[dict[str, Any]]:
    """Return what was logged up to a step."""
    return [row for row in read_rows(file) if isinstance(row.get("step"), int) and row["step"] <= last_step]


def draw_losses(losses: Points, validation: Points = (), at_timesteps: Mapping[int, Points] | None = None) -> "Figure":
    """Draw the losses over the steps: the validation loss in front of the running mean of the training loss.

    A second panel has the change of the validation loss at little, middle and much noise. Without a validation loss,
    the loss of each step is drawn behind its running mean.

    Args:
        losses: of the steps, and `validation` the losses of held-out clips; one of them has a point.
        at_timesteps: validation losses by timestep.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures in global state

    validation = [point for point in validation if math.isfinite(point[1])]
    bands = _bands(at_timesteps or {}) if validation else []
    figure = Figure(_WITH_BANDS if bands else _SIZE, layout="constrained")
    if not bands:
        _draw_curves(figure.subplots(), losses, validation)
        return figure
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_curves(above, losses, validation)
    _draw_bands(below, bands)
    above.set_xlabel("")
    return figure


def _draw_curves(axes: "Axes", losses: Points, validation: Points) -> None:
    shown = [value for _, value in validation]
    if losses:
        steps, values = (np.array(column) for column in zip(*losses, strict=True))
        window, means = smoothed(losses, _WINDOWS) if validation else smoothed(losses)
        if window > 1 and not validation:
            axes.plot(steps, values, color=_STEP, linewidth=1, label="training loss of a step")
        name = f"training loss, mean of {window} steps" if window > 1 else "training loss"
        style = {"linewidth": 1, "alpha": 0.6} if validation else {"linewidth": 2}
        if validation:  # without means of few steps
            steps, means = steps[window - 1 :], means[window - 1 :]
        axes.plot(steps, means, color=_MEAN, marker="o" if len(losses) == 1 else None, label=name, **style)
        shown += [*np.percentile(means if validation else values, _SHOWN)]
    if validation:
        style = {"color": _VALIDATION, "marker": "o"}
        axes.plot(*zip(*validation, strict=True), linewidth=3, label="validation loss", **style)
        if len(validation) > 1:
            step, best = best_point(validation)
            name = f"lowest: {best:.4f} at step {step}"
            axes.plot([step], [best], linewidth=0, markersize=13, markerfacecolor="none", label=name, **style)
    if validation or len(losses) >= _MANY:
        margin = 0.1 * (max(shown) - min(shown)) or 0.1 * abs(shown[0]) or 1.0
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    _finish(axes, "loss\n(mean squared error of the velocity)")


def _draw_bands(axes: "Axes", bands: Sequence[tuple[str, str, Points]]) -> None:
    for name, color, points in bands:
        axes.plot(*zip(*points, strict=True), color=color, linewidth=2, marker="o", markersize=4, label=name)
    axes.axhline(0, color="gray", linewidth=1)
    _finish(axes, f"validation loss,\nchange since step {bands[0][2][0][0]} (%)")


def _finish(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2)


def _bands(at_timesteps: Mapping[int, Points]) -> list[tuple[str, str, Points]]:
    """Return name, color and change in per cent since the first step of each third of the timesteps."""
    bands = []
    timesteps = sorted(at_timesteps)
    for number, (name, color) in enumerate(_BANDS):
        third = timesteps[number * len(timesteps) // 3 : (number + 1) * len(timesteps) // 3]
        columns = [dict(at_timesteps[timestep]) for timestep in third]
        steps = [step for step in columns[0] if all(step in column for column in columns)] if columns else []
        means = [(step, sum(column[step] for column in columns) / len(columns)) for step in steps]
        means = [(step, mean) for step, mean in means if math.isfinite(mean)]
        if len(means) > 1 and means[0][1]:
            span = " to ".join(map(str, dict.fromkeys((third[0], third[-1]))))
            changes = [(step, 100 * (mean / means[0][1] - 1)) for step, mean in means]
            bands.append((f"{name} (t = {span})", color, changes))
    return bands
