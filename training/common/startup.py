"""Set-up between reading the flags and importing the heavy libraries."""

import atexit
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from common.ranks import forget_stray_ranks, launch_rank, uses_deepspeed
from common.signals import follow_launcher


@contextmanager
def heavy_imports(flags: Mapping[str, Any], *, owns_process: bool) -> Iterator[None]:
    """Announce the imports in a `with` statement, silence known noise of libraries, and hide stray ranks from them.

    Args:
        flags: those of a script, by name.
        owns_process: nothing else will run in this process, such as another script with other flags. Then unused
            libraries are skipped.
    """
    forget_stray_ranks()
    announce("loading PyTorch and diffusers")
    quiet_libraries()
    configure_allocator()
    if owns_process:
        follow_launcher()
        for name in unused_libraries(flags):
            sys.modules.setdefault(name, None)  # makes Python report it as not installed
    was_collecting = gc.isenabled()
    gc.disable()  # imports make millions of objects and almost no garbage: a quarter of their time to look for it
    try:
        yield
    finally:
        if owns_process:
            gc.freeze()  # later collections need not look at modules
            atexit.register(gc.unfreeze)  # otherwise libraries that count their objects at exit report leaks
        if was_collecting:
            gc.enable()


def announce(what: str) -> None:
    """Say what takes a while now, on the first rank, before logging is set up."""
    if launch_rank() == 0:
        print(f"{what} ...", file=sys.stderr, flush=True)


def configure_allocator() -> None:
    """Let torch's allocator on a GPU extend its segments, which avoids most fragmentation; read when CUDA starts."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second one is that of torch before 2.9
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def unused_libraries(flags: Mapping[str, Any]) -> list[str]:
    """Return the optional libraries that diffusers, transformers, peft and accelerate would import without need.

    Skipping them makes a start about a third faster.
    """
    is_left_to_card = flags.get("gradient_checkpointing") is False and _has_gpu_driver()
    is_set_later = flags.get("auto_fit") or flags.get("memory_budget_gb") or is_left_to_card
    quantization = flags.get("quantize_base")
    of_torchao = ("use_torchao", "use_4bit", "use_fp8", "use_cpu_offload_optimizer", "text_encoder_8bit")
    is_8bit_of_bitsandbytes = flags.get("use_8bit") and not flags.get("use_torchao")
    uses = {
        "bitsandbytes": is_set_later or is_8bit_of_bitsandbytes or quantization == "nf4",
        "torchao": is_set_later or any(map(flags.get, of_torchao)) or quantization not in (None, "none"),
        "deepspeed": uses_deepspeed(),
        # transformers imports these for object detectors and assisted generation, accelerate the last for SageMaker.
        "scipy": False,
        "sklearn": False,
        "boto3": False,
    }
    return [name for name, is_used in uses.items() if not is_used]


def quiet_libraries() -> None:
    """Silence known noise of libraries; called before they are imported."""
    from common import bars  # noqa: F401  # its settings also apply to the bars of libraries

    for name in (
        "torch.utils._pytree",  # torchao registers its enums in a way that torch deprecates
        "diffusers.quantizers.torchao.torchao_quantizer",  # looks for classes that newer torchao moved
        "torch.utils.cpp_extension",  # a compiler without a GPU
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers passes it for every hub model
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")  # torchao's states, when compiled
    if not _has_gpu_driver():
        # DeepSpeed warns that it has to guess.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # If this is set, tokenizers do not warn when data workers fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _has_gpu_driver() -> bool:
    return any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg")))  # Linux, WSL
