"""The losses of a run, as numbers and as a picture in its folder; both continue when the run is resumed."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.tracking import GeneralTracker

from common.files import atomic_write
from common.run_folder import METRICS_FILE


if TYPE_CHECKING:
    from matplotlib.figure import Figure


PICTURE_FILE = "loss.png"

_SECONDS = 20.0  # at least, between two drawings; each takes some tenths of one
_SIZE = (9.6, 4.8)  # of the picture, in 100 pixels
_STEP, _MEAN, _VALIDATION = "#c3d6ee", "#1f5fb4", "#d2601a"
_WINDOWS = 40  # that the running mean has, each of at most 100 steps
_MANY = 200  # losses, from which on outliers would flatten the curve and may leave the picture
_SHOWN = (1, 99)  # percentiles of many losses that are always inside the picture

Points = Sequence[tuple[int, float]]  # (step, value), in the order of the steps


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
        self.points: dict[str, list[tuple[int, float]]] = {"loss": [], "validation_loss": []}
        kept = _read_metrics(folder / METRICS_FILE, resumed_at) if resumed_at is not None else []
        with atomic_write(folder / METRICS_FILE) as partial:
            partial.write_text("".join(f"{json.dumps(values)}\n" for values in kept), encoding="utf-8")
        for values in kept:
            self._remember(values)
        self.file = open(folder / METRICS_FILE, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.drawn_at = time.monotonic()

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

    def _remember(self, values: dict[str, Any]) -> None:
        for name, points in self.points.items():
            if isinstance(values.get(name), int | float) and math.isfinite(values[name]):
                points.append((values["step"], values[name]))

    def _draw(self) -> None:
        if self.points["loss"]:
            picture = draw_losses(self.points["loss"], self.points["validation_loss"])
            with atomic_write(self.folder / PICTURE_FILE) as partial:
                picture.savefig(partial, format="png", dpi=100)
        self.drawn_at = time.monotonic()


def _read_metrics(file: Path, last_step: int) -> list[dict[str, Any]]:
    """Return what was logged up to a step; lines that a killed process or an editor has damaged are skipped."""
    metrics = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int) and values["step"] <= last_step:
            metrics.append(values)
    return metrics


def draw_losses(losses: Points, validation: Points = ()) -> "Figure":
    """Draw the loss of each step (at least one), its running mean, and any validation losses over the steps."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures in global state
    from matplotlib.ticker import MaxNLocator

    figure = Figure(_SIZE, layout="constrained")
    axes = figure.subplots()
    steps, values = (np.array(column) for column in zip(*losses, strict=True))
    window = min(100, max(1, len(losses) // _WINDOWS))
    # Of each value and the `window - 1` before it, or as many as exist.
    sums, counts = np.convolve(values, np.ones(window))[: len(values)], np.arange(len(values)) + 1
    if window > 1:
        axes.plot(steps, values, color=_STEP, linewidth=1, label="loss of a step")
    name = f"mean of {window} steps" if window > 1 else "loss"
    marker = "o" if len(losses) == 1 else None
    axes.plot(steps, sums / np.minimum(counts, window), color=_MEAN, linewidth=2, marker=marker, label=name)
    if validation:
        axes.plot(*zip(*validation, strict=True), color=_VALIDATION, linewidth=2, marker="o", label="validation loss")
    if len(losses) >= _MANY:
        shown = [*np.percentile(values, _SHOWN), *(value for _, value in validation)]
        margin = 0.05 * (max(shown) - min(shown)) or 1.0
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.set_xlabel("optimizer steps")
    axes.grid(axis="y", alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure
