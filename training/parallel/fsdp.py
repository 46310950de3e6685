"""Sharded weights (FSDP2, as accelerate sets it up): prepare, gather, save and load.

Source: https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
"""

import warnings
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


_OPTIMIZER_FOLDER = "optimizer"  # of a checkpoint
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def is_fsdp(accelerator: Accelerator) -> bool:
    """Return whether the weights are sharded, so that every pass needs all ranks."""
    return accelerator.distributed_type == DistributedType.FSDP


def prepare_sharded(
    accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, optimizer: Optimizer, dtype: torch.dtype
) -> tuple[CogVideoXTransformer3DModel, Optimizer]:
    """Shard the transformer and the optimizer's parameters as the launch configuration says.

    The results are those of one device. Full fine-tuning gathers weights in the compute dtype, as autocast would cast
    them anyway, except for the norms; otherwise they are gathered as they are. Gradients are averaged in float32.

    Args:
        transformer: on the CPU, with its trainable weights; changed in place.
    """
    trains_all = all(parameter.requires_grad for parameter in transformer.parameters())
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype if trains_all else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # it would also round the rotary embeddings
    )
    autocast_forward(transformer, accelerator.device, dtype)  # as accelerate does for unsharded weights
    # It is not changed in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    model, optimizer = accelerator.prepare(transformer, optimizer)
    # The name of its new, derived class would go into the saved config.
    type(transformer).__name__ = CogVideoXTransformer3DModel.__name__
    return model, optimizer


def gather_shards(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor if it is sharded; then it must be called on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Shard a tensor, which every rank has, as `other` is sharded, if it is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def detach_sharded(accelerator: Accelerator) -> list[tuple[torch.nn.Module, Optimizer]]:
    """Remove the model and its optimizer from what `accelerator.save_state` and `load_state` handle.

    These would write all weights, frozen ones too, and an index that is read by unpickling, which may run code.
    """
    optimizers = [optimizer.optimizer for optimizer in accelerator._optimizers]  # unwrapped
    sharded = list(zip(accelerator._models, optimizers, strict=True))
    accelerator._models, accelerator._optimizers = [], []
    return sharded


def save_optimizer(model: torch.nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Save each rank's states of Adam or AdamW as safetensors files in `folder`; called on every rank.

    Settings like the learning rate are not saved: they come from the flags. If a rank cannot write, all raise an
    OSError.
    """
    states = _tensors(get_optimizer_state_dict(model, optimizer, options=_FLAT))
    writer = HuggingFaceStorageWriter(str(folder / _OPTIMIZER_FOLDER), save_distributed=True)
    try:
        dcp.save(states, storage_writer=writer)
    except CheckpointException as error:  # not an Exception
        raise OSError(_reasons(error)) from error


def load_optimizer(model: torch.nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Load what `save_optimizer` wrote, on any number of ranks; called on every one.

    Raises an OSError or a ValueError if states are missing, damaged or of other weights.
    """
    settings = get_optimizer_state_dict(model, optimizer, options=_FLAT)  # creates the states too
    states = _tensors(settings)
    source = folder / _OPTIMIZER_FOLDER
    reader = HuggingFaceStorageReader(str(source))
    try:
        stored = reader.read_metadata().state_dict_metadata
        for name, state in states.items():
            # Missing files would silently leave parts unchanged.
            parts = stored[name].chunks if name in stored else []
            if sum(prod(part.sizes) for part in parts) != state.numel():
                raise ValueError(f"{source} lacks parts of {name}")
        dcp.load(states, storage_reader=reader)
    except (CheckpointException, SafetensorError) as error:
        reason = _reasons(error) if isinstance(error, CheckpointException) else str(error)
        raise ValueError(f"{source}: {reason}") from error
    set_optimizer_state_dict(model, optimizer, settings | states, options=_FLAT)


def _reasons(error: CheckpointException) -> str:
    """Return the errors of all ranks, without their tracebacks."""
    return "; ".join(dict.fromkeys(str(failure) for failure, _ in error.failures.values()))


def _tensors(state_dict: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}


def autocast_forward(transformer: CogVideoXTransformer3DModel, device: torch.device, dtype: torch.dtype) -> None:
    """Run the forward pass under autocast and return float32, as accelerate does for unsharded weights."""
    if dtype != torch.float32:
        autocast = torch.autocast(device.type, dtype, cache_enabled=False)
        transformer.forward = convert_outputs_to_fp32(autocast(transformer.forward))
