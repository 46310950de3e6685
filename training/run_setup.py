"""Load and wire everything that the training loop works with."""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers import CogVideoXTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from activations import CheckpointStore, checkpoint_activations
from attention import attention_set, set_attention
from block_streaming import stream_blocks
from buckets import BucketBatchSampler
from checkpoints import TrainerState, checkpoint_only_what_trains, load_checkpoint, save_checkpoint
from compilation import compile_blocks
from conditions import Conditions, encode_conditions
from dataset import Batch, ClipDataset, PreparedDataset, make_loader, without_failures
from ema import averaged_weights, make_ema, schedule_free_weights
from errors import UserError
from launch import start_trackers
from methods import FullFinetune
from models import CPU, precision_warning
from objective import Objective
from optimizers import apply_learning_rate, keep_rates_on_host, make_optimizer
from plan import PreparedData, TrainingData
from progress import StepSchedule
from prompts import PromptCache
from recipe import Recipe, Task
from throughput import Throughput
from timesteps import TimestepSampling
from validation import Pipeline, ValidationSettings, validate
from validation_loss import log_validation_losses, validation_losses


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learner:
    """The transformer and what changes it."""

    transformer: CogVideoXTransformer3DModel
    model: torch.nn.Module  # the transformer as accelerate wrapped it
    trainable: Sequence[torch.nn.Parameter]
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    ema: EMAModel | None  # of the trainable parameters
    is_schedule_free: bool = False  # the optimizer keeps an average itself

    def averaged(self) -> AbstractContextManager[None]:
        """Puts the average in the place of the trained weights meanwhile, if there is one."""
        if self.is_schedule_free:
            return schedule_free_weights(self.optimizer, self.trainable)
        return averaged_weights(self.ema, self.trainable)


@dataclass
class Run:
    """What the loop works with."""

    accelerator: Accelerator
    output_dir: Path
    state: TrainerState  # at the start of the loop: resumed, or step 0
    total_steps: int
    schedule: StepSchedule
    batches: Iterator[Batch]  # this rank's, from `state.step` on
    objective: Objective
    learner: Learner
    throughput: Throughput
    validate: Callable[[int], list[str]]  # validate after so many steps; returns why sampling failed, if it did
    save_result: Callable[[], Path]  # write the result on the main process; returns where it is
    usage: str  # the code that loads the result
    checkpoints_total_limit: int | None

    def save_checkpoint(self, step: int) -> None:
        """Save the training state after `step` steps."""
        state = replace(self.state, step=step)
        save_checkpoint(self.accelerator, self.output_dir, state, self.checkpoints_total_limit)


def set_up(recipe: Recipe) -> Run:
    """Load and wire everything, in an order that never holds two large components that are not needed together.

    Raises:
        UserError: weights, images or clips cannot be had, or the checkpoint is beyond the steps asked for.
    """
    args, accelerator, state = recipe.args, recipe.accelerator, recipe.state
    sampler = make_sampler(recipe)
    schedule = StepSchedule(sampler.batches_per_epoch, args.gradient_accumulation_steps)
    total_steps = args.max_train_steps or args.num_train_epochs * schedule.steps_per_epoch
    if state.step > total_steps:
        raise UserError(
            f"--max_train_steps: {recipe.resumed} is at step {state.step}, beyond the {total_steps} steps asked for"
        )
    sampler.first_batch = schedule.batches_before(state.step)
    sampler.total_batches = schedule.batches_before(total_steps)

    conditions = encode_conditions(recipe)
    learner = make_learner(recipe, total_steps)
    if recipe.resumed:
        resume(recipe, learner)
    start_trackers(accelerator, args)
    describe_run(recipe, learner.transformer, schedule, total_steps, sampler.padding)
    objective = make_objective(recipe, conditions, learner)
    return Run(
        accelerator=accelerator,
        output_dir=recipe.output_dir,
        state=state,
        total_steps=total_steps,
        schedule=schedule,
        batches=load_batches(recipe, conditions.prompts, sampler),
        objective=objective,
        learner=learner,
        throughput=make_throughput(recipe),
        validate=make_validation(recipe, conditions, learner, objective),
        save_result=make_saving(recipe, learner),
        usage=describe_usage(recipe),
        checkpoints_total_limit=args.checkpoints_total_limit,
    )


def make_sampler(recipe: Recipe) -> BucketBatchSampler:
    """This rank's stream of batches."""
    return BucketBatchSampler(
        recipe.data.buckets,
        recipe.args.train_batch_size,
        seed=recipe.state.seed,
        repeats=recipe.data.repeats,
        rank=recipe.accelerator.process_index,
        world_size=recipe.accelerator.num_processes,
    )


