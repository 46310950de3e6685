"""Record a profile of some steps on CPU and GPU."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule


logger = logging.getLogger(__name__)

SKIPPED, WARM_UP, RECORDED = 3, 1, 3  # steps: compilation and first allocations; the profiler's own; the trace
PROFILE_FOLDER = "profile"


@contextmanager
def profiled(folder: Path | None, first_step: int = 0) -> Iterator[Callable[[], None]]:
    """Record some steps after the first `first_step`, and log where the trace is; yield a function that ends a step.

    `folder` is for the trace, on the one rank that records; None records nothing.
    """
    if folder is None:
        yield lambda: None
        return
    written = []

    def write(profiler: profile) -> None:
        first, last = first_step + SKIPPED + WARM_UP + 1, first_step + profiler.step_num
        path = folder / f"steps-{first}-{last}.json.gz"
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        written.append(path)
        logger.info("profile of steps %d to %d: %s; open it at https://ui.perfetto.dev", first, last, path)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    steps = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=RECORDED, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
    if not written:
        needed = SKIPPED + WARM_UP + RECORDED
        logger.warning("warning: --profile: nothing was recorded; it takes at least %d steps", needed)
