"""Run a training script, perhaps several times, on weights in shards without a GPU: `fsdp_on_cpu.py runs.json`.

accelerate takes FSDP for GPUs alone. torch does not: here accelerate is told that its processes on CPUs are such ones.
The file holds a list of runs: the name of the script and its flags.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

from repository import TRAINING


def take_cpus_for_gpus() -> None:
    """Have accelerate set up FSDP as it does on GPUs."""
    initialize = state.AcceleratorState.__init__

    def initialize_sharded(self: state.AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        is_first = not self._shared_state
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if is_first and fsdp_plugin is not None:
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = initialize_sharded


def main() -> None:
    sys.path.insert(0, str(TRAINING))
    take_cpus_for_gpus()
    # One process group for all runs: gloo does not find its peers a second time.
    state.PartialState.destroy_process_group = lambda self, group=None: None
    for script, flags in json.loads(Path(sys.argv[1]).read_text()):
        importlib.import_module(script).main(flags)
        state.AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main()