def make_learner(recipe: Recipe, total_steps: int) -> Learner:
    """Load the transformer, make it trainable and wrap it for the launch."""
    args, accelerator = recipe.args, recipe.accelerator
    set_seed(recipe.state.seed)  # the adapters' initial weights
    transformer = load_transformer(recipe)
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer, lr_scheduler = build_optimizer(
        args,
        trainable,
        learning_rate_of(args, accelerator.num_processes),
        total_steps,
        has_scaler=recipe.dtype == torch.float16,
    )
    model, optimizer = accelerator.prepare(transformer, optimizer)
    keep_rates_on_host(optimizer)
    ema = make_ema(trainable, args.ema_decay) if args.use_ema else None
    # Not prepared: accelerate would step it once per process. Here a step is an optimizer step, on any ranks.
    accelerator.register_for_checkpointing(lr_scheduler)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    checkpoint_only_what_trains(accelerator, recipe.method)
    return Learner(transformer, model, trainable, optimizer, lr_scheduler, ema, args.optimizer == "schedulefree")


def load_transformer(recipe: Recipe) -> CogVideoXTransformer3DModel:
    """Load the transformer as task and method want it."""
    args, accelerator, source, dtype = recipe.args, recipe.accelerator, recipe.source, recipe.dtype
    # Weights that are streamed or divided among ranks need not fit onto the device as a whole.
    is_whole = accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
    transformer = source.load_transformer(
        recipe.method.base_dtype(dtype),
        device=accelerator.device if is_whole and not args.stream_blocks else CPU,
        quantize=args.quantize_base,
    )
    if dtype == torch.float16 and (warning := precision_warning(dtype, source.native_dtype())):
        logger.warning("warning: %s", warning)
    recipe.task.prepare_model(transformer)
    recipe.method.attach(transformer)
    store = CheckpointStore() if args.offload_checkpoints else None
    if args.stream_blocks:
        stream_blocks(transformer, accelerator.device, store)
    elif args.gradient_checkpointing:
        checkpoint_activations(transformer, args.checkpoint_scope, args.checkpoint_every, store)
    set_attention(transformer, args.attention_backend)
    if args.compile:
        compile_blocks(transformer, num_sizes=len(recipe.sizes))
        logger.info("the blocks are compiled when they are first used: a minute or so for each size of clips")
    return transformer


def make_throughput(recipe: Recipe) -> Throughput:
    """What counts and times the steps."""
    args, accelerator = recipe.args, recipe.accelerator
    return Throughput(
        recipe.configs.transformer,
        accelerator.device,
        accelerator.num_processes,
        recipe.dtype,
        trains_all=isinstance(recipe.method, FullFinetune),
        checkpoint_scope=args.checkpoint_scope if args.gradient_checkpointing else None,
        checkpoint_every=args.checkpoint_every,
    )


def resume(recipe: Recipe, learner: Learner) -> None:
    """Go on where the checkpoint is, at the learning rate given now."""
    load_checkpoint(recipe.accelerator, recipe.resumed)
    rate = learning_rate_of(recipe.args, recipe.accelerator.num_processes)
    apply_learning_rate(learner.optimizer, learner.lr_scheduler, rate)
    if learner.ema is not None:
        learner.ema.to(recipe.accelerator.device)
        learner.ema.decay = recipe.args.ema_decay  # may change on the way, as the learning rate may
    logger.info("resumed from %s at learning rate %g", recipe.resumed, learner.lr_scheduler.get_last_lr()[0])


def make_objective(recipe: Recipe, conditions: Conditions, learner: Learner) -> Objective:
    """The objective as the flags want it."""
    args, empty_prompt = recipe.args, conditions.empty_prompt
    return Objective(
        task=recipe.task,
        model=learner.model,
        transformer=learner.transformer,
        scheduler=recipe.source.load_scheduler(),
        configs=recipe.configs,
        vae=conditions.vae,
        dtype=recipe.dtype,
        timesteps=TimestepSampling(
            distribution=args.timestep_sampling,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            snr_gamma=args.snr_gamma,
        ),
        caption_dropout=args.caption_dropout,
        empty_prompt=None if empty_prompt is None else empty_prompt.to(recipe.accelerator.device),
    )


def make_validation(
    recipe: Recipe, conditions: Conditions, learner: Learner, objective: Objective
) -> Callable[[int], list[str]]:
    """Return what validates a step: the loss of the clips held out, and videos of the prompts, if there are any."""
    sample_videos = make_sampling(recipe, conditions, learner.transformer)
    num_timesteps = objective.scheduler.config.num_train_timesteps
    # Not what accelerate wrapped: a rank that fails must not leave the others waiting inside a forward pass.
    objective = replace(objective, model=learner.transformer)

    def run_validation(step: int) -> list[str]:
        failures = []
        with learner.averaged():
            if conditions.held_out:
                losses, failures = validation_losses(objective, conditions.held_out, recipe.accelerator, num_timesteps)
                log_validation_losses(recipe.accelerator, losses, failures, step)
            return failures + sample_videos(step)

    return run_validation


