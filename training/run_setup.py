"""Load and wire everything that the training loop works with."""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, free_memory
from PIL import Image
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from buckets import Bucket, BucketBatchSampler
from checkpoints import (
    TrainerState,
    checkpoint_only_what_trains,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from dataset import Batch, ClipDataset, PreparedDataset, check_prepared, make_loader, without_failures
from ema import averaged_weights, make_ema
from errors import UserError
from fingerprints import fingerprint_encoders
from launch import shared_seed, start_accelerator, start_trackers
from methods import FullFinetune, Lora
from models import DTYPES, ModelConfigs, ModelSource, precision_warning
from objective import Objective
from optimizers import apply_learning_rate, make_optimizer
from plan import PreparedData, TrainingData, describe, report_skipped, validation_data_flags
from prepared import check_encoders, read_empty_prompt
from progress import StepSchedule
from prompts import PromptCache
from tasks import ImageToVideo, TextToVideo
from timesteps import TimestepSampling
from validation import Pipeline, ValidationSettings, validate
from validation_images import load_validation_images
from validation_loss import encode_validation_set, log_validation_losses, validation_losses


logger = logging.getLogger(__name__)


Task = TextToVideo | ImageToVideo
Method = Lora | FullFinetune


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
    model: torch.nn.Module  # the transformer as accelerate wrapped it
    trainable: Sequence[torch.nn.Parameter]
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    ema: EMAModel | None  # of the trainable parameters
    validate: Callable[[int], list[str]]  # validate after so many steps; returns why sampling failed, if it did
    save_result: Callable[[], str]  # write the result; returns the code that loads it
    checkpoints_total_limit: int | None

    def save_checkpoint(self, step: int) -> None:
        """Save the training state after `step` steps."""
        state = replace(self.state, step=step)
        save_checkpoint(self.accelerator, self.output_dir, state, self.checkpoints_total_limit)


def set_up(args: argparse.Namespace, data: TrainingData, task: Task, method: Method) -> Run:
    """Load and wire everything, in an order that never holds two large components that are not needed together.

    Text encoder and VAE come and go before the transformer is loaded; with raw clips the VAE stays.

    Raises:
        UserError: model, data and flags do not go together; raised before any weights are loaded.
    """
    source = ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir)
    configs = source.configs()
    check_model(args, data, task, configs)
    method.check_model(configs, source)
    output_dir = Path(args.output_dir)
    resumed = find_checkpoint(args.resume_from_checkpoint, output_dir)
    accelerator = start_accelerator(args)
    describe_data(args, accelerator, data, source, configs)
    settings = {"model": configs.kind, "--optimizer": args.optimizer, "--use_ema": args.use_ema, **method.settings}
    state = starting_state(accelerator, resumed, args.seed, settings)
    images = load_validation_images(args.validation_images) if task.with_images else None
    set_seed(state.seed)  # the adapters' initial weights
    dtype = DTYPES[accelerator.mixed_precision]

    prompts = PromptCache(output_dir / "prompt_embeds", source, dtype)
    empty_prompt = find_empty_prompt(data, configs) if args.caption_dropout else None
    embed_prompts(args, accelerator, prompts, data, with_empty=args.caption_dropout > 0 and empty_prompt is None)
    vae = None if isinstance(data, PreparedData) else load_vae(args, source, accelerator.device, dtype)
    held_out = encode_held_out(args, accelerator, data, task, source, vae, prompts, dtype)
    transformer = source.load_transformer(method.base_dtype(dtype))
    result_dtype = method.result_dtype(dtype, source)
    if dtype == torch.float16 and (warning := precision_warning(dtype, source.native_dtype())):
        logger.warning("warning: %s", warning)
    task.prepare_model(transformer)
    method.attach(transformer)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()

    sampler = make_sampler(args, accelerator, data, state.seed)
    schedule = StepSchedule(sampler.batches_per_epoch, args.gradient_accumulation_steps)
    total_steps = args.max_train_steps or args.num_train_epochs * schedule.steps_per_epoch
    if state.step > total_steps:
        raise UserError(
            f"--max_train_steps: {resumed} is at step {state.step}, beyond the {total_steps} steps asked for"
        )
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    learning_rate = learning_rate_of(args, accelerator.num_processes)
    has_scaler = dtype == torch.float16
    optimizer, lr_scheduler = build_optimizer(args, trainable, learning_rate, total_steps, has_scaler=has_scaler)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    ema = make_ema(trainable, args.ema_decay) if args.use_ema else None
    # Not prepared: accelerate would step it once per process. Here a step is an optimizer step, on any ranks.
    accelerator.register_for_checkpointing(lr_scheduler)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    checkpoint_only_what_trains(accelerator, method)
    if resumed:
        load_checkpoint(accelerator, resumed)
        apply_learning_rate(optimizer, lr_scheduler, learning_rate)
        if ema is not None:
            ema.to(accelerator.device)
        logger.info("resumed from %s at learning rate %g", resumed, lr_scheduler.get_last_lr()[0])
    start_trackers(accelerator, args)
    describe_run(accelerator, args, len(data.clips), transformer, schedule, state, total_steps, sampler.padding)

    sampler.first_batch = schedule.batches_before(state.step)
    sampler.total_batches = schedule.batches_before(total_steps)
    objective = Objective(
        task=task,
        model=model,
        transformer=transformer,
        scheduler=source.load_scheduler(),
        configs=configs,
        vae=vae,
        dtype=dtype,
        timesteps=timestep_sampling(args),
        caption_dropout=args.caption_dropout,
    )
    if args.caption_dropout:
        objective.empty_prompt = (prompts.load("") if empty_prompt is None else empty_prompt).to(accelerator.device)
    sample_videos = make_sampling(
        args, accelerator, task, source, transformer, vae, prompts, images, dtype, state.seed
    )

    def run_validation(step: int) -> list[str]:
        with averaged_weights(ema, trainable):
            if held_out:
                num_timesteps = objective.scheduler.config.num_train_timesteps
                losses = validation_losses(objective, held_out, accelerator, num_timesteps)
                log_validation_losses(accelerator, losses, step)
            return sample_videos(step)

    def save_result() -> str:
        model, pipeline_class = args.pretrained_model_name_or_path, task.pipeline_class.__name__
        usage = "\n".join(method.usage(pipeline_class, model, output_dir, task.usage()))
        if accelerator.is_main_process:
            with averaged_weights(ema, trainable):
                result = method.save_result(transformer, source, output_dir, result_dtype)
            logger.info("saved %s; to use it:\n\n%s\n", result, usage)
        accelerator.wait_for_everyone()
        return usage

    return Run(
        accelerator=accelerator,
        output_dir=output_dir,
        state=state,
        total_steps=total_steps,
        schedule=schedule,
        batches=load_batches(args, data, task, prompts, sampler, state.seed),
        objective=objective,
        model=model,
        trainable=trainable,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        ema=ema,
        validate=run_validation,
        save_result=save_result,
        checkpoints_total_limit=args.checkpoints_total_limit,
    )


