"""Measure throughput: samples and tokens a second, seconds of each phase of a step, share of the GPU's peak."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from data.buckets import Bucket, count_tokens
from tracking.flops import count_flops, peak_tflops


PHASES = ("data", "forward", "backward", "optimizer")


class PhaseTimer:
    """A timer of the phases of a step that does not make the device wait.

    On a GPU a phase lasts from its first to its last operation there: a phase that waits for the CPU is long, one that
    the CPU queued while the GPU was busy is short.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: Counter[str] = Counter()
        self.pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body of a `with` statement."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - start
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.pending.append((name, start, end))

    def read(self) -> Counter[str]:
        """Return the seconds of each phase since the last call; on a GPU the timed operations must have ended."""
        for name, start, end in self.pending:
            self.seconds[name] += start.elapsed_time(end) / 1000
        self.pending.clear()
        seconds, self.seconds = self.seconds, Counter()
        return seconds


@dataclass(frozen=True)
class Speed:
    """Work of some steps and the time it took."""

    steps: int
    seconds: float
    samples: int  # on all devices
    tokens: int  # on all devices
    phases: Counter[str]  # seconds of each, on this device
    tflops: float  # on this device
    peak_tflops: float | None

    def __add__(self, other: "Speed") -> "Speed":
        sums = ("steps", "seconds", "samples", "tokens", "phases", "tflops")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in sums})

    def values(self) -> dict[str, float]:
        """Return the values for trackers, by name."""
        values = {
            "samples_per_second": self.samples / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "step_seconds": self.seconds / self.steps,
            **{f"{name}_seconds": self.phases[name] / self.steps for name in PHASES},
            "tflops_per_second": self.tflops / self.seconds,
        }
        if self.peak_tflops is not None:
            values["peak_percent"] = 100 * values["tflops_per_second"] / self.peak_tflops
        return values

    def short(self) -> str:
        """Format the speed and the share of the peak."""
        values = self.values()
        peak = f" ({values['peak_percent']:.0f}%)" if "peak_percent" in values else ""
        return f"{values['samples_per_second']:.3g} samples/s, {values['tflops_per_second']:.3g} TFLOP/s{peak}"

    def __str__(self) -> str:
        values = self.values()
        split = ", ".join(f"{name} {values[f'{name}_seconds']:.3f}" for name in PHASES)
        peak = f", {values['peak_percent']:.0f}% of the card's peak" if "peak_percent" in values else ""
        return (
            f"{values['samples_per_second']:.3g} samples/s, {values['tokens_per_second']:,.0f} tokens/s; "
            f"{values['step_seconds']:.3f} s a step: {split}; {values['tflops_per_second']:.3g} TFLOP/s{peak}"
        )


class Throughput:
    """Counts the work of a run and times it between two calls of `read`.

    Args:
        config: the transformer's.
        num_ranks: that have different samples.
        dtype: of the networks' computations; the peak is known for half precision only.
        devices_per_sample: that share the tokens of a sample.
        flops_settings: for `count_flops`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        device: torch.device,
        num_ranks: int,
        dtype: torch.dtype,
        *,
        devices_per_sample: int = 1,
        **flops_settings: Any,
    ):
        self.config = config
        self.num_ranks = num_ranks
        self.devices_per_sample = devices_per_sample
        self.flops_settings = flops_settings
        known = device.type == "cuda" and dtype != torch.float32
        self.peak = peak_tflops(torch.cuda.get_device_name(device)) if known else None
        self.timer = PhaseTimer(device)
        self.start: float | None = None
        self.samples = self.tokens = 0
        self.flops = 0.0
        self.latest: Speed | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one of `PHASES`; the clock starts with the first phase after a `read`."""
        if self.start is None:
            self.start = time.perf_counter()
        with self.timer.phase(name):
            yield

    def count(self, bucket: Bucket, samples: int) -> None:
        """Note a batch."""
        self.samples += samples
        self.tokens += samples * count_tokens(self.config, bucket)
        self.flops += samples * self.flops_of(bucket)

    def flops_of(self, bucket: Bucket) -> float:
        """Return the operations of a training step on one device, for one sample."""
        flops = count_flops(self.config, count_tokens(self.config, bucket), **self.flops_settings)
        return flops / self.devices_per_sample

    def read(self, steps: int) -> Speed:
        """Return the speed of the `steps` (at least 1) since the last call; the device must have finished them."""
        seconds, tflops = time.perf_counter() - self.start, self.flops / 1e12
        samples, tokens = self.samples * self.num_ranks, self.tokens * self.num_ranks
        speed = Speed(steps, seconds, samples, tokens, self.timer.read(), tflops, self.peak)
        self.start, self.samples, self.tokens, self.flops = None, 0, 0, 0.0
        self.latest = speed
        return speed
