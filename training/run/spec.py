"""A run that passed all checks that need no weights: of model, data, flags, device and checkpoint."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLCogVideoX

from checkpoints.folder import check_space
from checkpoints.resume import find_checkpoint
from checkpoints.schedule import ScheduleStart
from checkpoints.state import TrainerState, read_state
from checks.deepspeed import describe_division
from cli.schema import flag_values
from common.errors import UserError
from common.ranks import launch_size, uses_fsdp
from dataset import check_prepared
from diffusion.task import SizeFlags, choose_scheduler
from flags.optimizer import LOW_BITS
from memory.settings import memory_settings_of
from models.attention import check_attention
from models.compilation import check_compiler
from models.fingerprints import fingerprint_encoders
from optimizers.build import check_launch
from parallel.context import ContextParallel, start_context_parallel
from parallel.coordinator import Coordinator
from parallel.fsdp import is_fsdp
from parallel.preflight import check_training
from planning.describe import describe_plan, report_held_out, report_skipped
from planning.held_out import FRACTION_FLAG
from planning.samples import PreparedData
from prepared.folder import check_encoders
from run.launch import choose_seed, start_accelerator
from run.memory_fit import is_chosen
from run.recipe import Recipe
from validation.defaults import missing_token


logger = logging.getLogger(__name__)

SAMPLED_SIZES = SizeFlags("--height, --width", "--max_num_frames")  # of validation videos
# Flags that change the format of the optimizer's states, ...
OPTIMIZER_KINDS = (*LOW_BITS, "use_torchao", "use_cpu_offload_optimizer", "step_in_backward")
# ... and those whose values a checkpoint restores, so that another value would have no effect.
OPTIMIZER_NUMBERS = ("weight_decay", "beta1", "beta2", "beta3", "epsilon", "prodigy_decouple")
OPTIMIZER_NUMBERS += ("prodigy_use_bias_correction", "prodigy_safeguard_warmup")


@dataclass(frozen=True)
class RunSpec(Recipe):
    """A recipe that passed the checks, with the processes that run it and the state that it starts from."""

    accelerator: Accelerator
    coordinator: Coordinator
    resumed: Path | None  # the checkpoint to continue from
    state: TrainerState  # at step 0, or that of the checkpoint
    context: ContextParallel | None  # divides each sample among ranks

    @property
    def data_rank(self) -> int:
        """The number of this process among those with different data: ranks that divide a sample count as one."""
        return self.accelerator.process_index // self.settings.speed.context_parallel_size

    @property
    def num_data_ranks(self) -> int:
        """The number of ranks with different data."""
        return self.accelerator.num_processes // self.settings.speed.context_parallel_size

    @property
    def samples_per_step(self) -> int:
        """The largest number of samples in an optimizer step, over all ranks."""
        most = max(map(self.batch_limit.most_of, self.data.buckets.counts))
        return self.settings.training.gradient_accumulation_steps * most * self.num_data_ranks

    @property
    def learning_rate(self) -> float:
        """The base learning rate; with --scale_lr, multiplied by the samples of a step."""
        schedule = self.settings.schedule
        return schedule.learning_rate * (self.samples_per_step if schedule.scale_lr else 1)

    def undivided(self) -> AbstractContextManager[None]:
        """Let each rank compute full samples within a `with` statement."""
        return nullcontext() if self.context is None else self.context.off()

    def load_vae(self, device: torch.device, *, decoder_only: bool = False) -> AutoencoderKLCogVideoX:
        """Load the VAE with the memory savings that the flags ask for."""
        training = self.settings.training
        return self.source.load_vae(
            self.dtype,
            slicing=training.enable_slicing,
            tiling=training.enable_tiling,
            device=device,
            decoder_only=decoder_only,
        )


def check_spec(recipe: Recipe) -> RunSpec:
    """Check a recipe, start the processes that run it, and log the data; called on every rank.

    Raises UserError if model, data, flags and the checkpoint to resume from do not fit together.
    """
    settings, data = recipe.settings, recipe.data
    recipe.task.check_model(recipe.configs, recipe.clip_sizes)
    if recipe.sampled_size:
        recipe.task.check_model(recipe.configs, [recipe.sampled_size], SAMPLED_SIZES)
        choose_scheduler(recipe.task, recipe.settings.guidance.sampling_scheduler)
    recipe.method.check_model(recipe.configs, recipe.source)
    if isinstance(data, PreparedData):
        check_prepared(data.clips, recipe.configs, with_masks=settings.masks.use_masks)
    accelerator = start_accelerator(settings.training, settings.tracking, allow_tf32=settings.speed.allow_tf32)
    coordinator = Coordinator()
    num_ranks = accelerator.num_processes // settings.speed.context_parallel_size
    fingerprints = {"data": data.fingerprint}
    if data.held_out:
        fingerprints["validation data"] = data.held_out.fingerprint
    model = f"{recipe.source.fingerprint()} {recipe.configs.kind}"
    check_training(coordinator, flag_values(settings), fingerprints, model)
    check_device(recipe, accelerator)
    check_prepared_folders(recipe)
    if accelerator.is_main_process:
        log_data(recipe, num_ranks)
    resume_from = settings.checkpoints.resume_from_checkpoint
    resumed = coordinator.from_main(lambda: find_checkpoint(resume_from, recipe.output_dir))
    lasting = lasting_settings(recipe)
    if resumed:
        state = read_state(resumed)
        state.check_settings(lasting)
    else:
        memory = asdict(memory_settings_of(settings)) if is_chosen(settings) else {}
        seed = coordinator.from_main(lambda: choose_seed(settings.training.seed))
        start = ScheduleStart(num_ranks, settings.training.gradient_accumulation_steps)
        state = TrainerState(0, seed, lasting, memory, start)
    coordinator.from_main(lambda: check_space(recipe.output_dir, recipe.checkpoint_bytes, "a checkpoint"))
    timeout = timedelta(seconds=settings.training.nccl_timeout)
    context = start_context_parallel(settings.speed.context_parallel_size, timeout)
    return RunSpec(settings, data, accelerator, coordinator, resumed, state, context)


def lasting_settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings, by flag, that a resumed run must share with its checkpoint."""
    settings, optimizer = recipe.settings, recipe.settings.optimizer
    return {
        "model": recipe.configs.kind,
        "training data": recipe.data.fingerprint,
        FRACTION_FLAG: recipe.data.held_out_fraction or False,
        "--train_batch_size": settings.training.train_batch_size,
        "--max_tokens_per_batch": settings.training.max_tokens_per_batch,
        "--optimizer": optimizer.optimizer,
        "--use_ema": settings.objective.use_ema,
        **{f"--{name}": getattr(optimizer, name) for name in (*OPTIMIZER_KINDS, *OPTIMIZER_NUMBERS)},
        **({} if settings.training.seed is None else {"--seed": settings.training.seed}),
        **({} if recipe.data.blocks is None else {"--cache_limit_gb": settings.sources.cache_limit_gb}),
        "--regularization_weight": (
            None if recipe.data.regularization is None else settings.regularization.regularization_weight
        ),
        "--mask_background_weight": settings.objective.mask_background_weight if settings.masks.use_masks else None,
        **recipe.task.settings,
        **recipe.method.settings,
        "DeepSpeed": describe_division(),
        "FSDP": uses_fsdp(),
    }


