"""The flags of training: the run, its checkpoints, the objective, the learning rate, the method."""

from dataclasses import dataclass

from flags.schema import flag
from flags.types import (
    decay_rate,
    finite_float,
    non_negative_float,
    non_negative_int,
    path,
    positive_float,
    positive_int,
    probability,
)
from flags.types import seed as seed_number


LORA_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
ALL_LINEAR = "all-linear"
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrainingFlags:
    """The run: its length, its batches, its precision."""

    output_dir: str = flag(
        "cogvideox-lora",
        "Where checkpoints, the result, videos and logs are written; created when missing.",
        type=path,
        metavar="FOLDER",
    )
    seed: int | None = flag(
        None,
        "Seed of everything random; give one to be able to repeat a run.",
        type=seed_number,
        metavar="N",
        shown="another every time",
    )
    mixed_precision: str | None = flag(
        None,
        "Precision of the computation. Use what the model was trained in: fp16 for CogVideoX-2b, bf16 for all others.",
        choices=("no", "fp16", "bf16"),
        shown="what the accelerate config says",
    )
    train_batch_size: int = flag(
        4, "Clips per device and forward pass; lower it first when memory runs out.", type=positive_int, metavar="N"
    )
    num_train_epochs: int = flag(
        1, "Passes over the dataset; ignored when --max_train_steps is given.", type=positive_int, metavar="N"
    )
    max_train_steps: int | None = flag(
        None,
        "Optimizer steps in all, however many epochs that takes.",
        type=positive_int,
        metavar="N",
        shown="set by --num_train_epochs",
    )
    gradient_accumulation_steps: int = flag(
        1,
        "Forward passes whose gradients make up one optimizer step: a larger batch for no more memory.",
        type=positive_int,
        metavar="N",
    )
    enable_slicing: bool = flag(
        False,
        "Let the VAE encode one raw clip of a batch at a time: less memory, a little slower. Validation always "
        "does so.",
    )
    enable_tiling: bool = flag(
        False,
        "Let the VAE encode raw clips in overlapping tiles of a frame: much less memory, slower. Validation "
        "always does so.",
    )
    dry_run: bool = flag(
        False,
        "Check every sample, train two steps of the largest batch, save, load and sample in a folder that is "
        "removed again, and say how much memory that took; nothing else is written.",
    )
    nccl_timeout: int = flag(
        600,
        "Seconds that a process waits for the others in a step before the run is taken for hanging and ended. "
        "Validation, saving and downloads are waited for without a limit.",
        type=positive_int,
        metavar="SECONDS",
    )


@dataclass(frozen=True)
class CheckpointFlags:
    """When training state is saved, and what a run resumes from."""

    checkpointing_steps: int = flag(
        500,
        "Write a checkpoint, from which training can go on, every N optimizer steps.",
        type=positive_int,
        metavar="N",
    )
    checkpoint_minutes: float | None = flag(
        None,
        "Write a checkpoint too when X minutes have passed since the last one.",
        type=positive_float,
        metavar="X",
        shown="by steps alone",
    )
    checkpoints_total_limit: int | None = flag(
        None,
        "Keep only the newest N checkpoints; use it when disk space is short.",
        type=positive_int,
        metavar="N",
        shown="keep all",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "Go on from a checkpoint: its folder, its name inside --output_dir, or latest for the newest one there "
        "that is whole.",
        type=path,
        metavar="FOLDER",
        shown="start anew",
    )
    max_bad_steps: int = flag(
        10,
        "End the run after N steps in a row whose loss or gradient is not finite; such steps change nothing.",
        type=positive_int,
        metavar="N",
    )


@dataclass(frozen=True)
class ObjectiveFlags:
    """Changes to the published objective; the defaults change nothing."""

    caption_dropout: float = flag(
        0.0,
        "Probability (0 to 1) of training a clip without its caption, which keeps classifier-free guidance "
        "working after long runs; 0.05 to 0.1 is usual.",
        type=probability,
        metavar="P",
    )
    timestep_sampling: str = flag(
        "uniform",
        "Distribution of the noise levels trained on; logit_normal trains the middle ones more often.",
        choices=("uniform", "logit_normal"),
    )
    logit_mean: float = flag(
        0.0, "Middle of --timestep_sampling logit_normal; above 0 means noisier.", type=finite_float, metavar="X"
    )
    logit_std: float = flag(1.0, "Width of --timestep_sampling logit_normal.", type=positive_float, metavar="X")
    stratified_timesteps: bool = flag(
        False,
        "Let the samples of a step share the noise levels out evenly among themselves, over all ranks: the same "
        "distribution, a steadier loss.",
    )
    snr_gamma: float | None = flag(
        None,
        "Weigh the loss by min-SNR with this gamma (5 is usual), which counts the noisiest timesteps less.",
        type=positive_float,
        metavar="X",
        shown="all timesteps count alike",
    )
    use_ema: bool = flag(
        False,
        "Keep a running average of the trained weights, which is what is validated and written at the end. Costs "
        "as much memory as they do.",
    )
    ema_decay: float = flag(
        0.9999,
        "With --use_ema, how slowly the average follows; it follows faster in the first steps. For short runs "
        "0.99 to 0.999.",
        type=decay_rate,
        metavar="X",
    )


