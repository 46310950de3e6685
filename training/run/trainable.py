"""The transformer and what changes it: loaded, made trainable, wrapped for the launch, resumed."""

import argparse
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate.utils import DistributedType, set_seed
from diffusers import CogVideoXTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from checkpoints.folder import checkpoint_only_what_trains, load_checkpoint
from common.ranks import uses_deepspeed
from memory.activations import CheckpointStore, checkpoint_activations
from memory.block_streaming import stream_blocks
from models.attention import set_attention
from models.compilation import compile_blocks
from models.configs import CPU, precision_warning
from optimizers.averages import averaged_weights, make_ema, schedule_free_weights
from optimizers.build import apply_learning_rate, keep_rates_on_host, make_optimizer
from parallel.deepspeed import check_gradients, configure_zero, has_sharded_weights, is_zero
from parallel.fsdp import autocast_forward, is_fsdp, prepare_sharded
from run.spec import RunSpec


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainable:
    """The transformer and what changes it."""

    transformer: CogVideoXTransformer3DModel
    model: torch.nn.Module  # the transformer as accelerate wrapped it
    parameters: Sequence[torch.nn.Parameter]
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    ema: EMAModel | None  # of the trainable parameters
    is_schedule_free: bool = False  # the optimizer keeps an average itself

    def averaged(self) -> AbstractContextManager[None]:
        """Puts the average in the place of the trained weights meanwhile, if there is one."""
        if self.is_schedule_free:
            return schedule_free_weights(self.optimizer, self.parameters)
        return averaged_weights(self.ema, self.parameters)


def make_trainable(spec: RunSpec, total_steps: int) -> Trainable:
    """Load the transformer, make it trainable and wrap it for the launch."""
    args, accelerator = spec.args, spec.accelerator
    set_seed(spec.state.seed)  # the adapters' initial weights
    transformer = load_transformer(spec)
    spec.coordinator.wait()  # machines download and read at their own pace; what follows is timed
    optimizer, lr_scheduler = build_optimizer(
        args,
        trainable_of(transformer),
        learning_rate_of(args, spec.num_data_ranks),
        total_steps,
        has_scaler=spec.dtype == torch.float16,
    )
    if args.use_torchao:
        logger.info("torchao compiles its optimizer in the first step, which takes up to some minutes")
    model, optimizer = wrap(spec, transformer, optimizer)
    parameters = trainable_of(transformer)  # not as above: shards may have taken their place
    keep_rates_on_host(optimizer)
    ema = make_ema(parameters, args.ema_decay) if args.use_ema else None
    # Not prepared: accelerate would step it once per process. Here a step is an optimizer step, on any ranks.
    accelerator.register_for_checkpointing(lr_scheduler)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    checkpoint_only_what_trains(accelerator, spec.method)
    return Trainable(transformer, model, parameters, optimizer, lr_scheduler, ema, args.optimizer == "schedulefree")


def load_transformer(spec: RunSpec) -> CogVideoXTransformer3DModel:
    """Load the transformer as task and method want it."""
    args, accelerator, source, dtype = spec.args, spec.accelerator, spec.source, spec.dtype
    # Weights that are streamed or divided among ranks need not fit onto the device as a whole.
    whole = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
    is_whole = accelerator.distributed_type in whole and not has_sharded_weights(accelerator)
    transformer = source.load_transformer(
        spec.method.base_dtype(dtype),
        device=accelerator.device if is_whole and not args.stream_blocks else CPU,
        quantize=args.quantize_base,
    )
    if dtype == torch.float16 and (warning := precision_warning(dtype, source.native_dtype())):
        logger.warning("warning: %s", warning)
    spec.task.prepare_model(transformer)
    spec.method.attach(transformer)
    store = CheckpointStore() if args.offload_checkpoints else None
    if args.stream_blocks:
        stream_blocks(transformer, accelerator.device, store)
    elif args.gradient_checkpointing:
        checkpoint_activations(transformer, args.checkpoint_scope, args.checkpoint_every, store)
    set_attention(transformer, args.attention_backend, spec.context)
    if spec.context is not None:
        spec.context.divide(transformer)
    if args.compile:
        compile_blocks(transformer, num_sizes=len(spec.sizes))
        logger.info("the blocks are compiled when they are first used: a minute or so for each size of clips")
    return transformer


