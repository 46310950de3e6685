"""What the losses of a run say: its best step, and whether the model learns, overfits or diverges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


Points = Sequence[tuple[int, float]]  # (step, value), in the order of the steps

_LAST = 3  # validations that must all be worse: one bad point is no trend
_NOISE = 6  # standard deviations of the noise that a rise must have, ...
_LEAST, _CERTAIN = 0.005, 0.3  # ... its least share of the loss, and the share that no noise explains
_FALL_NOISE = 3  # standard deviations of the noise that a fall must have; a needless warning is worse than none
_RUINED = 2  # times the first loss: no overfitting makes a model so much worse
_ERRORS = 2  # standard errors that a change of the mean training loss must have
_ENOUGH = 10  # training losses in a mean
_TOO_FAST = "the learning rate is probably too high"


@dataclass(frozen=True)
class Verdict:
    """What the curves show."""

    kind: str  # learning, unchanged, overfitting, worse (why is unclear) or diverging
    sentence: str  # lower case, without a full stop

    @property
    def is_bad(self) -> bool:
        """Whether the run should be told so while it trains."""
        return self.kind in ("overfitting", "diverging")


def best_point(validation: Points) -> tuple[int, float] | None:
    """Return the step with the lowest validation loss, the first of equal ones, and the loss; None without any."""
    return min(_finite(validation), key=lambda point: point[1], default=None)


def judge(validation: Points, training: Points) -> Verdict | None:
    """Judge a run by its losses so far; None if there are too few validations to say anything.

    The validation loss has risen if the last three values are all above the lowest one, their mean by six standard
    deviations of the noise and half a per cent, and have not recovered half of the rise. The mean training losses
    before and after the best step then tell the reason, if they are two standard errors apart.

    Args:
        validation: losses at fixed noise; one of step 0 is that of the untrained model.
        training: losses of the steps, which are at random noise levels.
    """
    if validation and not math.isfinite(validation[-1][1]):
        return Verdict("diverging", f"the validation loss at step {validation[-1][0]} is not finite: {_TOO_FAST}")
    points = _finite(validation)
    if len(points) < 2:
        return None
    (first_step, first), (best_step, best) = points[0], best_point(points)
    values = np.array([value for _, value in points])
    if not _has_risen(values):
        change = f"from {first:.4f} at step {first_step} to {best:.4f} at step {best_step}"
        if _has_fallen(values):
            return Verdict("learning", f"the validation loss fell {change}: the model learns what the clips share")
        return Verdict("unchanged", f"the validation loss hardly changed, {change}")
    risen = f"the validation loss has risen from {best:.4f} at step {best_step} to {values[-_LAST:].mean():.4f}"
    if values[-_LAST:].mean() > _RUINED * first:  # also if the training loss falls again, far above where it began
        return Verdict("diverging", f"{risen}, over {_RUINED} times that of step {first_step}: {_TOO_FAST}")
    trend = _trend(_finite(training), best_step)
    if trend < 0:
        advice = f"the model overfits; use the weights of about step {best_step}, or train on more clips"
        return Verdict("overfitting", f"{risen} while the training loss falls: {advice}")
    if trend > 0:
        return Verdict("diverging", f"{risen}, and the training loss rises too: {_TOO_FAST}")
    if best_step == first_step:
        return Verdict("diverging", f"{risen} and was never lower: {_TOO_FAST}")
    return Verdict("worse", f"{risen}: use the weights of about step {best_step}")


def smoothed(losses: Points, windows: int = 40) -> tuple[int, np.ndarray]:
    """Return the steps in a window, and the running mean of the losses (at least one): of each and those before it.

    The losses have at least so many windows, each of at most 4000 / windows steps.
    """
    values = np.array([value for _, value in losses], float)
    window = min(4000 // windows, max(1, len(values) // windows))
    # Of each value and the `window - 1` before it, or as many as exist.
    sums, counts = np.convolve(values, np.ones(window))[: len(values)], np.arange(len(values)) + 1
    return window, sums / np.minimum(counts, window)


def _finite(points: Points) -> list[tuple[int, float]]:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _has_risen(values: np.ndarray) -> bool:
    best, last = values.min(), values[-_LAST:]
    since, rise = values[values.argmin() + 1 :], last.mean() - best
    if len(since) < _LAST or last.min() <= best or rise < (since.max() - best) / 2:
        return False
    return rise > min(max(_NOISE * _noise(values), _LEAST * best), _CERTAIN * best)


def _has_fallen(values: np.ndarray) -> bool:
    best, fall = values.min(), values[0] - values.min()
    is_steady = len(values) >= _LAST and (np.diff(values) < 0).all()
    return fall > _LEAST * best and (is_steady or fall > min(_FALL_NOISE * _noise(values), _CERTAIN * best))


def _noise(values: np.ndarray) -> float:
    """Estimate the standard deviation of the noise on a smooth curve, from above if there are few values."""
    if len(values) < 4:
        return 0.0
    # In third differences a smooth trend vanishes, and their variance is 1 + 9 + 9 + 1 times that of the noise. Their
    # median ignores the few where a curve bends; it is 1 / 1.4826 standard deviations of the normal distribution.
    differences = np.abs(np.diff(values, 3))
    return 1.4826 * float(np.median(differences)) / math.sqrt(20) * (1 + 3 / len(differences))


def _trend(losses: Points, best_step: int) -> int:
    """Return 1 if the training loss rises after the best step, -1 if it falls, 0 if that is unclear."""
    values = np.array([value for _, value in losses])
    count = sum(step <= best_step for step, _ in losses)
    if count < _ENOUGH:  # the best step is the first one
        count = len(values) // 2
    before, after = values[:count], values[count:]
    if min(len(before), len(after)) < _ENOUGH:
        return 0
    change = after.mean() - before.mean()
    error = math.sqrt(before.var() / len(before) + after.var() / len(after))
    return 0 if abs(change) <= _ERRORS * error else int(math.copysign(1, change))
