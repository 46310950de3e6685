"""Map optimizer steps to batches, so that a resumed run continues where the data was."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleStart:
    """The point from which the launch stays the same: the start of the run, or a resume with another launch."""

    num_ranks: int = 1
    accumulation: int = 1  # batches of each rank in a step, except an epoch's last
    step: int = 0
    epoch: int = 0
    seen_batches: int = 0  # of that epoch, over all ranks, padding included


@dataclass(frozen=True)
class StepSchedule:
    """The batches of each optimizer step.

    An epoch's last step takes the remaining batches, so that no step mixes epochs and no batch is dropped.
    """

    start: ScheduleStart
    batches_per_epoch: int  # of one rank
    batches_in_first_epoch: int  # of one rank, remaining at the start

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a complete epoch."""
        return math.ceil(self.batches_per_epoch / self.start.accumulation)

    def batches_before(self, step: int) -> int:
        """Return how many batches a rank takes from the start up to `step`."""
        epochs, step_of_epoch = self._locate(step)
        batches = step_of_epoch * self.start.accumulation
        if epochs > 0:
            batches += self.batches_in_first_epoch + (epochs - 1) * self.batches_per_epoch
        return batches

    def restart(self, step: int, num_ranks: int, accumulation: int) -> ScheduleStart:
        """Return the start of a schedule with another launch that continues after `step` steps of this one."""
        epochs, step_of_epoch = self._locate(step)
        seen = step_of_epoch * self.start.accumulation * self.start.num_ranks
        seen += self.start.seen_batches if epochs == 0 else 0
        return ScheduleStart(num_ranks, accumulation, step, self.start.epoch + epochs, seen)

    def end_of_epochs(self, num_epochs: int) -> int:
        """Return the step at which so many epochs are done."""
        left = num_epochs - self.start.epoch - 1
        return self.start.step + (self._first_steps + left * self.steps_per_epoch if left >= 0 else 0)

    def is_due(self, done: int, every_steps: int | None, every_epochs: int | None) -> bool:
        """Return whether something periodic is due after `done` steps."""
        if every_steps and done % every_steps == 0:
            return True
        epochs, step_of_epoch = self._locate(done)
        return bool(every_epochs) and step_of_epoch == 0 and (self.start.epoch + epochs) % every_epochs == 0

    @property
    def _first_steps(self) -> int:
        return math.ceil(self.batches_in_first_epoch / self.start.accumulation)

    def _locate(self, step: int) -> tuple[int, int]:
        """Return how many epochs end between the start and `step`, and the steps since."""
        done = step - self.start.step
        if done < self._first_steps:
            return 0, done
        epochs, since = divmod(done - self._first_steps, self.steps_per_epoch)
        return epochs + 1, since
