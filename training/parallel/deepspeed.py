"""DeepSpeed's ZeRO: optimizer states, gradients and weights are sharded over processes.

DeepSpeed clips, averages and accumulates as the loop does without it, and trained weights remain in float32 under
autocast. With bf16 weights (full fine-tuning only) it computes with these, and shards float32 copies that the
optimizer steps.

Source: https://arxiv.org/abs/1910.02054, ZeRO-Offload https://arxiv.org/abs/2101.06840.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, patch_environment
from diffusers import CogVideoXTransformer3DModel


def is_zero(accelerator: Accelerator) -> bool:
    """Return whether the run was launched with DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def has_sharded_weights(accelerator: Accelerator) -> bool:
    """Return whether each process holds only a shard of the weights."""
    return is_zero(accelerator) and accelerator.deepspeed_plugin.zero_stage == 3


def shard_only_transformer() -> None:
    """Let ZeRO-3 shard only the transformer: transformers would also shard the text encoders that it loads."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def use_gloo() -> None:
    """Make DeepSpeed use gloo on CPUs, instead of compiling its own kernels for minutes."""
    from deepspeed import ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def configure_zero(
    accelerator: Accelerator, *, is_rounded: bool, batch_size: int, accumulation: int, max_grad_norm: float
) -> None:
    """Complete DeepSpeed's configuration; called before `accelerator.prepare`.

    Args:
        is_rounded: compute with bf16 weights and step sharded float32 copies.
        batch_size: samples per process and backward pass.
        accumulation: backward passes per step.
    """
    config = accelerator.deepspeed_plugin.deepspeed_config
    config |= {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": batch_size * accumulation * accelerator.num_processes,
        "gradient_clipping": max_grad_norm,
        # Skip steps with non-finite gradients in bf16 too.
        "bf16": {"enabled": is_rounded, "check_grad_overflow": is_rounded},
        "fp16": {"enabled": False},
    }
    # As without DeepSpeed, which would accumulate and reduce gradients in bf16.
    config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    config.setdefault("communication_data_type", "fp32")
    # torch's fused AdamW works on the CPU too, and unlike DeepSpeed's need not be compiled.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    zero = config["zero_optimization"]
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
        if zero.get(key) == "auto":  # accelerate would look for a hidden_size in the model's config
            del zero[key]
    zero.setdefault("reduce_bucket_size", 50_000_000)  # DeepSpeed's default takes 2 GB in float32
    if torch.cuda.is_available():  # exchange gradients during the backward pass, as DeepSpeed does only in ZeRO-3
        zero.setdefault("overlap_comm", True)
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            zero[key].setdefault("pin_memory", torch.cuda.is_available())


def check_gradients(accelerator: Accelerator) -> None:
    """Make DeepSpeed skip steps with non-finite gradients in every precision; called after `accelerator.prepare`.

    ZeRO-3 always does; ZeRO-2 has a setting for bf16 only.
    """
    optimizer = accelerator.deepspeed_engine_wrapped.engine.optimizer
    if hasattr(optimizer, "check_grad_overflow"):
        optimizer.check_grad_overflow = True


@contextmanager
def gathered(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[None]:
    """Gather the model that accelerate wrapped on every process within the block; entered and left by all together."""
    if not has_sharded_weights(accelerator):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    # DeepSpeed's `unwrap_model_for_generation` keeps a hook that waits for the other processes.
    hooks = model.optimizer.parameter_offload
    with GatheredParameters(list(model.parameters())):
        hooks.destroy()
        try:
            yield
        finally:
            hooks.setup_zero_stage3_hooks()


def count_weights(transformer: CogVideoXTransformer3DModel) -> tuple[int, int]:
    """Return the numbers of trained and of all weights, sharded ones included."""
    parameters = list(transformer.parameters())
    if not hasattr(parameters[0], "ds_numel"):
        # diffusers counts packed 4-bit weights.
        return transformer.num_parameters(only_trainable=True), transformer.num_parameters()
    trained = [parameter.ds_numel for parameter in parameters if parameter.requires_grad]
    return sum(trained), sum(parameter.ds_numel for parameter in parameters)


def gather_zero_shards(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a weight if it is sharded, in float32 if the optimizer steps that; called on every process."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    is_divided = hasattr(tensor, "ds_id")
    if tensor.requires_grad and (is_divided or tensor.dtype != torch.float32):
        return safe_get_full_fp32_param(tensor)
    if not is_divided:
        return tensor
    with GatheredParameters([tensor]):
        return tensor.detach().clone()


@contextmanager
def errors_later(engine: torch.nn.Module) -> Iterator[None]:
    """Raise errors of writing only when DeepSpeed has finished saving, because other processes wait for this one."""
    writer = engine.checkpoint_engine
    problems: list[Exception] = []

    def save(state_dict: dict[str, Any], path: str) -> None:
        try:
            type(writer).save(writer, state_dict, path)
        except (OSError, RuntimeError) as error:
            problems.append(error)

    writer.save = save
    # It copies a script that merges the shards, which is not needed.
    engine._copy_recovery_script = lambda folder: None
    try:
        yield
    finally:
        del writer.save, engine._copy_recovery_script
    if problems:
        raise problems[0]


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """Allow only tensors, plain values and a few DeepSpeed classes in loaded files; by default all is unpickled."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    with patch_environment(torch_force_weights_only_load="1"), torch.serialization.safe_globals(allowed):
        yield
