"""The loss as a picture and as numbers, beside the trackers; both go on when a run is resumed."""

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image, ImageColor

from tracking.loss_curve import METRICS_FILE, PICTURE_FILE, LossCurve, draw_losses, round_ticks, running_mean
from tracking.trackers import keep_losses


BLUE, PALE, ORANGE = "#1f5fb4", "#c3d6ee", "#d2601a"


def columns_of(picture: Image.Image, color: str) -> dict[int, float]:
    """Where the pixels of a color are, by column: their mean row."""
    near = np.abs(np.asarray(picture, dtype=int) - ImageColor.getrgb(color)).sum(axis=-1) < 40
    near[:36] = False  # the legend
    return {column: float(np.flatnonzero(near[:, column]).mean()) for column in np.flatnonzero(near.any(axis=0))}


def test_a_falling_loss_is_drawn_as_a_falling_curve_over_all_steps():
    rows = columns_of(draw_losses([(step, 1 / step) for step in range(1, 31)]), BLUE)
    assert (min(rows), max(rows)) == (pytest.approx(70, abs=3), pytest.approx(940, abs=3))
    left, middle, right = rows[min(rows) + 2], rows[500], rows[max(rows) - 2]
    assert left < middle < right  # rows are counted from the top
    assert right - left > 300


def test_many_noisy_steps_have_a_mean_that_outliers_do_not_flatten():
    noise = np.random.default_rng(0).normal(size=1000)
    losses = [(step, 1 + noise[step] / 10) for step in range(1000)]
    losses[500] = (500, 1000.0)
    picture = draw_losses(losses)
    single, mean = columns_of(picture, PALE), columns_of(picture, BLUE)
    assert len(single) > 400
    assert len(mean) > 800
    assert np.median([*single.values()]) == pytest.approx(np.median([*mean.values()]), abs=60)
    assert np.ptp([*single.values()]) > 150  # rows of 480


def test_the_validation_loss_has_a_curve_of_its_own():
    losses, held_out = [(step, 1.0 - step / 200) for step in range(100)], [(0, 1.0), (50, 0.9), (100, 1.2)]
    assert not columns_of(draw_losses(losses), ORANGE)
    rows = columns_of(draw_losses(losses, held_out), ORANGE)
    assert rows[935] < rows[75] < rows[500]


def test_lines_that_are_spoilt_are_left_out_when_a_run_is_resumed(tmp_path):
    good = b'{"step": 1, "loss": 0.5}'
    spoilt = [b'{"step": 2, "lo', b"", b"5", b'{"loss": 3}', b'{"step": null}', b"\xff", b"\x00\x00"]
    (tmp_path / METRICS_FILE).write_bytes(b"\n".join([good, *spoilt, b'{"step": 3, "loss": null}\n']))
    LossCurve(tmp_path, resumed_at=3).finish()
    assert metrics(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 3, "loss": None}]


@pytest.mark.parametrize("losses", [[(7, 0.5)], [(1, 0.5), (2, 0.5)], [(1, 0.0)]])
def test_few_or_equal_losses_are_drawn_too(losses):
    assert columns_of(draw_losses(losses), BLUE)


def test_the_running_mean_is_that_of_the_last_steps():
    points = [(1, 4.0), (2, 2.0), (3, 0.0), (4, 1.0)]
    assert running_mean(points, 2) == [(1, 4.0), (2, 3.0), (3, 1.0), (4, 0.5)]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.07, 1.02, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 3000, [500, 1000, 1500, 2000, 2500, 3000]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert round_ticks(low, high, most=7) == pytest.approx(ticks)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_what_is_logged_is_kept_and_goes_on_after_the_step_that_was_resumed(tmp_path):
    first = LossCurve(tmp_path, resumed_at=None)
    for step in (1, 2, 3):
        first.log({"loss": 1.0 / step, "lr": 1e-4, "note": "a text"}, step=step)
    first.log({"validation_loss": 0.7}, step=2)
    first.finish()
    before = (tmp_path / PICTURE_FILE).read_bytes()
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 1, "lo')  # a process that was killed

    again = LossCurve(tmp_path, resumed_at=2)
    again.log({"loss": float("nan")}, step=3)
    again.log({"loss": 0.25}, step=4)
    again.finish()
    steps = [(values["step"], values.get("loss")) for values in metrics(tmp_path) if "validation_loss" not in values]
    assert steps == [(1, 1.0), (2, 0.5), (3, pytest.approx(float("nan"), nan_ok=True)), (4, 0.25)]
    assert metrics(tmp_path)[2] == {"step": 2, "validation_loss": 0.7}
    assert again.points == {"loss": [(1, 1.0), (2, 0.5), (4, 0.25)], "validation_loss": [(2, 0.7)]}
    assert (tmp_path / PICTURE_FILE).read_bytes() != before

    LossCurve(tmp_path, resumed_at=None).finish()  # a new run has losses of its own
    assert metrics(tmp_path) == []


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_without_trackers_draws_its_losses_and_one_that_cannot_goes_on(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    keep_losses(accelerator, tmp_path, resumed_at=None)
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.end_training()
    assert Image.open(tmp_path / PICTURE_FILE).size == (960, 480)

    accelerator.trackers.clear()
    (tmp_path / "file").touch()
    keep_losses(accelerator, tmp_path / "file", resumed_at=None)
    assert accelerator.trackers == []
    assert "warning: there will be no loss curve (" in caplog.text