def check_model(args: argparse.Namespace, data: TrainingData, task: Task, configs: ModelConfigs) -> None:
    """Refuse a model, sizes or prepared data that the task cannot take, by the configs alone.

    Raises:
        UserError: says what does not fit.
    """
    others = [Bucket(args.max_num_frames, args.height, args.width)] if args.validation_prompts else []
    others += data.held_out.buckets if data.held_out else []
    task.check_model(configs, {*data.buckets, *others})
    if isinstance(data, PreparedData):
        check_prepared(data.clips, configs)


def starting_state(
    accelerator: Accelerator, resumed: Path | None, seed: int | None, settings: dict[str, object]
) -> TrainerState:
    """Where the loop starts: at step 0, or where the checkpoint is.

    Raises:
        UserError: the checkpoint is of a run with other settings.
    """
    if resumed is None:
        return TrainerState(0, shared_seed(accelerator, seed), settings)
    state = read_state(resumed)
    state.check_settings(settings)
    return state


def describe_data(
    args: argparse.Namespace, accelerator: Accelerator, data: TrainingData, source: ModelSource, configs: ModelConfigs
) -> None:
    """Say what will be trained on, before anything heavy is loaded; refuse data of other encoders than the model's.

    Raises:
        UserError: the data was prepared with another VAE, text encoder or tokenizer.
    """
    if isinstance(data, PreparedData):
        encoders = fingerprint_encoders(source.local_folder(), args.variant)
        for folder in data.folders:
            problem = check_encoders(folder, encoders)
            if problem and not args.ignore_prepared_mismatch:
                raise UserError(
                    f"--load_tensors: {problem}; prepare the data with {args.pretrained_model_name_or_path}, or give "
                    "--ignore_prepared_mismatch if you know that they are equal"
                )
            if problem:
                logger.warning("warning: %s", problem)
    elif accelerator.is_main_process:
        report_skipped(data.bad, Path(args.output_dir))
    if accelerator.is_main_process:
        plan = describe(
            data,
            source,
            configs,
            batch_size=args.train_batch_size,
            num_ranks=accelerator.num_processes,
            reshape_mode=args.video_reshape_mode,
        )
        logger.info("%s", plan)


def find_empty_prompt(data: TrainingData, configs: ModelConfigs) -> torch.Tensor | None:
    """The embedding of the empty prompt, `[226, D]`, where the data was prepared with it.

    Raises:
        UserError: it is damaged, or of another model.
    """
    if not isinstance(data, PreparedData):
        return None
    for folder in data.folders:
        embeds = read_empty_prompt(folder)
        expected = (configs.transformer["max_text_seq_length"], configs.transformer["text_embed_dim"])
        if embeds is not None and embeds.shape != expected:
            raise UserError(
                f"--caption_dropout: the empty prompt in '{folder}' has the shape {tuple(embeds.shape)}, the model "
                f"needs {expected}; prepare the data with the model to be trained"
            )
        if embeds is not None:
            return embeds
    return None


