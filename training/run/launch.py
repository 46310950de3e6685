"""Start a run as the launcher configured it: devices, precision, process group, logging."""

import logging
import random
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from common.errors import UserError
from common.logs import start_logging
from common.ranks import launch_size, precision_of, uses_deepspeed
from flags.tracking import TrackingFlags
from flags.training import TrainingFlags
from parallel.deepspeed import has_sharded_weights, shard_only_transformer, use_gloo


logger = logging.getLogger(__name__)


def start_accelerator(training: TrainingFlags, tracking: TrackingFlags, *, allow_tf32: bool) -> Accelerator:
    """Set up devices, precision and process group; raise a UserError if the device does not support the precision."""
    precision = precision_of(training.mixed_precision)
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16: needs a GPU; use bf16 or no on a CPU")
    if precision == "fp8":
        raise UserError("--mixed_precision: the accelerate config says fp8, which is not supported; pass bf16")
    # With a backend, accelerate looks for a process group, which a single process has only under DeepSpeed.
    backend = None if launch_size() == 1 and not uses_deepspeed() else "nccl" if torch.cuda.is_available() else "gloo"
    if uses_deepspeed() and backend == "gloo":
        use_gloo()
    accelerator = Accelerator(
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        mixed_precision=training.mixed_precision,
        log_with=None if tracking.report_to == "none" else tracking.report_to,
        project_config=ProjectConfiguration(
            project_dir=training.output_dir, logging_dir=str(Path(training.output_dir, tracking.logging_dir))
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend, timeout=timedelta(seconds=training.nccl_timeout)),
            # The cache would keep half-precision copies of all float32 weights until the end of the forward pass,
            # although each weight is used only once.
            AutocastKwargs(cache_enabled=False),
            # The gradients are in the buckets that the ranks exchange, instead of copied to them.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    start_logging()
    if has_sharded_weights(accelerator):
        shard_only_transformer()
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    return accelerator


def choose_seed(seed: int | None) -> int:
    """Return the seed that was passed, or a random one."""
    if seed is not None:
        return seed
    drawn = random.SystemRandom().randrange(2**31)
    logger.info("seed %d (none was given)", drawn)
    return drawn
