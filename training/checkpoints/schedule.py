"""Which batches make up an optimizer step, and how far into the data a step is: what a resumed run goes on from."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleStart:
    """From where on steps take equally many batches: the run's start, or where it went on otherwise launched."""

    num_ranks: int = 1
    accumulation: int = 1  # batches of each rank in a step, but for an epoch's last
    step: int = 0
    epoch: int = 0
    seen_batches: int = 0  # of that epoch, over all ranks, padding included


@dataclass(frozen=True)
class StepSchedule:
    """Which batches of the stream over all epochs make up an optimizer step.

    An epoch's last step takes the batches that are left, so that no step mixes epochs and no batch is dropped.
    """

    start: ScheduleStart
    batches_per_epoch: int  # of one rank
    batches_in_first_epoch: int  # of one rank, that are left from the start on

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch."""
        return math.ceil(self.batches_per_epoch / self.start.accumulation)

    def batches_before(self, step: int) -> int:
        """How many batches of a rank the steps before `step` take together, counted from the start."""
        epochs, step_of_epoch = self._locate(step)
        batches = step_of_epoch * self.start.accumulation
        if epochs > 0:
            batches += self.batches_in_first_epoch + (epochs - 1) * self.batches_per_epoch
        return batches

    def restart(self, step: int, num_ranks: int, accumulation: int) -> ScheduleStart:
        """Where another schedule goes on when `step` steps of this one are done: behind the batches they took."""
        epochs, step_of_epoch = self._locate(step)
        seen = step_of_epoch * self.start.accumulation * self.start.num_ranks
        if epochs == 0:
            seen += self.start.seen_batches
        return ScheduleStart(num_ranks, accumulation, step, self.start.epoch + epochs, seen)

    def end_of_epochs(self, num_epochs: int) -> int:
        """The step at which so many epochs are done."""
        left = num_epochs - self.start.epoch - 1
        return self.start.step + (self._first_steps + left * self.steps_per_epoch if left >= 0 else 0)

    def is_due(self, done: int, every_steps: int | None, every_epochs: int | None) -> bool:
        """Whether something that happens every so many steps or epochs is due when `done` steps are done."""
        if every_steps and done % every_steps == 0:
            return True
        epochs, step_of_epoch = self._locate(done)
        return bool(every_epochs) and step_of_epoch == 0 and (self.start.epoch + epochs) % every_epochs == 0

    @property
    def _first_steps(self) -> int:
        return math.ceil(self.batches_in_first_epoch / self.start.accumulation)

    def _locate(self, step: int) -> tuple[int, int]:
        """How many epochs end between the start and `step`, and the steps since."""
        done = step - self.start.step
        if done < self._first_steps:
            return 0, done
        epochs, since = divmod(done - self._first_steps, self.steps_per_epoch)
        return epochs + 1, since