def embed_prompts(
    args: argparse.Namespace, accelerator: Accelerator, prompts: PromptCache, data: TrainingData, *, with_empty: bool
) -> None:
    """Embed what is not in the cache yet, shared out over the ranks, and free the text encoder again."""
    texts = [*data.captions, *args.validation_prompts]
    texts += data.held_out.captions if data.held_out else []
    if with_empty or (args.validation_prompts and args.guidance_scale > 1):
        texts.append("")  # guidance compares with it
    prompts.embed(texts, accelerator.device, rank=accelerator.process_index, world_size=accelerator.num_processes)
    free_memory()
    accelerator.wait_for_everyone()


def load_vae(
    args: argparse.Namespace, source: ModelSource, device: torch.device, dtype: torch.dtype
) -> AutoencoderKLCogVideoX:
    """Load the VAE with the memory savings that the flags ask for."""
    return source.load_vae(dtype, slicing=args.enable_slicing, tiling=args.enable_tiling).to(device)


def encode_held_out(
    args: argparse.Namespace,
    accelerator: Accelerator,
    data: TrainingData,
    task: Task,
    source: ModelSource,
    vae: AutoencoderKLCogVideoX | None,
    prompts: PromptCache,
    dtype: torch.dtype,
) -> list[Batch]:
    """Encode this rank's share of --validation_dataset_file; without a `vae`, with one that goes again."""
    if data.held_out is None:
        return []
    batches = encode_validation_set(
        data.held_out.clips,
        vae or load_vae(args, source, accelerator.device, dtype),
        prompts,
        reshape_mode=validation_data_flags(args).video_reshape_mode,
        with_images=task.with_images,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    free_memory()
    return batches


def make_sampler(
    args: argparse.Namespace, accelerator: Accelerator, data: TrainingData, seed: int
) -> BucketBatchSampler:
    """This rank's stream of batches."""
    return BucketBatchSampler(
        data.buckets,
        args.train_batch_size,
        seed=seed,
        repeats=data.repeats,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def timestep_sampling(args: argparse.Namespace) -> TimestepSampling:
    """How the flags want timesteps drawn and weighed."""
    return TimestepSampling(
        distribution=args.timestep_sampling,
        logit_mean=args.logit_mean,
        logit_std=args.logit_std,
        snr_gamma=args.snr_gamma,
    )


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
        use_torchao=args.use_torchao,
        use_cpu_offload=args.use_cpu_offload_optimizer,
        offload_gradients=args.offload_gradients,
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


def load_batches(
    args: argparse.Namespace,
    data: TrainingData,
    task: Task,
    prompts: PromptCache,
    sampler: BucketBatchSampler,
    seed: int,
) -> Iterator[Batch]:
    """Load the batches that the sampler draws, from raw or prepared clips."""
    dataset = make_dataset(args, data, task, seed, prompts, replace_failed=args.on_bad_clip == "skip")
    loader = make_loader(dataset, sampler, num_workers=args.dataloader_num_workers, pin_memory=args.pin_memory)
    return without_failures(loader)


def make_sampling(
    args: argparse.Namespace,
    accelerator: Accelerator,
    task: Task,
    source: ModelSource,
    transformer: CogVideoXTransformer3DModel,
    vae: AutoencoderKLCogVideoX | None,
    prompts: PromptCache,
    images: list[Image.Image] | None,
    dtype: torch.dtype,
    seed: int,
) -> Callable[[int], list[str]]:
    """Return what samples the validation videos of a step; it does nothing when no prompts were given."""
    settings = ValidationSettings(
        prompts=args.validation_prompts,
        images=images,
        dtype=dtype,
        num_videos=args.num_validation_videos,
        height=args.height,
        width=args.width,
        num_frames=args.max_num_frames,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        use_dynamic_cfg=args.use_dynamic_cfg,
        enable_model_cpu_offload=args.enable_model_cpu_offload,
        seed=seed,
        fps=round(args.fps or 8),
    )

    def make_pipeline() -> Pipeline:
        return task.pipeline_class(
            tokenizer=None,
            text_encoder=None,
            # Loaded for the occasion: while training from prepared data, no VAE is resident.
            vae=vae or load_vae(args, source, torch.device("cpu"), dtype),
            transformer=transformer,
            scheduler=source.load_scheduler(),
        )

    folder = Path(args.output_dir, "validation")
    if not settings.prompts:
        return lambda step: []
    return lambda step: validate(accelerator, make_pipeline, settings, prompts, folder, step)


def describe_run(
    accelerator: Accelerator,
    args: argparse.Namespace,
    num_samples: int,
    transformer: CogVideoXTransformer3DModel,
    schedule: StepSchedule,
    state: TrainerState,
    total_steps: int,
    padding: int,
) -> None:
    """Log what is about to happen."""
    total = sum(parameter.numel() for parameter in transformer.parameters())
    trainable = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    logger.info("trainable parameters: %s of %s", f"{trainable:,}", f"{total:,}")
    logger.info(
        "%d samples, up to %d a step, %d steps an epoch; steps %d to %d on %d x %s, precision %s",
        num_samples,
        per_step,
        schedule.steps_per_epoch,
        state.step + 1,
        total_steps,
        accelerator.num_processes,
        accelerator.device.type,
        accelerator.mixed_precision,
    )
    if padding:
        logger.info("%d batches come twice in each epoch, so that all ranks have as many", padding)
