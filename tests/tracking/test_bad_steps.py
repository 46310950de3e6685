"""Bad steps are named and counted, and too many in a row end the run."""

import logging
import math

import pytest

from common.errors import UserError
from common.run_folder import MANIFEST
from parallel.coordinator import Coordinator
from tracking.bad_steps import Step, StepGuard


NAN, INF = math.nan, math.inf


def steps(*losses: float, grad_norm: float | None = 1.0) -> list[Step]:
    return [Step(number, loss, grad_norm, [f"clip-{number}.mp4"]) for number, loss in enumerate(losses, start=1)]


@pytest.fixture
def guard(tmp_path) -> StepGuard:
    return StepGuard(Coordinator(), 3, tmp_path)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "what"), [(NAN, 1.0, "loss"), (INF, None, "loss"), (0.5, NAN, "gradient")]
)
def test_a_step_that_is_not_finite_is_named_with_its_clips(guard, caplog, loss, grad_norm, what):
    guard.check([Step(7, loss, grad_norm, ["a.mp4", "b.mp4"])])
    assert caplog.messages == [f"warning: step 7 is skipped: its {what} is not finite; it trained on a.mp4, b.mp4"]
    assert guard.num_bad == 1


def test_too_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(guard, tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / MANIFEST).touch()
    guard.check(steps(NAN, NAN, 1.0, NAN, NAN))
    with pytest.raises(
        UserError, match=r"--max_bad_steps: 3 steps in a row .*checkpoint-10 is the last good checkpoint"
    ):
        guard.check(steps(INF))
    assert guard.num_bad == 5


def test_without_a_checkpoint_it_says_so(guard):
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        guard.check(steps(NAN, NAN, NAN))


def test_it_knows_since_when_all_steps_are_skipped(guard):
    guard.check(steps(NAN, 1.0, 1.0))
    assert guard.skipped_since is None
    guard.check([Step(4, 1.0, INF, []), Step(5, NAN, None, [])])
    guard.check([Step(6, 1.0, INF, [])], searches_scale=True)  # not counted, but skipped too
    assert (guard.skipped_since, guard.num_bad) == (4, 3)


def test_overflows_that_lower_the_fp16_scale_are_not_counted(guard, caplog):
    guard.check(steps(1.0, 1.0, 1.0, 1.0, grad_norm=INF), searches_scale=True)
    assert guard.num_bad == 0
    assert not caplog.messages
    guard.check(steps(NAN, grad_norm=INF), searches_scale=True)
    assert guard.num_bad == 1


def test_a_loss_that_jumps_is_a_warning_and_usual_scatter_is_not(guard, caplog):
    caplog.set_level(logging.WARNING)
    usual = [0.01 * 3 ** (number % 4) for number in range(80)]  # from 0.01 to 0.27, as timesteps differ
    guard.check(steps(*usual))
    assert not caplog.messages
    guard.check([Step(81, 1000.0, 1.0, ["odd.mp4"])])
    assert "step 81: its loss of 1000 is far above the usual 0.05196; it trained on odd.mp4" in caplog.text


def test_the_first_losses_are_not_compared(guard, caplog):
    guard.check(steps(*[1e-3] * 20, 100.0))
    assert not caplog.messages


def test_of_many_clips_some_are_named(guard, caplog):
    guard.check([Step(1, NAN, None, [str(number) for number in range(12)])])
    assert caplog.text.rstrip().endswith("it trained on 0, 1, 2, 3, 4, 5, 6, 7 and 4 more")
