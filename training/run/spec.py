"""What a run is made from: flags, data, task, method and model, checked against one another before it starts."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLCogVideoX

from checkpoints.folder import check_space
from checkpoints.schedule import ScheduleStart
from checkpoints.state import TrainerState, find_checkpoint, read_state
from checks.deepspeed import describe_division
from common.errors import UserError
from common.ranks import launch_size, precision_of, uses_deepspeed, uses_fsdp
from data.buckets import Bucket
from data.plan import PreparedData, TrainingData, describe_plan, report_skipped
from data.prepared import check_encoders
from dataset import check_prepared
from diffusion.tasks import ImageToVideo, TextToVideo
from flags.model import ModelFlags
from flags.optimizer import LOW_BITS
from flags.schema import flag_values
from flags.settings import TrainingSettings
from memory.accounting import checkpoint_bytes
from memory.facts import model_facts
from memory.settings import memory_settings_of
from methods.full import FullFinetune
from methods.lora import Lora
from models.attention import check_attention
from models.compilation import check_compiler
from models.configs import DTYPES, ModelConfigs
from models.fingerprints import fingerprint_encoders
from models.source import ModelSource
from optimizers.build import check_launch
from parallel.context import ContextParallel, start_context_parallel
from parallel.coordinator import Coordinator
from parallel.fsdp import is_fsdp
from parallel.preflight import check_training
from run.launch import choose_seed, start_accelerator


logger = logging.getLogger(__name__)


# Each keeps its states in a way of its own.
OPTIMIZER_KINDS = (*LOW_BITS, "use_torchao", "use_cpu_offload_optimizer", "step_in_backward")
# A checkpoint brings its own, which flags would seem to change.
OPTIMIZER_NUMBERS = ("weight_decay", "beta1", "beta2", "beta3", "epsilon", "prodigy_decouple")
OPTIMIZER_NUMBERS += ("prodigy_use_bias_correction", "prodigy_safeguard_warmup")
Task = TextToVideo | ImageToVideo
Method = Lora | FullFinetune


@dataclass(frozen=True)
class RunSpec:
    """What a run is made from."""

    settings: TrainingSettings
    data: TrainingData
    task: Task
    method: Method
    source: ModelSource
    configs: ModelConfigs
    accelerator: Accelerator
    coordinator: Coordinator
    resumed: Path | None  # the checkpoint to go on from
    state: TrainerState  # where the loop starts: at step 0, or where the checkpoint is
    checkpoint_bytes: int  # that a checkpoint takes, or a little more
    context: ContextParallel | None = None  # divides each sample among ranks

    @property
    def data_rank(self) -> int:
        """This process's number among those with data of their own: ranks that divide a sample count as one."""
        return self.accelerator.process_index // self.settings.speed.context_parallel_size

    @property
    def num_data_ranks(self) -> int:
        """How many ranks have data of their own."""
        return count_data_ranks(self.settings, self.accelerator)

    def undivided(self) -> AbstractContextManager[None]:
        """Lets each rank compute whole samples by itself meanwhile."""
        return nullcontext() if self.context is None else self.context.off()

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return DTYPES[precision_of(self.settings.training.mixed_precision)]

    @property
    def sizes(self) -> set[Bucket]:
        """Of the clips of training and validation, and of the videos sampled."""
        return clip_sizes(self.settings, self.data)

    @property
    def output_dir(self) -> Path:
        """Where everything is written."""
        return Path(self.settings.training.output_dir)

    @property
    def video_fps(self) -> int:
        """The frame rate of validation videos."""
        return round(self.settings.clips.fps or 8)

    def usage(self, where: Path | str, model: str | None = None) -> str:
        """The code that loads the result.

        Args:
            where: the run's folder, or the repository that its result is uploaded to.
            model: what to call the model that was trained from; None for its path or hub id.
        """
        model = model or self.settings.model.pretrained_model_name_or_path
        return "\n".join(self.method.usage(self.task.pipeline_class.__name__, model, where, self.task.usage()))

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


def count_data_ranks(settings: TrainingSettings, accelerator: Accelerator) -> int:
    """How many ranks have data of their own: those that divide a sample count as one."""
    return accelerator.num_processes // settings.speed.context_parallel_size


def model_source(model: ModelFlags) -> ModelSource:
    """Return where the model is."""
    return ModelSource(model.pretrained_model_name_or_path, model.revision, model.variant, model.cache_dir)