def check_device(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse settings that the device, this machine or the launch does not support, with a UserError."""
    settings, device, dtype = recipe.settings, accelerator.device, recipe.dtype
    speed, head_dim = settings.speed, recipe.configs.transformer["attention_head_dim"]
    check_attention(speed.attention_backend, "--attention_backend", device, dtype, head_dim, trains=True)
    backend = speed.validation_attention_backend
    check_attention(backend, "--validation_attention_backend", device, dtype, head_dim, trains=False)
    if speed.compile:
        check_compiler(device)
    if uses_fsdp() and launch_size() > 1 and not is_fsdp(accelerator):
        raise UserError("--config_file: accelerate supports FSDP only on GPUs; use accelerate_configs/cpu.yaml here")
    bf16_weights = settings.memory.weights_dtype == "bf16"
    check_launch(settings.optimizer, accelerator.distributed_type, dtype, bf16_weights=bf16_weights)


def check_prepared_folders(recipe: Recipe) -> None:
    """Refuse data that was prepared with another VAE, text encoder or tokenizer than the model's, with a UserError.

    With --ignore_prepared_mismatch, only warn.
    """
    if not isinstance(recipe.data, PreparedData):
        return
    model = recipe.settings.model
    encoders = fingerprint_encoders(recipe.source.local_folder(), model.variant)
    for problem in filter(None, (check_encoders(folder, encoders) for folder in recipe.data.folders)):
        if not recipe.settings.prepared.ignore_prepared_mismatch:
            raise UserError(
                f"--load_tensors: {problem}; prepare the data with {model.pretrained_model_name_or_path}, or pass "
                "--ignore_prepared_mismatch if you know that they are equal"
            )
        logger.warning("warning: %s", problem)


def log_data(recipe: Recipe, num_ranks: int) -> None:
    """Log the buckets of the training data and list the clips skipped, before anything heavy is loaded."""
    settings, data = recipe.settings, recipe.data
    report_held_out(data, recipe.output_dir)
    if not isinstance(data, PreparedData):
        report_skipped(data.bad, recipe.output_dir, data.dropped)
    sizes = {"batch_size": recipe.batch_limit, "num_ranks": num_ranks}
    logger.info("%s", describe_plan(data, settings, recipe.source, recipe.configs, **sizes))
    if warning := missing_token(settings, data):
        logger.warning("warning: %s", warning)
