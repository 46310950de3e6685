"""Warn of optimizer steps that were skipped or whose loss jumped, and end the run after too many bad ones."""

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, pstdev

from common.errors import UserError
from common.run_folder import list_checkpoints
from parallel.coordinator import Coordinator


logger = logging.getLogger(__name__)

_HISTORY = 200  # earlier losses that a loss is compared with
_SPIKE = 5.0  # standard deviations of the logarithm of the loss above its mean
_MOST_NAMES = 8  # clips named in a message


@dataclass(frozen=True)
class Step:
    """A finished optimizer step."""

    number: int
    loss: float
    grad_norm: float | None  # None if unknown
    names: Sequence[str]  # this rank's clips

    @property
    def is_bad(self) -> bool:
        """Whether the update was skipped because it would have made the weights infinite or NaN."""
        return not math.isfinite(self.loss) or (self.grad_norm is not None and not math.isfinite(self.grad_norm))


class StepGuard:
    """Checks the finished steps; every rank calls it with its own steps. `max_bad_steps` in a row end the run."""

    def __init__(self, coordinator: Coordinator, max_bad_steps: int, output_dir: Path):
        self.coordinator = coordinator
        self.max_bad_steps = max_bad_steps
        self.output_dir = output_dir
        self.num_bad = 0
        self.skipped_since: int | None = None  # the first of the steps that were just skipped in a row
        self._in_a_row = 0
        self._logs: deque[float] = deque(maxlen=_HISTORY)

    def check(self, steps: Sequence[Step], *, searches_scale: bool = False) -> None:
        """Warn of skipped steps and of losses that jumped; raise a UserError after too many bad steps in a row.

        With `searches_scale`, the fp16 loss scale can still be halved, so an overflow of the gradients is expected.
        """
        for step in steps:
            if not step.is_bad:
                self.skipped_since = None
            elif self.skipped_since is None:
                self.skipped_since = step.number
            if step.is_bad and searches_scale and math.isfinite(step.loss):
                continue
            if step.is_bad:
                self._count(step)
                continue
            self._in_a_row = 0
            if self._is_spike(step.loss):
                typical, clips = math.exp(fmean(self._logs)), self._clips_of(step)
                message = "warning: step %d: its loss of %.4g is far above the usual %.4g; it trained on %s"
                logger.warning(message, step.number, step.loss, typical, clips)
            if step.loss > 0:
                self._logs.append(math.log(step.loss))

    def _count(self, step: Step) -> None:
        self.num_bad += 1
        self._in_a_row += 1
        what = "gradient" if math.isfinite(step.loss) else "loss"
        clips = self._clips_of(step)
        message = "warning: step %d is skipped: its %s is not finite; it trained on %s"
        noted = {"skipped": step.number, "what": what, "clips": clips}  # for the run's page
        logger.warning(message, step.number, what, clips, extra={"noted": noted})
        if self._in_a_row >= self.max_bad_steps:
            raise self.failure(f"--max_bad_steps: {self._in_a_row} steps in a row had no finite loss and gradient")

    def failure(self, problem: str) -> UserError:
        """Return the error that ends a run with this problem: it names the last good checkpoint and what to do."""
        checkpoints = list_checkpoints(self.output_dir)
        good = f"{checkpoints[-1][1]} is the last good checkpoint" if checkpoints else "there is no checkpoint yet"
        return UserError(
            f"{problem}; {good}. Set a lower --learning_rate or the precision that the model was trained in "
            "(--mixed_precision), and check the clips named above"
        )

    def _is_spike(self, loss: float) -> bool:
        if len(self._logs) < _HISTORY // 4 or loss <= 0:
            return False
        # The losses of different timesteps differ by factors, so their logarithms are compared.
        return math.log(loss) > fmean(self._logs) + _SPIKE * max(pstdev(self._logs), 0.1)

    def _clips_of(self, step: Step) -> str:
        gathered = self.coordinator.gather(list(step.names))
        names = list(dict.fromkeys(chain.from_iterable(gathered)))  # ranks may share clips
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        return ", ".join(names[:_MOST_NAMES]) + more
