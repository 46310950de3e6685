"""Load the transformer, make it trainable, wrap it for the launch, and build or resume its optimizer."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers import CogVideoXTransformer3DModel
from diffusers.training_utils import EMAModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from checkpoints.folder import checkpoint_only_what_trains, load_checkpoint
from memory.activations import CheckpointStore, checkpoint_activations
from memory.block_streaming import stream_blocks
from models.attention import set_attention
from models.compilation import compile_blocks
from models.configs import CPU, precision_warning
from optimizers.averages import averaged_weights, schedule_free_weights
from optimizers.build import apply_learning_rate, build_optimizer, keep_rates_on_host
from parallel.deepspeed import check_gradients, configure_zero, has_sharded_weights, is_zero
from parallel.fsdp import autocast_forward, is_fsdp, prepare_sharded
from run.spec import RunSpec


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainable:
    """The transformer with its optimizer, learning-rate schedule and averaged weights."""

    transformer: CogVideoXTransformer3DModel
    model: torch.nn.Module  # the transformer as accelerate wrapped it
    parameters: Sequence[torch.nn.Parameter]
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    ema: EMAModel | None  # of the trainable parameters
    is_schedule_free: bool = False  # the optimizer keeps the average

    def end_step(self, accelerator: Accelerator) -> float:
        """Advance the learning-rate schedule and the averaged weights; return the step's learning rate."""
        rate = float(self.lr_scheduler.get_last_lr()[0])
        # Steps skipped for their gradients count, as under any launch; those in which fp16 adjusts its scale do not.
        if accelerator.scaler is None or not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        return rate

    def averaged(self) -> AbstractContextManager[None]:
        """Replace the trained weights by their average, if there is one, within a `with` statement."""
        if self.is_schedule_free:
            return schedule_free_weights(self.optimizer, self.parameters)
        return averaged_weights(self.ema, self.parameters)


def make_trainable(spec: RunSpec, total_steps: int) -> Trainable:
    """Load the transformer, make it trainable and wrap it for the launch."""
    settings, accelerator = spec.settings, spec.accelerator
    set_seed(spec.state.seed)  # for the adapters' initial weights
    transformer = load_transformer(spec)
    spec.coordinator.wait()  # machines download and read at different speeds; the following collectives can time out
    optimizer, lr_scheduler = build_optimizer(
        settings, trainable_of(transformer), spec.learning_rate, total_steps, fused=spec.dtype != torch.float16
    )
    if settings.optimizer.use_torchao:
        logger.info("torchao compiles its optimizer in the first step, which takes up to some minutes")
    model, optimizer = wrap(spec, transformer, optimizer)
    parameters = trainable_of(transformer)  # again, because sharding may have replaced them
    keep_rates_on_host(optimizer)
    # The decay is reached after about 10 / (1 - decay) steps.
    ema = EMAModel(parameters, decay=settings.objective.ema_decay) if settings.objective.use_ema else None
    # Not prepared, because accelerate would step it once per process instead of once per optimizer step.
    accelerator.register_for_checkpointing(lr_scheduler)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    checkpoint_only_what_trains(accelerator, spec.method)
    is_schedule_free = settings.optimizer.optimizer == "schedulefree"
    return Trainable(transformer, model, parameters, optimizer, lr_scheduler, ema, is_schedule_free)


def load_transformer(spec: RunSpec) -> CogVideoXTransformer3DModel:
    """Load the transformer and prepare it for the task, the method, and the flags on memory and speed."""
    settings, accelerator, source, dtype = spec.settings, spec.accelerator, spec.source, spec.dtype
    memory, speed = settings.memory, settings.speed
    # Streamed or sharded weights need not fit onto the device in full.
    unsharded = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
    fits = accelerator.distributed_type in unsharded and not has_sharded_weights(accelerator)
    device = accelerator.device if fits and not memory.stream_blocks else CPU
    transformer = source.load_transformer(spec.method.base_dtype(dtype), device=device, quantize=memory.quantize_base)
    if dtype == torch.float16 and (warning := precision_warning(dtype, source.native_dtype())):
        logger.warning("warning: %s", warning)
    spec.task.prepare_model(transformer)
    spec.method.attach(transformer)
    set_attention(transformer, speed.attention_backend, spec.context)
    store = CheckpointStore() if memory.offload_checkpoints else None
    scope, every = memory.checkpoint_scope, memory.checkpoint_every
    if memory.stream_blocks:
        stream_blocks(transformer, accelerator.device, store, scope=scope, every=every)
    elif memory.gradient_checkpointing:
        checkpoint_activations(transformer, scope, every, store)
    if spec.context is not None:
        spec.context.divide(transformer)
    if speed.compile:
        compile_blocks(transformer, num_sizes=len(spec.sizes))
        logger.info("the blocks are compiled when they are first used: a minute or so for each size of clips")
    return transformer


def trainable_of(transformer: CogVideoXTransformer3DModel) -> list[torch.nn.Parameter]:
    """Return the trainable parameters."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def wrap(
    spec: RunSpec, transformer: CogVideoXTransformer3DModel, optimizer: Optimizer
) -> tuple[torch.nn.Module, Optimizer]:
    """Have accelerate wrap transformer and optimizer for the launch."""
    settings, accelerator = spec.settings, spec.accelerator
    if is_fsdp(accelerator):
        return prepare_sharded(accelerator, transformer, optimizer, spec.dtype)
    if not is_zero(accelerator):
        return accelerator.prepare(transformer, optimizer)
    configure_zero(
        accelerator,
        is_rounded=settings.memory.weights_dtype == "bf16",
        batch_size=settings.training.train_batch_size,
        accumulation=settings.training.gradient_accumulation_steps,
        max_grad_norm=settings.optimizer.max_grad_norm,
    )
    autocast_forward(transformer, accelerator.device, spec.dtype)
    prepared = accelerator.prepare(transformer, optimizer)
    check_gradients(accelerator)
    return prepared


def resume(spec: RunSpec, trainable: Trainable) -> None:
    """Load the checkpoint; continue at the learning rate of the flags, or at the checkpoint's if none is passed."""
    load_checkpoint(spec.accelerator, spec.resumed)
    before = trainable.lr_scheduler.base_lrs[0]
    is_given = "learning_rate" in spec.settings.given or spec.settings.schedule.scale_lr
    rate = spec.learning_rate if is_given else before
    if rate != before:
        logger.info("--learning_rate: the run continues at a base rate of %g, after %g", rate, before)
    apply_learning_rate(trainable.optimizer, trainable.lr_scheduler, rate)
    if trainable.ema is not None:
        trainable.ema.to(spec.accelerator.device)
        trainable.ema.decay = spec.settings.objective.ema_decay  # may differ from the checkpoint's
    logger.info("resumed from %s at learning rate %g", spec.resumed, trainable.lr_scheduler.get_last_lr()[0])