def make_sampling(
    recipe: Recipe, conditions: Conditions, transformer: CogVideoXTransformer3DModel
) -> Callable[[int], list[str]]:
    """Return what samples the validation videos of a step; it does nothing when no prompts were given."""
    args, accelerator = recipe.args, recipe.accelerator
    settings = ValidationSettings(
        prompts=args.validation_prompts,
        images=conditions.images,
        dtype=recipe.dtype,
        num_videos=args.num_validation_videos,
        height=args.height,
        width=args.width,
        num_frames=args.max_num_frames,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        use_dynamic_cfg=args.use_dynamic_cfg,
        enable_model_cpu_offload=args.enable_model_cpu_offload,
        seed=recipe.state.seed,
        fps=round(args.fps or 8),
    )

    def make_pipeline() -> Pipeline:
        return recipe.task.pipeline_class(
            tokenizer=None,
            text_encoder=None,
            # Loaded for the occasion: while training from prepared data, no VAE is resident.
            vae=conditions.vae or recipe.load_vae(torch.device("cpu"), decoder_only=not recipe.task.with_images),
            transformer=transformer,
            scheduler=recipe.source.load_scheduler(),
        )

    folder = recipe.output_dir / "validation"

    def sample_videos(step: int) -> list[str]:
        with attention_set(transformer, args.validation_attention_backend):
            return validate(accelerator, make_pipeline, settings, conditions.prompts, folder, step)

    return sample_videos if settings.prompts else lambda step: []


def make_saving(recipe: Recipe, learner: Learner) -> Callable[[], Path]:
    """Return what writes the result on the main process, and says where it is."""
    accelerator, method, folder = recipe.accelerator, recipe.method, recipe.output_dir
    # Known before the first step: what fails here must not fail at the end.
    dtype = method.result_dtype(recipe.dtype, recipe.source)

    def save_result() -> Path:
        result = folder
        if accelerator.is_main_process:
            with learner.averaged():
                result = method.save_result(learner.transformer, recipe.source, folder, dtype)
        accelerator.wait_for_everyone()
        return result

    return save_result


def describe_usage(recipe: Recipe) -> str:
    """The code that loads the result."""
    model, pipeline_class = recipe.args.pretrained_model_name_or_path, recipe.task.pipeline_class.__name__
    return "\n".join(recipe.method.usage(pipeline_class, model, recipe.output_dir, recipe.task.usage()))


def learning_rate_of(args: argparse.Namespace, num_processes: int) -> float:
    """The learning rate given, scaled to the samples in a step if that was asked for."""
    scale = args.gradient_accumulation_steps * args.train_batch_size * num_processes if args.scale_lr else 1
    return args.learning_rate * scale


def build_optimizer(
    args: argparse.Namespace,
    trainable: Sequence[torch.nn.Parameter],
    learning_rate: float,
    total_steps: int,
    *,
    has_scaler: bool,
) -> tuple[Optimizer, LRScheduler]:
    """Build the optimizer and its learning-rate schedule, counted in optimizer steps."""
    optimizer = make_optimizer(
        trainable,
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
        stochastic_rounding=args.weights_dtype == "bf16",
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


def make_dataset(
    args: argparse.Namespace,
    data: TrainingData,
    task: Task,
    seed: int,
    prompts: PromptCache | None = None,
    *,
    replace_failed: bool,
) -> ClipDataset | PreparedDataset:
    """The samples as the task wants them, raw or prepared."""
    if isinstance(data, PreparedData):
        return PreparedDataset(data.clips, with_images=task.with_images)
    return ClipDataset(
        data.clips,
        reshape_mode=args.video_reshape_mode,
        random_flip=args.random_flip,
        seed=seed,
        prompts=prompts,
        with_images=task.with_images,
        replace_failed=replace_failed,
    )


def load_batches(recipe: Recipe, prompts: PromptCache, sampler: BucketBatchSampler) -> Iterator[Batch]:
    """Load the batches that the sampler draws, from raw or prepared clips."""
    args, seed = recipe.args, recipe.state.seed
    skips_failed = args.on_bad_clip == "skip"
    dataset = make_dataset(args, recipe.data, recipe.task, seed, prompts, replace_failed=skips_failed)
    loader = make_loader(dataset, sampler, num_workers=args.dataloader_num_workers, pin_memory=args.pin_memory)
    return without_failures(loader)


def describe_run(
    recipe: Recipe, transformer: CogVideoXTransformer3DModel, schedule: StepSchedule, total_steps: int, padding: int
) -> None:
    """Log what is about to happen."""
    args, accelerator = recipe.args, recipe.accelerator
    total = transformer.num_parameters()  # weights in 4 bits share bytes
    trainable = transformer.num_parameters(only_trainable=True)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    logger.info("trainable parameters: %s of %s", f"{trainable:,}", f"{total:,}")
    logger.info(
        "%d samples, up to %d a step, %d steps an epoch; steps %d to %d on %d x %s, precision %s",
        len(recipe.data.clips),
        per_step,
        schedule.steps_per_epoch,
        recipe.state.step + 1,
        total_steps,
        accelerator.num_processes,
        accelerator.device.type,
        accelerator.mixed_precision,
    )
    if padding:
        logger.info("%d batches come twice in each epoch, so that all ranks have as many", padding)