@dataclass(frozen=True)
class ScheduleFlags:
    """The learning rate and how it changes over the run."""

    learning_rate: float = flag(
        0.0001,
        "Step size of the optimizer after warm-up. Published LoRA runs use 1e-4 to 1e-3, full fine-tuning about "
        "1e-5 to 5e-5; prodigy wants 1.",
        type=non_negative_float,
        metavar="X",
    )
    scale_lr: bool = flag(
        False,
        "Multiply the learning rate by devices x batch size x accumulation steps, to carry a rate over from a "
        "run with batches of one.",
    )
    lr_scheduler: str = flag(
        "constant",
        "How the learning rate changes over the run. All but constant start with --lr_warmup_steps.",
        choices=LR_SCHEDULERS,
    )
    lr_warmup_steps: int = flag(
        500,
        "Optimizer steps over which the learning rate rises from 0; make it a small part of the run.",
        type=non_negative_int,
        metavar="N",
    )
    lr_num_cycles: int = flag(
        1, "Restarts of cosine_with_restarts; other schedulers ignore it.", type=positive_int, metavar="N"
    )
    lr_power: float = flag(
        1.0,
        "Exponent of polynomial: 1 falls in a straight line; other schedulers ignore it.",
        type=positive_float,
        metavar="X",
    )


@dataclass(frozen=True)
class LoraFlags:
    """The LoRA to train."""

    rank: int = flag(
        64, "Rank of the LoRA matrices: higher can learn more and makes larger files.", type=positive_int, metavar="N"
    )
    lora_alpha: float = flag(
        64,
        "The LoRA's output is scaled by lora_alpha / rank; keep it at the rank for a scale of 1.",
        type=positive_float,
        metavar="X",
    )
    lora_target_modules: tuple[str, ...] = flag(
        LORA_TARGET_MODULES,
        "Linear layers that get an adapter, by the end of their names: the attention's by default, ff.net.0.proj "
        f"and ff.net.2 are the feed-forward's; {ALL_LINEAR} for all those of the blocks. More learn more and make "
        "larger files.",
        metavar="NAME",
    )
    use_rslora: bool = flag(
        False, "Scale the LoRA's output by lora_alpha / sqrt(rank), so that high ranks learn as fast as low ones."
    )
    use_dora: bool = flag(
        False, "Learn the weights' magnitudes beside their directions (DoRA): often better at low ranks, slower."
    )
    lora_dropout: float = flag(
        0.0,
        "Probability of dropping an input of an adapter in training, against overfitting; 0.05 to 0.1 is usual.",
        type=decay_rate,
        metavar="P",
    )
    lora_weights: str | None = flag(
        None,
        "LoRA to start from: a .safetensors file, or a folder with pytorch_lora_weights.safetensors. It must "
        "have been trained with the same --rank and other LoRA flags.",
        type=path,
        metavar="PATH",
        shown="start without effect",
    )


@dataclass(frozen=True)
class ImageFlags:
    """Image-to-video training."""

    noised_image_dropout: float = flag(
        0.05,
        "Probability (0 to 1) of training a clip without its first frame as condition, which keeps the model "
        "from just copying it.",
        type=probability,
        metavar="P",
    )
    ignore_learned_positional_embeddings: bool = flag(
        False,
        "Drop the learned positions of CogVideoX-5b-I2V, which fit 49 x 480 x 720 only. Needed to train that "
        "model at any other size; the result then works without them too.",
    )


@dataclass(frozen=True)
class FullFlags:
    """Full fine-tuning."""

    save_pipeline: bool = flag(
        False,
        "Write a whole pipeline to --output_dir/pipeline at the end: the tuned transformer and copies of the "
        "model's other parts, which take as much disk space as there.",
    )
