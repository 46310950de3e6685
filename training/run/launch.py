"""Start a run as the launcher configured it: devices, precision, process group, logging."""

import logging
import random
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, ProjectConfiguration

from common.errors import UserError
from common.logs import start_logging
from common.ranks import launch_size, precision_of, uses_deepspeed
from flags.settings import TrainingSettings
from parallel.deepspeed import has_sharded_weights, shard_only_transformer, use_gloo


logger = logging.getLogger(__name__)


def start_accelerator(settings: TrainingSettings) -> Accelerator:
    """Set up devices, precision and process group from the flags and the launch configuration.

    Raises:
        UserError: the precision asked for does not exist on this device.
    """
    precision = precision_of(settings.training.mixed_precision)
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16: needs a GPU; use bf16 or no on a CPU")
    if precision == "fp8":
        raise UserError("--mixed_precision: the accelerate config says fp8, which is not supported; give bf16")
    # Naming a backend makes accelerate look for a process group, which one process has under DeepSpeed alone.
    backend = None if launch_size() == 1 and not uses_deepspeed() else "nccl" if torch.cuda.is_available() else "gloo"
    if uses_deepspeed() and backend == "gloo":
        use_gloo()
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.training.gradient_accumulation_steps,
        mixed_precision=settings.training.mixed_precision,
        log_with=None if settings.tracking.report_to == "none" else settings.tracking.report_to,
        project_config=ProjectConfiguration(
            project_dir=settings.training.output_dir,
            logging_dir=str(Path(settings.training.output_dir, settings.tracking.logging_dir)),
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend, timeout=timedelta(seconds=settings.training.nccl_timeout)),
            # The cache would keep half-precision copies of all float32 weights until the forward pass is done, in case
            # that one is used again; none is.
            AutocastKwargs(cache_enabled=False),
        ],
    )
    start_logging()
    if has_sharded_weights(accelerator):
        shard_only_transformer()
    torch.backends.cuda.matmul.allow_tf32 = settings.speed.allow_tf32
    return accelerator


def choose_seed(seed: int | None) -> int:
    """The seed given, or a random one."""
    if seed is not None:
        return seed
    drawn = random.SystemRandom().randrange(2**31)
    logger.info("seed %d (none was given)", drawn)
    return drawn