def check_spec(settings: TrainingSettings, data: TrainingData, task: Task, method: Method) -> RunSpec:
    """Put a recipe together, by the configs alone, and say what it will train on.

    Raises:
        UserError: model, data, flags and the checkpoint to resume from do not go together.
    """
    source = model_source(settings.model)
    configs = source.configs()
    task.check_model(configs, clip_sizes(settings, data))
    method.check_model(configs, source)
    if isinstance(data, PreparedData):
        check_prepared(data.clips, configs)
    accelerator = start_accelerator(settings)
    coordinator = Coordinator()
    fingerprints = {"data": data.fingerprint}
    if data.held_out:
        fingerprints["validation data"] = data.held_out.fingerprint
    check_training(coordinator, flag_values(settings), fingerprints, f"{source.fingerprint()} {configs.kind}")
    check_device(settings, accelerator, configs)
    describe_data(settings, accelerator, data, source, configs)
    resumed = coordinator.from_main(
        lambda: find_checkpoint(settings.checkpoints.resume_from_checkpoint, Path(settings.training.output_dir))
    )
    lasting = lasting_settings(settings, data, task, method, configs)
    if resumed:
        state = read_state(resumed)
        state.check_settings(lasting)
    else:
        is_chosen = settings.memory.memory_budget_gb or settings.memory.auto_fit
        memory = asdict(memory_settings_of(settings)) if is_chosen else {}
        seed = coordinator.from_main(lambda: choose_seed(settings.training.seed))
        start = ScheduleStart(count_data_ranks(settings, accelerator), settings.training.gradient_accumulation_steps)
        state = TrainerState(0, seed, lasting, memory, start)
    num_bytes = checkpoint_bytes(model_facts(configs, method), memory_settings_of(settings))
    if uses_deepspeed():
        num_bytes = num_bytes * 5 // 3  # with the optimizer's weights and those of the module as DeepSpeed has them
    coordinator.from_main(lambda: check_space(Path(settings.training.output_dir), num_bytes, "a checkpoint"))
    context = start_context_parallel(
        settings.speed.context_parallel_size, timedelta(seconds=settings.training.nccl_timeout)
    )
    return RunSpec(
        settings, data, task, method, source, configs, accelerator, coordinator, resumed, state, num_bytes, context
    )


def lasting_settings(
    settings: TrainingSettings, data: TrainingData, task: Task, method: Method, configs: ModelConfigs
) -> dict[str, object]:
    """What a resumed run must have in common with its checkpoint, by flag."""
    return {
        "model": configs.kind,
        "training data": data.fingerprint,
        "--train_batch_size": settings.training.train_batch_size,
        "--optimizer": settings.optimizer.optimizer,
        "--use_ema": settings.objective.use_ema,
        **{f"--{name}": getattr(settings.optimizer, name) for name in (*OPTIMIZER_KINDS, *OPTIMIZER_NUMBERS)},
        **({} if settings.training.seed is None else {"--seed": settings.training.seed}),
        **task.settings,
        **method.settings,
        "DeepSpeed": describe_division(),
        "FSDP": uses_fsdp(),
    }


def clip_sizes(settings: TrainingSettings, data: TrainingData) -> set[Bucket]:
    """Of the clips of training and validation, and of the videos sampled."""
    held_out = data.held_out.buckets if data.held_out else []
    sampled = sampled_size(settings)
    return {*data.buckets, *held_out, *([sampled] if sampled else [])}


def sampled_size(settings: TrainingSettings) -> Bucket | None:
    """Of the validation videos, if there are any."""
    return (
        Bucket(settings.clips.max_num_frames, settings.clips.height, settings.clips.width)
        if settings.validation.prompts
        else None
    )


def check_device(settings: TrainingSettings, accelerator: Accelerator, configs: ModelConfigs) -> None:
    """Refuse what the device, this machine or the way of the launch cannot do.

    Raises:
        UserError: a package, a compiler or a GPU is missing, or the optimizer cannot work with several processes.
    """
    device, dtype = accelerator.device, DTYPES[precision_of(settings.training.mixed_precision)]
    head_dim = configs.transformer["attention_head_dim"]
    check_attention(settings.speed.attention_backend, "--attention_backend", device, dtype, head_dim, trains=True)
    validation = settings.speed.validation_attention_backend
    check_attention(validation, "--validation_attention_backend", device, dtype, head_dim, trains=False)
    if settings.speed.compile:
        check_compiler(device)
    if uses_fsdp() and launch_size() > 1 and not is_fsdp(accelerator):
        raise UserError("--config_file: accelerate takes FSDP for GPUs alone; use accelerate_configs/cpu.yaml here")
    check_launch(
        accelerator.distributed_type,
        dtype,
        settings.optimizer.optimizer,
        use_cpu_offload=settings.optimizer.use_cpu_offload_optimizer,
        step_in_backward=settings.optimizer.step_in_backward,
        bf16_weights=settings.memory.weights_dtype == "bf16",
    )


def describe_data(
    settings: TrainingSettings,
    accelerator: Accelerator,
    data: TrainingData,
    source: ModelSource,
    configs: ModelConfigs,
) -> None:
    """Say what will be trained on, before anything heavy is loaded; refuse data of other encoders than the model's.

    Raises:
        UserError: the data was prepared with another VAE, text encoder or tokenizer.
    """
    if isinstance(data, PreparedData):
        encoders = fingerprint_encoders(source.local_folder(), settings.model.variant)
        for folder in data.folders:
            problem = check_encoders(folder, encoders)
            if problem and not settings.prepared.ignore_prepared_mismatch:
                raise UserError(
                    f"--load_tensors: {problem}; prepare the data with "
                    f"{settings.model.pretrained_model_name_or_path}, or give --ignore_prepared_mismatch if you know "
                    "that they are equal"
                )
            if problem:
                logger.warning("warning: %s", problem)
    elif accelerator.is_main_process:
        report_skipped(data.bad, Path(settings.training.output_dir))
    if accelerator.is_main_process:
        plan = describe_plan(
            data,
            source,
            configs,
            batch_size=settings.training.train_batch_size,
            num_ranks=count_data_ranks(settings, accelerator),
            reshape_mode=settings.clips.video_reshape_mode,
        )
        logger.info("%s", plan)
