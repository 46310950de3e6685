"""Progress bar and log of the optimizer steps."""

import logging
import math
import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from statistics import fmean
from typing import NamedTuple

import torch
from accelerate import Accelerator

from common.bars import tqdm
from common.units import in_words
from tracking.bad_steps import Step, StepGuard
from tracking.peak_memory import PeakMemory
from tracking.throughput import Speed, Throughput


logger = logging.getLogger(__name__)

ESTIMATE_AFTER = 10  # steps; the first ones compile and allocate


class KeptPart(NamedTuple):
    """The part of a step that is regularization."""

    loss: torch.Tensor | float = 0.0  # what it adds to the step's loss
    share: float = 0.0  # of the step's samples
    weight: float = 1.0  # of its losses


NOTHING_KEPT = KeptPart()


class StepLog:
    """Progress bar and trackers, updated without making the device wait.

    Loss and gradient norm stay on the device for `interval` steps and are then fetched together. Each step's values
    are logged; the last one's include the speed of the interval and the peak memory. `loss` is the mean of the samples
    trained on, `regularization_loss` that of the others without their weight; a step may have only one of the two.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        first_step: int,
        total_steps: int,
        interval: int,
        throughput: Throughput,
        memory: PeakMemory,
        guard: StepGuard,
    ):
        self.accelerator = accelerator
        self.throughput = throughput
        self.memory = memory
        self.guard = guard
        self.interval = interval
        self.step = self.first_step = first_step
        self.total_steps = total_steps
        self.is_estimated = False
        # [loss, norm, loss of regularization], learning rate, clips, regularization
        self.pending: list[tuple[torch.Tensor, float, Sequence[str], KeptPart]] = []
        self.losses: list[float] = []
        self.has_norm = True
        self.speeds: list[Speed] = []  # of each interval
        is_hidden, unit = not accelerator.is_main_process, " steps"
        self.bar = tqdm(desc="Training", total=total_steps, initial=first_step, unit=unit, delay=0, disable=is_hidden)

    def add(
        self,
        loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        learning_rate: float,
        names: Sequence[str] = (),
        kept: KeptPart = NOTHING_KEPT,
    ) -> None:
        """Note one optimizer step, with the names of its clips for warnings; an unknown norm (None) is not logged."""
        self.has_norm = grad_norm is not None
        values = [loss, math.nan if grad_norm is None else grad_norm, kept.loss]
        # `torch.tensor` would wait for the device.
        values = [one.to(loss) if isinstance(one, torch.Tensor) else loss.new_full((), one) for one in values]
        # torchao's rate is a tensor that it changes
        self.pending.append((torch.stack(values), float(learning_rate), names, kept))
        self.step += 1
        self.bar.update()
        if len(self.pending) >= self.interval:
            self.flush()

    def flush(self) -> None:
        """Fetch and log the pending steps; raise a UserError after too many bad ones. Called on every rank."""
        if not self.pending:
            return
        values, rates, names, kept = zip(*self.pending, strict=True)
        values = self.accelerator.reduce(torch.stack(values), reduction="mean").tolist()
        speed = self.throughput.read(len(values))  # the device has finished them
        self.speeds.append(speed)
        rows = zip(range(self.step - len(values) + 1, self.step + 1), values, names, strict=True)
        steps = [Step(number, loss, norm if self.has_norm else None, clips) for number, (loss, norm, _), clips in rows]
        self.pending.clear()
        latest = {}
        for step, rate, (*_, kept_loss), part in zip(steps, rates, values, kept, strict=True):
            losses = _by_kind(step.loss, part._replace(loss=kept_loss))
            latest |= losses
            self._log(step, losses, rate, speed)
        norm = [f"grad_norm={steps[-1].grad_norm:.3f}"] if self.has_norm else []
        shown = [*(f"{name}={value:.4f}" for name, value in sorted(latest.items())), f"lr={rates[-1]:.2e}", *norm]
        self.bar.set_postfix_str(", ".join(shown))  # all fits 120 columns
        self._estimate()
        scaler = self.accelerator.scaler
        self.guard.check(steps, searches_scale=scaler is not None and scaler.get_scale() >= 1)

    def _log(self, step: Step, losses: Mapping[str, float], rate: float, speed: Speed) -> None:
        logged = {**losses, "lr": rate} | ({"grad_norm": step.grad_norm} if self.has_norm else {})
        if step.number == self.step:
            logged |= {f"throughput/{name}": value for name, value in speed.values().items()}
            logged |= {f"memory/peak_{name}_gb": size / 2**30 for name, size in self.memory.read().items()}
        self.accelerator.log(logged, step=step.number)
        if math.isfinite(losses.get("loss", math.nan)):
            self.losses.append(losses["loss"])

    def _estimate(self) -> None:
        """Log once how long the remaining steps take."""
        left = self.total_steps - self.step
        if self.is_estimated or not left or self.step - self.first_step < ESTIMATE_AFTER:
            return
        self.is_estimated = True
        speed = self._settled_speed()
        seconds = speed.seconds / speed.steps
        message = "about %s left: %d steps of %.3g s (%s); validation and checkpoints come on top"
        logger.info(message, in_words(left * seconds), left, seconds, speed.short())

    def _settled_speed(self) -> Speed:
        """Return the speed without the first interval, if there are more."""
        return reduce(operator.add, self.speeds[1:] or self.speeds)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()  # the next message starts on a new line

    def finish(self) -> None:
        """Log the pending steps, the speed without the first interval, and the mean loss of the first and last steps
        (at most 50 each)."""
        self.flush()
        self.bar.close()
        if self.speeds:
            which = "without" if len(self.speeds) > 1 else "with"
            logger.info("speed, %s the first steps: %s", which, self._settled_speed())
        if self.guard.num_bad:
            logger.warning("warning: %d steps were skipped: loss or gradient was not finite", self.guard.num_bad)
        count = min(50, len(self.losses) // 2)
        if count >= 10:  # the loss of a single step depends more on its timestep than on the model
            first, last = fmean(self.losses[:count]), fmean(self.losses[-count:])
            logger.info("mean loss: %.4f over the first %d steps, %.4f over the last %d", first, count, last, count)


def _by_kind(loss: float, kept: KeptPart) -> dict[str, float]:
    """Return the mean losses of the samples trained on and of those for regularization, of the kinds in a step."""
    losses = {"loss": (loss - kept.loss) / (1 - kept.share)} if kept.share < 1 else {}
    return losses | ({"regularization_loss": kept.loss / (kept.share * kept.weight)} if kept.share > 0 else {})
