"""The transformer and what changes it: loaded, made trainable, wrapped for the launch, resumed."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers import CogVideoXTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from checkpoints.folder import checkpoint_only_what_trains, load_checkpoint
from common.ranks import uses_deepspeed
from flags.optimizer import OptimizerFlags
from flags.settings import TrainingSettings
from flags.training import ScheduleFlags
from memory.activations import CheckpointStore, checkpoint_activations
from memory.block_streaming import stream_blocks
from models.attention import set_attention
from models.compilation import compile_blocks
from models.configs import CPU, precision_warning
from optimizers.averages import averaged_weights, schedule_free_weights
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

    def end_step(self, accelerator: Accelerator) -> float:
        """Advance the learning-rate schedule and the averaged weights; returns the step's learning rate."""
        rate = float(self.lr_scheduler.get_last_lr()[0])
        # A step skipped for its gradients counts, as under any launch; those by which fp16 finds its scale do not.
        if accelerator.scaler is None or not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        return rate

    def averaged(self) -> AbstractContextManager[None]:
        """Puts the average in the place of the trained weights meanwhile, if there is one."""
        if self.is_schedule_free:
            return schedule_free_weights(self.optimizer, self.parameters)
        return averaged_weights(self.ema, self.parameters)


def make_trainable(spec: RunSpec, total_steps: int) -> Trainable:
    """Load the transformer, make it trainable and wrap it for the launch."""
    settings, accelerator = spec.settings, spec.accelerator
    set_seed(spec.state.seed)  # the adapters' initial weights
    transformer = load_transformer(spec)
    spec.coordinator.wait()  # machines download and read at their own pace; what follows is timed
    optimizer, lr_scheduler = build_optimizer(
        settings.optimizer,
        settings.schedule,
        trainable_of(transformer),
        learning_rate_of(settings, spec.num_data_ranks),
        total_steps,
        rounds_stochastically=settings.memory.weights_dtype == "bf16" and not uses_deepspeed(),
        has_scaler=spec.dtype == torch.float16,
    )
    if settings.optimizer.use_torchao:
        logger.info("torchao compiles its optimizer in the first step, which takes up to some minutes")
    model, optimizer = wrap(spec, transformer, optimizer)
    parameters = trainable_of(transformer)  # not as above: shards may have taken their place
    keep_rates_on_host(optimizer)
    # The decay is reached after about 10 / (1 - decay) steps.
    ema = EMAModel(parameters, decay=settings.objective.ema_decay) if settings.objective.use_ema else None
    # Not prepared: accelerate would step it once per process. Here a step is an optimizer step, on any ranks.
    accelerator.register_for_checkpointing(lr_scheduler)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    checkpoint_only_what_trains(accelerator, spec.method)
    return Trainable(
        transformer, model, parameters, optimizer, lr_scheduler, ema, settings.optimizer.optimizer == "schedulefree"
    )


def load_transformer(spec: RunSpec) -> CogVideoXTransformer3DModel:
    """Load the transformer as task and method want it."""
    settings, accelerator, source, dtype = spec.settings, spec.accelerator, spec.source, spec.dtype
    # Weights that are streamed or divided among ranks need not fit onto the device as a whole.
    whole = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
    is_whole = accelerator.distributed_type in whole and not has_sharded_weights(accelerator)
    transformer = source.load_transformer(
        spec.method.base_dtype(dtype),
        device=accelerator.device if is_whole and not settings.memory.stream_blocks else CPU,
        quantize=settings.memory.quantize_base,
    )
    if dtype == torch.float16 and (warning := precision_warning(dtype, source.native_dtype())):
        logger.warning("warning: %s", warning)
    spec.task.prepare_model(transformer)
    spec.method.attach(transformer)
    store = CheckpointStore() if settings.memory.offload_checkpoints else None
    if settings.memory.stream_blocks:
        stream_blocks(transformer, accelerator.device, store)
    elif settings.memory.gradient_checkpointing:
        checkpoint_activations(transformer, settings.memory.checkpoint_scope, settings.memory.checkpoint_every, store)
    set_attention(transformer, settings.speed.attention_backend, spec.context)
    if spec.context is not None:
        spec.context.divide(transformer)
    if settings.speed.compile:
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
    """Go on where the checkpoint is, at the learning rate given now, or at that of before where none is given."""
    load_checkpoint(spec.accelerator, spec.resumed)
    before = trainable.lr_scheduler.base_lrs[0]
    is_given = "learning_rate" in spec.settings.given or spec.settings.schedule.scale_lr
    rate = learning_rate_of(spec.settings, spec.num_data_ranks) if is_given else before
    if rate != before:
        logger.info("--learning_rate: the run goes on at a base rate of %g, after %g", rate, before)
    apply_learning_rate(trainable.optimizer, trainable.lr_scheduler, rate)
    if trainable.ema is not None:
        trainable.ema.to(spec.accelerator.device)
        trainable.ema.decay = spec.settings.objective.ema_decay  # may change on the way, as the learning rate may
    logger.info("resumed from %s at learning rate %g", spec.resumed, trainable.lr_scheduler.get_last_lr()[0])


def learning_rate_of(settings: TrainingSettings, num_data_ranks: int) -> float:
    """The learning rate given, scaled to the samples in a step if that was asked for."""
    scale = (
        settings.training.gradient_accumulation_steps * settings.training.train_batch_size * num_data_ranks
        if settings.schedule.scale_lr
        else 1
    )
    return settings.schedule.learning_rate * scale


def build_optimizer(
    flags: OptimizerFlags,
    schedule: ScheduleFlags,
    parameters: Sequence[torch.nn.Parameter],
    learning_rate: float,
    total_steps: int,
    *,
    rounds_stochastically: bool,
    has_scaler: bool,
) -> tuple[Optimizer, LRScheduler]:
    """Build the optimizer and its learning-rate schedule, counted in optimizer steps."""
    optimizer = make_optimizer(
        parameters,
        flags.optimizer,
        learning_rate=learning_rate,
        beta1=flags.beta1,
        beta2=flags.beta2,
        beta3=flags.beta3,
        weight_decay=flags.weight_decay,
        epsilon=flags.epsilon,
        use_8bit=flags.use_8bit,
        use_4bit=flags.use_4bit,
        use_fp8=flags.use_fp8,
        use_torchao=flags.use_torchao,
        use_cpu_offload=flags.use_cpu_offload_optimizer,
        offload_gradients=flags.offload_gradients,
        step_in_backward=flags.step_in_backward,
        stochastic_rounding=rounds_stochastically,
        prodigy_decouple=flags.prodigy_decouple,
        prodigy_use_bias_correction=flags.prodigy_use_bias_correction,
        prodigy_safeguard_warmup=flags.prodigy_safeguard_warmup,
        fused=not has_scaler,
    )
    lr_scheduler = get_scheduler(
        schedule.lr_scheduler,
        optimizer,
        num_warmup_steps=schedule.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=schedule.lr_num_cycles,
        power=schedule.lr_power,
    )
    return optimizer, lr_scheduler
