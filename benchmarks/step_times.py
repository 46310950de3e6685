"""Run any training script that steps a torch optimizer, and append its speed and memory to a file as a line of JSON.

    STARTED=$(date +%s.%N) python benchmarks/step_times.py FILE NAME SCRIPT [FLAGS]

peers.md uses it to compare our scripts with others. STARTED is when the clock of the complete run started.
"""

import json
import os
import resource
import runpy
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


WARM_UP = 10  # steps


def main() -> None:
    """Run the script in this process as if it had been started itself."""
    file, name, script, *flags = sys.argv[1:]
    times, cpu_times, started = [], [], float(os.environ["STARTED"])

    def note(*_: object) -> None:
        times.append(time.time())
        cpu_times.append(time.process_time())

    hook = register_optimizer_step_post_hook(note)
    if not torch.cuda.is_available():
        # The original factory calls these without asking for a GPU.
        torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda *_: None
        torch.cuda.reset_accumulated_memory_stats = lambda *_: None
    sys.argv = [script, *flags]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    hook.remove()
    figures = {
        "name": name,
        "steps": len(times),
        "steps/s": 1 / median_step(times),
        "CPU seconds a step": median_step(cpu_times),  # other programs on the machine change it little
        "seconds to the first step": times[0] - started,
        "seconds after the last step": time.time() - times[-1],
        "seconds from launch to LoRA": time.time() - started,
        "CPU seconds": time.process_time(),
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    with Path(file).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(figures) + "\n")


def median_step(times: list[float]) -> float:
    """Return the median time between steps."""
    return statistics.median(after - before for before, after in pairwise(times[WARM_UP:]))


if __name__ == "__main__":
    main()
