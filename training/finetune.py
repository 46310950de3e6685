"""The training run, for every task and method: set up, the loop, the result."""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import free_memory
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
from diffusion import step_generator
from errors import UserError
from fingerprints import fingerprint_encoders
from launch import shared_seed, start_accelerator, start_trackers
from methods import FullFinetune, Lora
from models import DTYPES, ModelConfigs, ModelSource
from objective import Objective
from optimizers import apply_learning_rate, make_optimizer
from plan import PreparedData, TrainingData, describe, report_skipped
from prepared import check_encoders
from progress import StepLog, StepSchedule
from prompts import PromptCache
from publish import push_to_hub
from tasks import ImageToVideo, TextToVideo
from validation import Pipeline, ValidationSettings, validate


logger = logging.getLogger(__name__)


Task = TextToVideo | ImageToVideo
Method = Lora | FullFinetune


def finetune(args: argparse.Namespace, data: TrainingData, task: Task, method: Method) -> None:
    """Fine-tune a model on `data` and write the result to `args.output_dir`; called on every rank.

    Raises:
        UserError: model, data and flags do not go together; raised before any weights are loaded.
    """
    run = set_up(args, data, task, method)
    train(args, run)
    # The result is safe before the last validation, which can fail or take long.
    run.save_checkpoint(run.total_steps)
    if run.accelerator.is_main_process:
        result = method.save(run.transformer, run.output_dir, run.result_dtype)
        loading = method.usage(task.pipeline_class.__name__, args.pretrained_model_name_or_path, run.output_dir)
        usage = "\n".join([loading[0], *task.usage(), *loading[1:]])
        logger.info("saved %s; to use it:\n\n%s\n", result, usage)
    run.validate(run.total_steps)
    if args.push_to_hub and run.accelerator.is_main_process:
        push_to_hub(
            run.output_dir,
            args.hub_model_id,
            args.hub_token,
            args.pretrained_model_name_or_path,
            usage,
            args.validation_prompts,
        )
    run.accelerator.end_training()


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
    transformer: CogVideoXTransformer3DModel
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    result_dtype: torch.dtype
    validate: Callable[[int], None]  # sample the validation videos of a step
    checkpoints_total_limit: int | None

    def save_checkpoint(self, step: int) -> None:
        """Save the training state after `step` steps."""
        state = replace(self.state, step=step)
        save_checkpoint(self.accelerator, self.output_dir, state, self.checkpoints_total_limit)


def train(args: argparse.Namespace, run: Run) -> None:
    """The loop: one turn is one optimizer step on `gradient_accumulation_steps` batches of every rank."""
    accelerator, schedule, seed = run.accelerator, run.schedule, run.state.seed
    trainable = trainable_parameters(run.transformer)
    log = StepLog(accelerator, run.state.step, run.total_steps, args.logging_steps)
    run.model.train()
    for step in range(run.state.step, run.total_steps):
        batches = list(islice(run.batches, schedule.batches_before(step + 1) - schedule.batches_before(step)))
        num_samples = sum(len(batch.names) for batch in batches)
        step_loss = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches):
            generator = step_generator(accelerator.device, seed, step, number, accelerator.process_index)
            # Ranks exchange gradients once a step, with its last batch.
            accelerator.sync_gradients = number == len(batches) - 1
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(run.model):
                loss = run.objective(batch.to(accelerator.device), generator) * len(batch.names) / num_samples
                # accelerate divides by the accumulation steps, but the weights above make the mean already.
                accelerator.backward(loss * args.gradient_accumulation_steps)
            step_loss += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(trainable, args.max_grad_norm)
        run.optimizer.step()
        log.add(step_loss, grad_norm, run.lr_scheduler.get_last_lr()[0])
        if not accelerator.optimizer_step_was_skipped:
            run.lr_scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if done == run.total_steps:
            break  # the caller saves and validates the end
        if done % args.checkpointing_steps == 0:
            log.flush()  # a run that is killed later has lost no logged step
            run.save_checkpoint(done)
        if schedule.is_due(done, args.validation_steps, args.validation_epochs):
            log.flush()  # trackers want steps in order
            run.validate(done)
    log.close()


