"""DeepSpeed's ZeRO: a run's optimizer states, gradients and weights divided among processes.

What a step is, stays: DeepSpeed clips, averages and accumulates as the loop does without it. What is trained remains
in float32, under autocast, as in one process. With weights in bf16, of full fine-tuning alone, DeepSpeed computes with
these and divides float32 ones among the processes, which the optimizer steps.

Source: https://arxiv.org/abs/1910.02054, ZeRO-Offload https://arxiv.org/abs/2101.06840.
"""

import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import CogVideoXTransformer3DModel

from common.errors import first_line
from common.ranks import launch_rank


_REDUCE_BUCKET = 50_000_000  # gradients that are exchanged at once; DeepSpeed's own buckets take 2 GB in float32


def is_zero(accelerator: Accelerator) -> bool:
    """Whether the run was launched with DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def has_divided_weights(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights only."""
    return is_zero(accelerator) and accelerator.deepspeed_plugin.zero_stage == 3


def keep_others_whole() -> None:
    """Let ZeRO-3 divide the transformer alone: transformers would divide every model that it loads, text encoders too,
    and nothing would put these together again."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def exchange_by_gloo() -> None:
    """Let DeepSpeed exchange tensors on CPUs as torch does: it would compile kernels of its own first, for minutes."""
    from deepspeed import ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def configure_zero(
    accelerator: Accelerator, *, is_rounded: bool, batch_size: int, accumulation: int, max_grad_norm: float
) -> None:
    """Complete DeepSpeed's configuration; called before `accelerator.prepare`.

    Args:
        is_rounded: compute with weights in bf16 and step float32 ones, of which each process has a part.
        batch_size: samples of a process in a backward pass.
        accumulation: backward passes in a step.
        max_grad_norm: to clip gradients to; 0 leaves them.
    """
    config = accelerator.deepspeed_plugin.deepspeed_config
    config |= {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": batch_size * accumulation * accelerator.num_processes,
        "gradient_clipping": max_grad_norm,
        # A step whose gradients are not finite is skipped, in bf16 too.
        "bf16": {"enabled": is_rounded, "check_grad_overflow": is_rounded},
        "fp16": {"enabled": False},
    }
    # As without DeepSpeed; it would add up and exchange gradients in bf16.
    config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    config.setdefault("communication_data_type", "fp32")
    # torch's fused AdamW steps on the CPU too, and need not be compiled first as DeepSpeed's does.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    zero = config["zero_optimization"]
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
        if zero.get(key) == "auto":  # accelerate would look for a hidden_size in the model's config
            del zero[key]
    zero.setdefault("reduce_bucket_size", _REDUCE_BUCKET)
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            zero[key].setdefault("pin_memory", torch.cuda.is_available())


def look_at_gradients(accelerator: Accelerator) -> None:
    """Have DeepSpeed skip a step whose gradients are not finite in every precision; called after
    `accelerator.prepare`.

    ZeRO-3 does so anyway; ZeRO-2 only has a setting for bf16.
    """
    optimizer = accelerator.deepspeed_engine_wrapped.engine.optimizer
    if hasattr(optimizer, "check_grad_overflow"):
        optimizer.check_grad_overflow = True


@contextmanager
def gathered(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[None]:
    """Have the whole transformer on every process meanwhile, to be called by each as it likes; entered and left by all
    of them together.

    Args:
        model: as accelerate wrapped it.
    """
    if not has_divided_weights(accelerator):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    # DeepSpeed's own `unwrap_model_for_generation` leaves a hook in place that waits for the other processes.
    hooks = model.optimizer.parameter_offload
    with GatheredParameters(list(model.parameters())):
        hooks.destroy()
        try:
            yield
        finally:
            hooks.setup_zero_stage3_hooks()


def count_weights(transformer: CogVideoXTransformer3DModel) -> tuple[int, int]:
    """How many weights are trained, and how many there are, wherever they are."""
    if any(hasattr(parameter, "ds_numel") for parameter in transformer.parameters()):
        sizes = [(parameter.ds_numel, parameter.requires_grad) for parameter in transformer.parameters()]
        return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    # Weights in 4 bits share bytes.
    return transformer.num_parameters(only_trainable=True), transformer.num_parameters()


def gather_zero_weights(
    transformer: CogVideoXTransformer3DModel, names: Iterable[str], is_main: bool
) -> dict[str, torch.Tensor]:
    """The weights of those names, on the CPU of the main process: in float32 where that is what the optimizer steps.

    Called on every process.
    """
    state = transformer.state_dict(keep_vars=True)
    weights = {}
    for name in names:
        whole = _gather(state[name])
        if is_main:
            # A copy: DeepSpeed keeps weights as pieces of one long tensor, which safetensors does not write.
            weights[name] = whole.detach().to("cpu", copy=True)
    return weights


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    is_divided = hasattr(tensor, "ds_id")
    if tensor.requires_grad and (is_divided or tensor.dtype != torch.float32):
        return safe_get_full_fp32_param(tensor)
    if is_divided:
        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def save_zero_state(accelerator: Accelerator, folder: Path) -> None:
    """Save each process's part, without what is frozen; called on every process.

    Raises:
        OSError, RuntimeError: it cannot be written.
    """
    with errors_later(accelerator.deepspeed_engine_wrapped.engine):
        accelerator.save_state(str(folder), exclude_frozen_parameters=True, save_latest=False)


@contextmanager
def errors_later(engine: torch.nn.Module) -> Iterator[None]:
    """Raise what is in the way of a process's file when DeepSpeed is done saving, where others wait for it."""
    writer = engine.checkpoint_engine
    problems: list[Exception] = []

    def save(state_dict: dict[str, Any], path: str) -> None:
        try:
            type(writer).save(writer, state_dict, path)
        except (OSError, RuntimeError) as error:
            problems.append(error)

    writer.save = save
    # Scripts that make whole weights of the parts; these are written beside them anyway.
    engine._copy_recovery_script = lambda folder: None
    try:
        yield
    finally:
        del writer.save, engine._copy_recovery_script
    if problems:
        raise problems[0]


def load_zero_state(accelerator: Accelerator, folder: Path) -> None:
    """Load what `save_zero_state` wrote; called on every process, and as many of them.

    Raises:
        ValueError: it is of something else, or damaged.
    """
    engine = accelerator.deepspeed_engine_wrapped.engine
    # DeepSpeed takes this from the checkpoint, but it may change on the way.
    max_grad_norm = engine.optimizer.clip_grad
    try:
        with weights_only_loads():
            accelerator.load_state(str(folder), load_module_strict=False)
    except (RuntimeError, AssertionError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise ValueError(f"rank {launch_rank()}: {reason}") from error
    engine.optimizer.clip_grad = max_grad_norm


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """Have torch build nothing from a file but tensors, plain values and these few of DeepSpeed's own classes, where
    DeepSpeed would unpickle anything."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before
