"""The losses as a picture and as numbers; both continue when a run is resumed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image

from tracking.loss_curve import METRICS_FILE, PICTURE_FILE, LossCurve, draw_losses
from tracking.trackers import keep_losses


def curves_of(picture: Figure) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in picture.axes[0].lines}


@pytest.mark.parametrize("losses", [[(7, 0.5)], [(1, 0.5), (2, 0.5)], [(1, 0.0)], [(3, 1.0), (4, 0.5), (6, 0.2)]])
def test_few_losses_are_drawn_as_they_are(losses):
    assert curves_of(draw_losses(losses)) == {"training loss": losses}


def test_many_losses_get_a_running_mean_and_a_view_without_outliers():
    noise = np.random.default_rng(0).normal(size=1000)
    losses = [(step, 1 + noise[step] / 10) for step in range(1000)]
    losses[500] = (500, 1000.0)
    picture = draw_losses(losses)
    curves = curves_of(picture)
    assert curves["training loss of a step"] == losses
    mean = dict(curves["training loss, mean of 25 steps"])
    assert mean[100] == pytest.approx(1 + noise[76:101].mean() / 10)
    assert mean[1] == pytest.approx(1 + noise[:2].mean() / 10)  # of the steps so far
    low, high = picture.axes[0].get_ylim()
    assert 0.6 < low < 1 - 0.2 < 1 + 0.2 < high < 1.4


def test_many_equal_losses_are_in_view():
    low, high = draw_losses([(step, 0.5) for step in range(300)]).axes[0].get_ylim()
    assert low < 0.5 < high


def test_the_validation_loss_has_its_own_curve_which_is_in_view():
    losses, validation = [(step, 1 - step / 1000) for step in range(300)], [(0, 1.0), (50, 0.9), (100, 7.0)]
    picture = draw_losses(losses, validation)
    curves = curves_of(picture)
    assert curves["validation loss"] == validation
    assert curves["lowest: 0.9000 at step 50"] == [(50, 0.9)]
    assert curves["training loss, mean of 30 steps"][0] == (29, pytest.approx(1 - 14.5 / 1000))  # the first full mean
    assert picture.axes[0].get_ylim()[1] > 7
    (behind, *_, front, _) = picture.axes[0].lines
    assert behind.get_linewidth() < front.get_linewidth()


def test_the_second_panel_has_the_change_at_little_and_much_noise():
    at_timesteps = {t: [(0, 1.0 * t), (50, 0.5 * t), (100, 2.0 * t)] for t in (100, 200, 300, 400, 500, 600)}
    _, below = draw_losses([(1, 1.0)], [(0, 1.0), (50, 0.5), (100, 2.0)], at_timesteps).axes
    bands = {line.get_label(): line.get_ydata() for line in below.lines if "noise" in line.get_label()}
    assert set(bands) == {"little noise (t = 100 to 200)", "much noise (t = 500 to 600)"}
    assert all(list(changes) == pytest.approx([0, -50, 100]) for changes in bands.values())
    assert "change since step 0 (%)" in below.get_ylabel()


def test_the_best_step_is_known_and_overfitting_is_said_once_even_if_the_run_is_resumed(tmp_path):
    def log(curve: LossCurve, step: int) -> None:
        for number in range(step - 99, step + 1):
            curve.log({"loss": 1.0 - number / 2000}, step=number)
        curve.log({"validation_loss": 1.0 + ((step - 300) / 1000) ** 2}, step=step)

    first = LossCurve(tmp_path, resumed_at=None)
    news = []
    for step in range(100, 801, 100):
        log(first, step)
        news.append(first.news())
    assert [number for number, sentence in enumerate(news) if sentence] == [5]  # the third one after step 300
    assert "while the training loss falls: the model overfits; use the weights of about step 300" in news[5]
    assert first.best_with(900, 0.5) == {"validation_loss/best_step": 900, "validation_loss/best": 0.5}
    assert first.best_with(900, 2.0) == {"validation_loss/best_step": 300, "validation_loss/best": 1.0}
    first.finish()
    again = LossCurve(tmp_path, resumed_at=700)
    log(again, 800)
    assert again.news() is None
    assert again.verdict().kind == "overfitting"


def test_damaged_lines_are_skipped_when_a_run_is_resumed(tmp_path):
    good = b'{"step": 1, "loss": 0.5}'
    damaged = [b'{"step": 2, "lo', b"", b"5", b'{"loss": 3}', b'{"step": null}', b"\xff", b"\x00\x00"]
    (tmp_path / METRICS_FILE).write_bytes(b"\n".join([good, *damaged, b'{"step": 3, "loss": null}\n']))
    LossCurve(tmp_path, resumed_at=3).finish()
    assert metrics(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 3, "loss": None}]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_the_log_continues_after_the_step_that_was_resumed(tmp_path):
    first = LossCurve(tmp_path, resumed_at=None)
    for step in (1, 2, 3):
        first.log({"loss": 1.0 / step, "lr": 1e-4, "note": "a text"}, step=step)
    first.log({"validation_loss": 0.7}, step=2)
    first.finish()
    before = (tmp_path / PICTURE_FILE).read_bytes()
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 1, "lo')  # by a process that was killed

    os.utime(tmp_path / METRICS_FILE, (7, 7))
    again = LossCurve(tmp_path, resumed_at=2)
    assert (tmp_path / METRICS_FILE).stat().st_mtime == 7  # still the time of the last news
    again.log({"loss": float("nan")}, step=3)
    again.log({"loss": 0.25}, step=4)
    again.finish()
    steps = [(values["step"], values.get("loss")) for values in metrics(tmp_path) if "validation_loss" not in values]
    assert steps == [(1, 1.0), (2, 0.5), (3, pytest.approx(float("nan"), nan_ok=True)), (4, 0.25)]
    assert metrics(tmp_path)[2] == {"step": 2, "validation_loss": 0.7}
    assert again.points == {"loss": [(1, 1.0), (2, 0.5), (4, 0.25)], "validation_loss": [(2, 0.7)]}
    assert (tmp_path / PICTURE_FILE).read_bytes() != before

    LossCurve(tmp_path, resumed_at=None).finish()  # a new run starts empty
    assert metrics(tmp_path) == []


@pytest.mark.usefixtures("fresh_accelerator")
def test_losses_are_drawn_without_trackers_and_a_failure_is_a_warning(tmp_path, caplog):
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