def set_up(args: argparse.Namespace, data: TrainingData, task: Task, method: Method) -> Run:
    """Load and wire everything, in an order that never holds two large components that are not needed together."""
    source = ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir)
    configs = source.configs()
    sampled = [Bucket(args.max_num_frames, args.height, args.width)] if args.validation_prompts else []
    task.check_model(configs, {*data.buckets, *sampled})
    is_prepared = isinstance(data, PreparedData)
    if is_prepared:
        check_prepared(data.clips, configs)
    output_dir = Path(args.output_dir)
    resumed = find_checkpoint(args.resume_from_checkpoint, output_dir)
    accelerator = start_accelerator(args)
    describe_data(args, accelerator, data, source, configs)
    settings = {"model": configs.kind, "--optimizer": args.optimizer, **method.settings}
    if resumed:
        state = read_state(resumed)
        state.check_settings(settings)
    else:
        state = TrainerState(0, shared_seed(accelerator, args.seed), settings)
    set_seed(state.seed)  # the adapters' initial weights
    dtype = DTYPES[accelerator.mixed_precision]

    # Guidance compares with the empty prompt.
    prompts_to_sample = [*args.validation_prompts, ""] if args.validation_prompts else []
    prompts = PromptCache(output_dir / "prompt_embeds", source, dtype)
    embed_prompts(accelerator, prompts, [*data.captions, *prompts_to_sample])
    vae = None if is_prepared else load_vae(args, source, accelerator.device, dtype)
    transformer = source.load_transformer(method.base_dtype(dtype))
    task.prepare_model(transformer)
    method.attach(transformer)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()

    sampler = BucketBatchSampler(
        data.buckets,
        args.train_batch_size,
        seed=state.seed,
        repeats=data.repeats,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    schedule = StepSchedule(sampler.batches_per_epoch, args.gradient_accumulation_steps)
    total_steps = args.max_train_steps or args.num_train_epochs * schedule.steps_per_epoch
    learning_rate = learning_rate_of(args, accelerator.num_processes)
    if state.step > total_steps:
        raise UserError(
            f"--max_train_steps: {resumed} is at step {state.step}, beyond the {total_steps} steps asked for"
        )
    optimizer, lr_scheduler = build_optimizer(args, transformer, learning_rate, total_steps)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    # Not prepared: accelerate would step it once per process. Here a step is an optimizer step, on any ranks.
    accelerator.register_for_checkpointing(lr_scheduler)
    checkpoint_only_what_trains(accelerator, method)
    if resumed:
        load_checkpoint(accelerator, resumed)
        apply_learning_rate(optimizer, lr_scheduler, learning_rate)
        logger.info("resumed from %s at learning rate %g", resumed, lr_scheduler.get_last_lr()[0])
    start_trackers(accelerator, args)
    describe_run(accelerator, args, len(data.clips), transformer, schedule, state, total_steps, sampler.padding)

    sampler.first_batch = schedule.batches_before(state.step)
    sampler.total_batches = schedule.batches_before(total_steps)
    return Run(
        accelerator=accelerator,
        output_dir=output_dir,
        state=state,
        total_steps=total_steps,
        schedule=schedule,
        batches=load_batches(args, data, task, prompts, sampler, state.seed),
        objective=Objective(task, model, transformer, source.load_scheduler(), configs, vae, dtype),
        model=model,
        transformer=transformer,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        result_dtype=method.result_dtype(dtype, source),
        validate=make_validation(args, accelerator, task, source, transformer, vae, prompts, dtype, state.seed),
        checkpoints_total_limit=args.checkpoints_total_limit,
    )


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


def trainable_parameters(transformer: CogVideoXTransformer3DModel) -> list[torch.nn.Parameter]:
    """The parameters that the method left trainable."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def embed_prompts(accelerator: Accelerator, prompts: PromptCache, texts: list[str]) -> None:
    """Embed what is not in the cache yet, shared out over the ranks, and free the text encoder again."""
    prompts.embed(texts, accelerator.device, rank=accelerator.process_index, world_size=accelerator.num_processes)
    free_memory()
    accelerator.wait_for_everyone()


def load_vae(
    args: argparse.Namespace, source: ModelSource, device: torch.device, dtype: torch.dtype
) -> AutoencoderKLCogVideoX:
    """Load the VAE with the memory savings that the flags ask for."""
    return source.load_vae(dtype, slicing=args.enable_slicing, tiling=args.enable_tiling).to(device)


def learning_rate_of(args: argparse.Namespace, num_processes: int) -> float:
    """The learning rate given, scaled to the samples in a step if that was asked for."""
    scale = args.gradient_accumulation_steps * args.train_batch_size * num_processes if args.scale_lr else 1
    return args.learning_rate * scale


def build_optimizer(
    args: argparse.Namespace, transformer: CogVideoXTransformer3DModel, learning_rate: float, total_steps: int
) -> tuple[Optimizer, LRScheduler]:
    """Build the optimizer and its learning-rate schedule, counted in optimizer steps."""
    optimizer = make_optimizer(
        trainable_parameters(transformer),
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


def load_batches(
    args: argparse.Namespace,
    data: TrainingData,
    task: Task,
    prompts: PromptCache,
    sampler: BucketBatchSampler,
    seed: int,
) -> Iterator[Batch]:
    """Load the batches that the sampler draws, from raw or prepared clips."""
    if isinstance(data, PreparedData):
        dataset = PreparedDataset(data.clips, with_images=task.with_images)
    else:
        dataset = ClipDataset(
            data.clips,
            reshape_mode=args.video_reshape_mode,
            random_flip=args.random_flip,
            seed=seed,
            prompts=prompts,
            with_images=task.with_images,
            replace_failed=args.on_bad_clip == "skip",
        )
    loader = make_loader(dataset, sampler, num_workers=args.dataloader_num_workers, pin_memory=args.pin_memory)
    return without_failures(loader)


def make_validation(
    args: argparse.Namespace,
    accelerator: Accelerator,
    task: Task,
    source: ModelSource,
    transformer: CogVideoXTransformer3DModel,
    vae: AutoencoderKLCogVideoX | None,
    prompts: PromptCache,
    dtype: torch.dtype,
    seed: int,
) -> Callable[[int], None]:
    """Return what samples the validation videos of a step; it does nothing when no prompts were given."""
    settings = ValidationSettings(
        prompts=args.validation_prompts,
        images=args.validation_images if task.with_images else None,
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
        return lambda step: None
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
    trainable = sum(parameter.numel() for parameter in trainable_parameters(transformer))
    total = sum(parameter.numel() for parameter in transformer.parameters())
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