def trainable_of(transformer: CogVideoXTransformer3DModel) -> list[torch.nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def wrap(
    spec: RunSpec, transformer: CogVideoXTransformer3DModel, optimizer: Optimizer
) -> tuple[torch.nn.Module, Optimizer]:
    """Have accelerate wrap transformer and optimizer for the launch."""
    args, accelerator = spec.args, spec.accelerator
    if is_fsdp(accelerator):
        return prepare_sharded(accelerator, transformer, optimizer, spec.dtype)
    if not is_zero(accelerator):
        return accelerator.prepare(transformer, optimizer)
    configure_zero(
        accelerator,
        is_rounded=args.weights_dtype == "bf16",
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm,
    )
    autocast_forward(transformer, accelerator.device, spec.dtype)
    prepared = accelerator.prepare(transformer, optimizer)
    check_gradients(accelerator)
    return prepared


def resume(spec: RunSpec, trainable: Trainable) -> None:
    """Go on where the checkpoint is, at the learning rate given now, or at that of before where none is given."""
    load_checkpoint(spec.accelerator, spec.resumed)
    before = trainable.lr_scheduler.base_lrs[0]
    is_given = "learning_rate" in spec.args.given or spec.args.scale_lr
    rate = learning_rate_of(spec.args, spec.num_data_ranks) if is_given else before
    if rate != before:
        logger.info("--learning_rate: the run goes on at a base rate of %g, after %g", rate, before)
    apply_learning_rate(trainable.optimizer, trainable.lr_scheduler, rate)
    if trainable.ema is not None:
        trainable.ema.to(spec.accelerator.device)
        trainable.ema.decay = spec.args.ema_decay  # may change on the way, as the learning rate may
    logger.info("resumed from %s at learning rate %g", spec.resumed, trainable.lr_scheduler.get_last_lr()[0])


def learning_rate_of(args: argparse.Namespace, num_data_ranks: int) -> float:
    """The learning rate given, scaled to the samples in a step if that was asked for."""
    scale = args.gradient_accumulation_steps * args.train_batch_size * num_data_ranks if args.scale_lr else 1
    return args.learning_rate * scale


def build_optimizer(
    args: argparse.Namespace,
    parameters: Sequence[torch.nn.Parameter],
    learning_rate: float,
    total_steps: int,
    *,
    has_scaler: bool,
) -> tuple[Optimizer, LRScheduler]:
    """Build the optimizer and its learning-rate schedule, counted in optimizer steps."""
    optimizer = make_optimizer(
        parameters,
        args.optimizer,
        learning_rate=learning_rate,
        beta1=args.beta1,
        beta2=args.beta2,
        beta3=args.beta3,
        weight_decay=args.weight_decay,
        epsilon=args.epsilon,
        use_8bit=args.use_8bit,
        use_4bit=args.use_4bit,
        use_fp8=args.use_fp8,
        use_torchao=args.use_torchao,
        use_cpu_offload=args.use_cpu_offload_optimizer,
        offload_gradients=args.offload_gradients,
        step_in_backward=args.step_in_backward,
        stochastic_rounding=args.weights_dtype == "bf16" and not uses_deepspeed(),
        prodigy_decouple=args.prodigy_decouple,
        prodigy_use_bias_correction=args.prodigy_use_bias_correction,
        prodigy_safeguard_warmup=args.prodigy_safeguard_warmup,
        fused=not has_scaler,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    return optimizer, lr_scheduler
