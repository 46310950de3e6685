"""Where a run stands: which batches make up a step, and what each step's values were."""

import logging
import math
import operator
from dataclasses import dataclass
from functools import reduce

import torch
from accelerate import Accelerator
from tqdm import tqdm

from throughput import Speed, Throughput


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepSchedule:
    """Which batches of the stream over all epochs make up an optimizer step.

    An epoch's last step takes the batches that are left, so that no step mixes epochs and no batch is dropped.
    """

    batches_per_epoch: int  # of one rank
    accumulation: int  # batches a step, but for an epoch's last

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    def batches_before(self, step: int) -> int:
        """How many batches of a rank the steps before `step` take together."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.batches_per_epoch + step_of_epoch * self.accumulation

    def is_due(self, done: int, every_steps: int | None, every_epochs: int | None) -> bool:
        """Whether something that happens every so many steps or epochs is due when `done` steps are done."""
        periods = (every_steps, every_epochs and every_epochs * self.steps_per_epoch)
        return any(period and done % period == 0 for period in periods)


class StepLog:
    """Progress bar and trackers, fed without making the device wait.

    Loss and gradient norm stay on the device until `interval` steps have gathered; then they are fetched in one go,
    and each step's values are logged, with the last one's how fast these steps were.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        first_step: int,
        total_steps: int,
        interval: int,
        throughput: Throughput,
    ):
        self.accelerator = accelerator
        self.throughput = throughput
        self.interval = interval
        self.step = first_step
        self.pending: list[torch.Tensor] = []
        self.learning_rates: list[float] = []
        self.losses: list[float] = []
        self.has_norm = True
        self.speeds: list[Speed] = []  # of each interval
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="Training", disable=not accelerator.is_local_main_process
        )

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor | float | None, learning_rate: float) -> None:
        """Note one optimizer step. The gradient norm is None where nobody knows it: nothing is logged then."""
        self.has_norm = grad_norm is not None
        if not isinstance(grad_norm, torch.Tensor):
            # `torch.tensor` would wait for the device.
            grad_norm = loss.new_full((), math.nan if grad_norm is None else grad_norm)
        self.pending.append(torch.stack([loss, grad_norm.to(loss)]))
        self.learning_rates.append(float(learning_rate))  # torchao's is a tensor, which the next step changes
        self.step += 1
        self.bar.update()
        if len(self.pending) >= self.interval:
            self.flush()

    def flush(self) -> None:
        """Fetch and log what is pending; called on every rank alike."""
        if not self.pending:
            return
        values = self.accelerator.reduce(torch.stack(self.pending), reduction="mean").tolist()
        speed = self.throughput.read(len(values))  # the device is done with them
        self.speeds.append(speed)
        first = self.step - len(values) + 1
        for step, (loss, grad_norm), rate in zip(
            range(first, self.step + 1), values, self.learning_rates, strict=True
        ):
            logged = {"loss": loss, "lr": rate} | ({"grad_norm": grad_norm} if self.has_norm else {})
            if step == self.step:
                logged |= {f"throughput/{name}": value for name, value in speed.values().items()}
            self.accelerator.log(logged, step=step)
            self.losses.append(loss)
        described = [f"loss={loss:.4f}", f"lr={rate:.2e}", *([f"grad_norm={grad_norm:.3f}"] if self.has_norm else [])]
        self.bar.set_postfix_str(", ".join([*described, speed.short()]))
        self.pending.clear()
        self.learning_rates.clear()

    def close(self) -> None:
        """Log what is pending, how fast the run was but for its first interval, and how the loss went: its mean over
        the first and last steps, 50 if there are."""
        self.flush()
        self.bar.close()
        settled = self.speeds[1:] or self.speeds  # the first steps compile and allocate
        if settled:
            speed = reduce(operator.add, settled)
            which = "without" if len(self.speeds) > 1 else "with"
            logger.info("speed, %s the first steps: %s", which, speed)
        count = min(50, len(self.losses) // 2)
        if count >= 10:  # the loss of a single step says more of its timestep than of the model
            first, last = sum(self.losses[:count]) / count, sum(self.losses[-count:]) / count
            logger.info("mean loss: %.4f over the first %d steps, %.4f over the last %d", first, count, last, count)
