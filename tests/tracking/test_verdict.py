"""The best step is that of the lowest validation loss; a run is judged by trends, not by noise."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from tracking.verdict import Points, best_point, judge, smoothed


STEPS = 1000


def curve(loss: Callable[[np.ndarray], np.ndarray], every: int, noise: float, seed: int = 0) -> Points:
    """A loss over the steps as a function of the share of the run that is done, with noise relative to it."""
    steps = np.arange(0, STEPS + 1, every)
    factors = 1 + noise * np.random.default_rng(seed).standard_normal(len(steps))
    return list(zip(steps.tolist(), (loss(steps / STEPS) * factors).tolist(), strict=True))


def falling(done: np.ndarray) -> np.ndarray:
    return 0.25 + 0.05 * np.exp(-3 * done)


def overfitted(done: np.ndarray) -> np.ndarray:
    return 0.3 - 0.1 * done + 0.15 * done**2  # lowest after a third


def diverging(done: np.ndarray) -> np.ndarray:
    return 0.3 + 0.6 * np.minimum(1, 4 * done)


@pytest.mark.parametrize("noise", [0, 0.002])
@pytest.mark.parametrize("every", [50, 100, 200])
@pytest.mark.parametrize(
    ("validation", "training", "kind"),
    [
        (falling, falling, "learning"),
        (overfitted, lambda done: 0.3 - 0.2 * done, "overfitting"),
        (diverging, diverging, "diverging"),
        (lambda done: 0.3 + 0 * done, falling, "unchanged"),
    ],
)
def test_a_run_is_judged_by_its_trend(validation, training, kind, every, noise):
    losses = curve(training, 1, noise=0.5, seed=1)
    assert judge(curve(validation, every, noise), losses).kind == kind


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_taken_for_overfitting(seed):
    validation, training = curve(falling, 100, 0.03, seed), curve(falling, 1, 0.5, seed + 100)
    verdicts = [judge(validation[:count], training[: 100 * count]) for count in range(2, 12)]
    assert not any(verdict.is_bad for verdict in verdicts)


def test_overfitting_is_said_with_the_step_to_use_as_soon_as_three_validations_rise():
    validation = curve(overfitted, 100, 0)
    losses = curve(lambda done: 0.3 - 0.2 * done, 1, noise=0.1)
    kinds = [judge(validation[:count], losses[: 100 * count]).kind for count in range(2, 12)]
    assert kinds.index("overfitting") == 8 - 2  # of the steps 0 to 700, since the lowest one is that of step 300
    assert judge(validation, losses).sentence == (
        "the validation loss has risen from 0.2835 at step 300 to 0.3325 while the training loss falls: the model "
        "overfits; use the weights of about step 300, or train on more clips"
    )


@pytest.mark.parametrize("spoiled", [3, 4])
def test_one_or_two_bad_validations_are_no_trend(spoiled):
    validation = [(step, 0.3 - step / 10_000 + (0.1 if step >= 100 * spoiled else 0)) for step in range(0, 501, 100)]
    assert not judge(validation[: spoiled + 2], []).is_bad
    recovered = [*validation[: spoiled + 2], *((step, 0.3 - step / 10_000) for step in range(600, 1001, 100))]
    assert judge(recovered, []).kind == "learning"


def test_a_rise_without_a_clear_training_loss_is_only_called_worse():
    verdict = judge(curve(overfitted, 100, 0), curve(lambda done: 0.3 + 0 * done, 1, 0.5))
    assert (verdict.kind, verdict.is_bad) == ("worse", False)


def test_a_loss_that_is_not_finite_has_diverged():
    assert judge([(0, 0.3), (100, math.nan)], []).sentence == (
        "the validation loss at step 100 is not finite: the learning rate is probably too high"
    )


def test_nothing_is_said_before_the_second_validation():
    assert judge([], []) is None
    assert judge([(0, 0.3)], [(1, 0.3)]) is None


def test_the_best_step_is_the_first_with_the_lowest_loss():
    assert best_point([]) is None
    assert best_point([(0, 3.0), (5, math.nan), (10, 1.0), (20, 1.0), (30, 2.0)]) == (10, 1.0)


def test_the_running_mean_is_over_a_fortieth_of_the_losses():
    window, means = smoothed([(step, float(step)) for step in range(80)])
    assert window == 2
    assert means[:3].tolist() == [0.0, 0.5, 1.5]
