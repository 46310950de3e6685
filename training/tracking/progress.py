"""Where a run stands: what each step's values were."""

import logging
import math
import operator
from collections.abc import Sequence
from functools import reduce

import torch
from accelerate import Accelerator

from common.bars import tqdm
from tracking.bad_steps import Step, StepGuard
from tracking.throughput import Speed, Throughput


logger = logging.getLogger(__name__)

ESTIMATE_AFTER = 10  # steps: of fewer, the first ones say too much, which compile and allocate


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
        guard: StepGuard,
    ):
        self.accelerator = accelerator
        self.throughput = throughput
        self.guard = guard
        self.interval = interval
        self.step = self.first_step = first_step
        self.total_steps = total_steps
        self.is_estimated = False
        self.pending: list[torch.Tensor] = []
        self.learning_rates: list[float] = []
        self.names: list[Sequence[str]] = []
        self.losses: list[float] = []
        self.has_norm = True
        self.speeds: list[Speed] = []  # of each interval
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="Training",
            unit=" steps",
            delay=0,
            disable=not accelerator.is_main_process,
        )

    def add(
        self,
        loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        learning_rate: float,
        names: Sequence[str] = (),
    ) -> None:
        """Note one optimizer step.

        Args:
            grad_norm: None where nobody knows it: nothing is logged then.
            names: of the clips it trained on, for when it went wrong.
        """
        self.has_norm = grad_norm is not None
        if not isinstance(grad_norm, torch.Tensor):
            # `torch.tensor` would wait for the device.
            grad_norm = loss.new_full((), math.nan if grad_norm is None else grad_norm)
        self.pending.append(torch.stack([loss, grad_norm.to(loss)]))
        self.learning_rates.append(float(learning_rate))  # torchao's is a tensor, which the next step changes
        self.names.append(names)
        self.step += 1
        self.bar.update()
        if len(self.pending) >= self.interval:
            self.flush()

    def flush(self) -> None:
        """Fetch and log what is pending; called on every rank alike.

        Raises:
            UserError: too many steps in a row went wrong.
        """
        if not self.pending:
            return
        values = self.accelerator.reduce(torch.stack(self.pending), reduction="mean").tolist()
        speed = self.throughput.read(len(values))  # the device is done with them
        self.speeds.append(speed)
        numbers = range(self.step - len(values) + 1, self.step + 1)
        steps = [
            Step(number, loss, grad_norm if self.has_norm else None, names)
            for number, (loss, grad_norm), names in zip(numbers, values, self.names, strict=True)
        ]
        for step, rate in zip(steps, self.learning_rates, strict=True):
            logged = {"loss": step.loss, "lr": rate} | ({"grad_norm": step.grad_norm} if self.has_norm else {})
            if step.number == self.step:
                logged |= {f"throughput/{name}": value for name, value in speed.values().items()}
            self.accelerator.log(logged, step=step.number)
            if math.isfinite(step.loss):
                self.losses.append(step.loss)
        described = [f"loss={step.loss:.4f}", f"lr={rate:.2e}"]
        described += [f"grad_norm={step.grad_norm:.3f}"] if self.has_norm else []
        self.bar.set_postfix_str(", ".join([*described, speed.short()]))
        self._estimate()
        for pending in (self.pending, self.learning_rates, self.names):
            pending.clear()
        scaler = self.accelerator.scaler
        self.guard.look_at(steps, searches_scale=scaler is not None and scaler.get_scale() >= 1)

    def _estimate(self) -> None:
        """Say once how long the rest takes, when it can be told."""
        left = self.total_steps - self.step
        if self.is_estimated or not left or self.step - self.first_step < ESTIMATE_AFTER:
            return
        self.is_estimated = True
        speed = self._settled_speed()
        seconds = speed.seconds / speed.steps
        logger.info(
            "about %s left: %d steps of %.3g s; validation and checkpoints come on top",
            in_words(left * seconds),
            left,
            seconds,
        )

    def _settled_speed(self) -> Speed:
        """How fast the run was but for its first interval."""
        return reduce(operator.add, self.speeds[1:] or self.speeds)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()  # what is said next has a line of its own

    def finish(self) -> None:
        """Log what is pending, how fast the run was but for its first interval, and how the loss went: its mean over
        the first and last steps, 50 if there are."""
        self.flush()
        self.bar.close()
        if self.speeds:
            speed = self._settled_speed()
            which = "without" if len(self.speeds) > 1 else "with"
            logger.info("speed, %s the first steps: %s", which, speed)
        if self.guard.num_bad:
            logger.warning("warning: %d steps were skipped: loss or gradient was not finite", self.guard.num_bad)
        count = min(50, len(self.losses) // 2)
        if count >= 10:  # the loss of a single step says more of its timestep than of the model
            first, last = sum(self.losses[:count]) / count, sum(self.losses[-count:]) / count
            logger.info("mean loss: %.4f over the first %d steps, %.4f over the last %d", first, count, last, count)


def in_words(seconds: float) -> str:
    """A duration as a person would say it: "40 s", "12 min", "2 h 10 min", "3 d 4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{minutes // 60} h {minutes % 60} min"
