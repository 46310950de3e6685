"""What a run is made from: flags, data, task, method and model, checked against one another before it starts."""

import argparse
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
from common.errors import UserError
from common.ranks import launch_size, precision_of, uses_deepspeed, uses_fsdp
from data.buckets import Bucket
from data.plan import PreparedData, TrainingData, describe_plan, report_skipped
from data.prepared import check_encoders
from dataset import check_prepared
from diffusion.tasks import ImageToVideo, TextToVideo
from flags.deepspeed import describe_division
from flags.optimizer import LOW_BITS
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

    args: argparse.Namespace
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
        return self.accelerator.process_index // self.args.context_parallel_size

    @property
    def num_data_ranks(self) -> int:
        """How many ranks have data of their own."""
        return count_data_ranks(self.args, self.accelerator)

    def undivided(self) -> AbstractContextManager[None]:
        """Lets each rank compute whole samples by itself meanwhile."""
        return nullcontext() if self.context is None else self.context.off()

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return DTYPES[precision_of(self.args)]

    @property
    def sizes(self) -> set[Bucket]:
        """Of the clips of training and validation, and of the videos sampled."""
        return clip_sizes(self.args, self.data)

    @property
    def output_dir(self) -> Path:
        """Where everything is written."""
        return Path(self.args.output_dir)

    @property
    def video_fps(self) -> int:
        """The frame rate of validation videos."""
        return round(self.args.fps or 8)

    def usage(self, where: Path | str, model: str | None = None) -> str:
        """The code that loads the result.

        Args:
            where: the run's folder, or the repository that its result is uploaded to.
            model: what to call the model that was trained from; None for its path or hub id.
        """
        model = model or self.args.pretrained_model_name_or_path
        return "\n".join(self.method.usage(self.task.pipeline_class.__name__, model, where, self.task.usage()))

    def load_vae(self, device: torch.device, *, decoder_only: bool = False) -> AutoencoderKLCogVideoX:
        """Load the VAE with the memory savings that the flags ask for."""
        args = self.args
        return self.source.load_vae(
            self.dtype,
            slicing=args.enable_slicing,
            tiling=args.enable_tiling,
            device=device,
            decoder_only=decoder_only,
        )


def count_data_ranks(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """How many ranks have data of their own: those that divide a sample count as one."""
    return accelerator.num_processes // args.context_parallel_size


def model_source(args: argparse.Namespace) -> ModelSource:
    """Where the model lies."""
    return ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir)


def check_spec(args: argparse.Namespace, data: TrainingData, task: Task, method: Method) -> RunSpec:
    """Put a recipe together, by the configs alone, and say what it will train on.

    Raises:
        UserError: model, data, flags and the checkpoint to resume from do not go together.
    """
    source = model_source(args)
    configs = source.configs()
    task.check_model(configs, clip_sizes(args, data))
    method.check_model(configs, source)
    if isinstance(data, PreparedData):
        check_prepared(data.clips, configs)
    accelerator = start_accelerator(args)
    coordinator = Coordinator()
    fingerprints = {"data": data.fingerprint}
    if data.held_out:
        fingerprints["validation data"] = data.held_out.fingerprint
    check_training(coordinator, args, fingerprints, f"{source.fingerprint()} {configs.kind}")
    check_device(args, accelerator, configs)
    describe_data(args, accelerator, data, source, configs)
    resumed = coordinator.from_main(lambda: find_checkpoint(args.resume_from_checkpoint, Path(args.output_dir)))
    settings = lasting_settings(args, data, task, method, configs)
    if resumed:
        state = read_state(resumed)
        state.check_settings(settings)
    else:
        is_chosen = args.memory_budget_gb or args.auto_fit
        memory = asdict(memory_settings_of(args)) if is_chosen else {}
        seed = coordinator.from_main(lambda: choose_seed(args.seed))
        start = ScheduleStart(count_data_ranks(args, accelerator), args.gradient_accumulation_steps)
        state = TrainerState(0, seed, settings, memory, start)
    num_bytes = checkpoint_bytes(model_facts(configs, method), memory_settings_of(args))
    if uses_deepspeed():
        num_bytes = num_bytes * 5 // 3  # with the optimizer's weights and those of the module as DeepSpeed has them
    coordinator.from_main(lambda: check_space(Path(args.output_dir), num_bytes, "a checkpoint"))
    context = start_context_parallel(args.context_parallel_size, timedelta(seconds=args.nccl_timeout))
    return RunSpec(
        args, data, task, method, source, configs, accelerator, coordinator, resumed, state, num_bytes, context
    )


def lasting_settings(
    args: argparse.Namespace, data: TrainingData, task: Task, method: Method, configs: ModelConfigs
) -> dict[str, object]:
    """What a resumed run must have in common with its checkpoint, by flag."""
    return {
        "model": configs.kind,
        "training data": data.fingerprint,
        "--train_batch_size": args.train_batch_size,
        "--optimizer": args.optimizer,
        "--use_ema": args.use_ema,
        **{f"--{name}": getattr(args, name) for name in (*OPTIMIZER_KINDS, *OPTIMIZER_NUMBERS)},
        **({} if args.seed is None else {"--seed": args.seed}),
        **task.settings,
        **method.settings,
        "DeepSpeed": describe_division(),
        "FSDP": uses_fsdp(),
    }


def clip_sizes(args: argparse.Namespace, data: TrainingData) -> set[Bucket]:
    """Of the clips of training and validation, and of the videos sampled."""
    held_out = data.held_out.buckets if data.held_out else []
    sampled = sampled_size(args)
    return {*data.buckets, *held_out, *([sampled] if sampled else [])}


def sampled_size(args: argparse.Namespace) -> Bucket | None:
    """Of the validation videos, if there are any."""
    return Bucket(args.max_num_frames, args.height, args.width) if args.validation_prompts else None


def check_device(args: argparse.Namespace, accelerator: Accelerator, configs: ModelConfigs) -> None:
    """Refuse what the device, this machine or the way of the launch cannot do.

    Raises:
        UserError: a package, a compiler or a GPU is missing, or the optimizer cannot work with several processes.
    """
    device, dtype = accelerator.device, DTYPES[precision_of(args)]
    head_dim = configs.transformer["attention_head_dim"]
    check_attention(args.attention_backend, "--attention_backend", device, dtype, head_dim, trains=True)
    validation = args.validation_attention_backend
    check_attention(validation, "--validation_attention_backend", device, dtype, head_dim, trains=False)
    if args.compile:
        check_compiler(device)
    if uses_fsdp() and launch_size() > 1 and not is_fsdp(accelerator):
        raise UserError("--config_file: accelerate takes FSDP for GPUs alone; use accelerate_configs/cpu.yaml here")
    check_launch(
        accelerator.distributed_type,
        dtype,
        args.optimizer,
        use_cpu_offload=args.use_cpu_offload_optimizer,
        step_in_backward=args.step_in_backward,
        bf16_weights=args.weights_dtype == "bf16",
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
        plan = describe_plan(
            data,
            source,
            configs,
            batch_size=args.train_batch_size,
            num_ranks=count_data_ranks(args, accelerator),
            reshape_mode=args.video_reshape_mode,
        )
        logger.info("%s", plan)
