"""When the loss of held-out clips is measured, and with how many forward passes, for a bounded share of the run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planning.held_out import FEWEST_PASSES, SHARE


QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the timesteps
BANDS = ((0, 1, 2), (3, 4, 5), (6, 7, 8))  # of the quantiles: little, middle and much noise

_ORDER = (1, 4, 7, 0, 3, 6, 2, 5, 8)  # in which a measurement takes the quantiles: first one of each band
_ENOUGH, _MOST = 10, 20  # measurements after the first step: enough to use more clips; more show nothing new
_FEW = 5  # measurements, below which not all quantiles are measured

Pair = tuple[int, int]  # a clip's index in the full set, and the index of a quantile


@dataclass(frozen=True)
class LossSchedule:
    """The measurements of a run; all of them have the same passes."""

    pairs: Sequence[Pair]  # of a measurement, over all ranks
    every: int  # steps between two
    count: int  # of the measurements from step 0 to the last one
    share: float  # of the run's forward and backward work that they take
    flops: float = 0  # operations of a measurement on each rank

    def is_due(self, step: int, total_steps: int) -> bool:
        """Return whether the loss is measured after `step` steps."""
        return step == total_steps or step % self.every == 0


def schedule_losses(
    num_clips: int, most_passes: float, total_steps: int, *, num_ranks: int = 1, num_passes: int = 0
) -> LossSchedule:
    """Plan the measurements of a run, at least two: before the first step and after the last one.

    With the passes that the run can afford, all nine quantiles are measured on one clip if that is possible six times
    or more, and on more clips if it is possible eleven times.

    Args:
        most_passes: forward passes on each rank that take as long as the share `SHARE` of the training.
        num_passes: of a measurement, if that is decided already.
    """
    sizes = [len(QUANTILES) * clips for clips in range(num_clips, 0, -1)]

    def rounds(passes: int) -> int:
        return math.ceil(passes / num_ranks)

    if not num_passes:
        affordable = (size for size in sizes[:-1] if most_passes >= (_ENOUGH + 1) * rounds(size))
        least = sizes[-1] if most_passes >= (_FEW + 1) * rounds(sizes[-1]) else FEWEST_PASSES
        num_passes = next(affordable, least)
    after_first = min(_MOST, max(1, int(most_passes / rounds(num_passes)) - 1))
    every = min(_round_up(math.ceil(total_steps / after_first)), total_steps)
    count = 1 + math.ceil(total_steps / every)
    share = SHARE * count * rounds(num_passes) / most_passes
    return LossSchedule(balanced_pairs(num_clips)[:num_passes], every, count, share)


def balanced_pairs(num_clips: int) -> list[Pair]:
    """Return all pairs of a clip and a quantile; each nine have all quantiles, of as many clips as possible."""
    return [
        ((place + block) % num_clips, quantile) for block in range(num_clips) for place, quantile in enumerate(_ORDER)
    ]


def share_pairs(pairs: Sequence[Pair], rank: int, num_ranks: int) -> dict[int, list[int]]:
    """Return the quantiles that a rank measures, by clip; all ranks get equally many.

    A sharded network needs all ranks for every call: the last ranks may get a pair that another rank has too.
    """
    quantiles: dict[int, list[int]] = {}
    for number in range(rank, math.ceil(len(pairs) / num_ranks) * num_ranks, num_ranks):
        clip, quantile = pairs[number % len(pairs)]
        quantiles.setdefault(clip, []).append(quantile)
    return quantiles


def _round_up(steps: int) -> int:
    """Round up to two digits, so that the steps are easy to read."""
    unit = 10 ** max(0, len(str(steps)) - 2)
    return math.ceil(steps / unit) * unit
