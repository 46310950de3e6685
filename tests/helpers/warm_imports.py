"""The imports of training and preparation, done once in the server that `forked_ranks` forks from."""

import gc
import sys
from importlib import import_module

from common.startup import unused_libraries


for name in unused_libraries({}):
    sys.modules[name] = None  # diffusers and accelerate would spend seconds on them
for name in ("run.finetune", "preparation.prepare", "prepare_dataset"):
    import_module(name)
for name in ("pipeline_cogvideox", "pipeline_cogvideox_image2video"):
    import_module(f"diffusers.pipelines.cogvideo.{name}")
gc.collect()
gc.freeze()  # a run collects garbage several times
