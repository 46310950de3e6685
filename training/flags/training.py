"""The flags of training: the run, its checkpoints, the objective, the learning rate, the method."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import (
    AnyPath,
    ConditionFrames,
    DecayRate,
    FiniteFloat,
    FolderPath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
)


LORA_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
ALL_LINEAR = "all-linear"
ADAPTERS = ("lora", "lokr", "loha")
LOKR_FACTOR = 8
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrainingFlags:
    """The run: its length, its batches, its precision."""

    output_dir: FolderPath = flag("cogvideox-lora", "Folder of checkpoints, result, videos and logs; may be new.")
    seed: Seed | None = flag(None, "Seed of all randomness; set it to make a run repeatable.", shown="random")
    mixed_precision: str | None = flag(
        None,
        "Compute precision. Use the model's training precision: fp16 for CogVideoX-2b, bf16 for all others.",
        choices=("no", "fp16", "bf16"),
        shown="from the accelerate config",
    )
    train_batch_size: PositiveInt = flag(4, "Clips per device and micro-batch; lower it first if memory runs out.")
    max_tokens_per_batch: PositiveInt | None = flag(
        None,
        "Instead of --train_batch_size clips of one size, fill each micro-batch with clips of any size up to so many "
        "tokens, so that steps cost the same; the plan lists the tokens of each size.",
        shown="none",
    )
    num_train_epochs: PositiveInt = flag(1, "Passes over the dataset; --max_train_steps overrides it.")
    max_train_steps: PositiveInt | None = flag(None, "Optimizer steps of the run.", shown="by --num_train_epochs")
    gradient_accumulation_steps: PositiveInt = flag(1, "Micro-batches per step: a larger batch in the same memory.")
    enable_slicing: bool = flag(False, "Let the VAE encode one clip at a time: less memory. Always on in validation.")
    enable_tiling: bool = flag(False, "Let the VAE encode tiles: much less memory, slower. Always on in validation.")
    dry_run: bool = flag(
        False,
        "Check every sample, then train two steps of the largest batch, save, load and sample in a temporary folder, "
        "and report the peak memory. Nothing else is written.",
    )
    nccl_timeout: PositiveInt = flag(600, "Longest wait for other processes in a step.", metavar="SECONDS")


@dataclass(frozen=True)
class CheckpointFlags:
    """When training state is saved, and what a run resumes from."""

    checkpointing_steps: PositiveInt = flag(500, "Save a checkpoint to resume from every N optimizer steps.")
    checkpoint_minutes: PositiveFloat | None = flag(None, "Also save X minutes after the last.", shown="only by steps")
    checkpoints_total_limit: PositiveInt | None = flag(None, "Keep only the newest N checkpoints.", shown="keep all")
    resume_from_checkpoint: FolderPath | None = flag(
        None, "Checkpoint to resume: folder, name in --output_dir, or latest (the newest).", shown="start from scratch"
    )
    max_bad_steps: PositiveInt = flag(10, "End after N steps in a row whose loss is not finite; these are skipped.")


@dataclass(frozen=True)
class ObjectiveFlags:
    """Changes to the published objective; the defaults change nothing."""

    caption_dropout: Probability = flag(0.0, "Probability of no caption, for guidance; 0.05 to 0.1 is usual.")
    timestep_sampling: str = flag(
        "uniform", "Timesteps: logit_normal favors middle noise levels.", choices=("uniform", "logit_normal")
    )
    logit_mean: FiniteFloat = flag(0.0, "Mean of --timestep_sampling logit_normal; above 0 is noisier.")
    logit_std: PositiveFloat = flag(1.0, "Standard deviation of --timestep_sampling logit_normal.")
    stratified_timesteps: bool = flag(False, "Spread a step's timesteps over samples and ranks: a steadier loss.")
    snr_gamma: PositiveFloat | None = flag(None, "Weight the loss by min-SNR with this gamma (often 5).", shown="off")
    mask_background_weight: Probability = flag(
        0.0, "With --use_masks, the weight of black, relative to white; raise it a little if surroundings dissolve."
    )
    use_ema: bool = flag(False, "Validate and save a running average of the weights; it needs as much memory.")
    ema_decay: DecayRate = flag(0.9999, "Decay of --use_ema, lower in the first steps. Short runs: 0.99 to 0.999.")


@dataclass(frozen=True)
class ScheduleFlags:
    """The learning rate and its schedule."""

    learning_rate: NonNegativeFloat = flag(
        0.0001, "After warm-up. Published LoRA runs use 1e-4 to 1e-3, full fine-tuning 1e-5 to 5e-5; prodigy needs 1."
    )
    scale_lr: bool = flag(False, "Multiply the rate (of a batch of one) by devices x batch size x accumulation steps.")
    lr_scheduler: str = flag("constant", "Schedule; all but constant begin with a warm-up.", choices=LR_SCHEDULERS)
    lr_warmup_steps: NonNegativeInt = flag(500, "Steps in which the rate rises from 0; a small part of the run.")
    lr_num_cycles: PositiveInt = flag(1, "Restarts of cosine_with_restarts; other schedulers ignore it.")
    lr_power: PositiveFloat = flag(1.0, "Exponent of polynomial (1 is linear); other schedulers ignore it.")


@dataclass(frozen=True)
class LoraFlags:
    """The LoRA to train."""

    adapter: str = flag(
        "lora",
        "Kind of adapter. lokr: Kronecker products, about 1/8 of the file; loha: products of two LoRAs, of a rank up "
        "to rank^2 (use --rank 4 to 16). convert_lora.py turns both into a LoRA for other tools.",
        choices=ADAPTERS,
    )
    lokr_factor: PositiveInt = flag(
        LOKR_FACTOR, "Size of the small matrix of --adapter lokr: a higher factor makes smaller files."
    )
    rank: PositiveInt = flag(64, "Rank of the LoRA matrices: a higher rank can learn more, and makes larger files.")
    lora_alpha: PositiveFloat = flag(64, "The LoRA's output is scaled by lora_alpha / rank; rank means 1.")
    lora_target_modules: tuple[str, ...] = flag(
        LORA_TARGET_MODULES,
        "Linear layers that get an adapter, by the end of their names. The default is attention; add ff.net.0.proj "
        f"and ff.net.2 for the feed-forward, or use {ALL_LINEAR} for all in the blocks. More layers learn more and "
        "make larger files.",
    )
    use_rslora: bool = flag(False, "Scale by lora_alpha / sqrt(rank), so that high ranks learn as fast as low ones.")
    use_dora: bool = flag(False, "Also learn the magnitudes of weights (DoRA): often better at low ranks, slower.")
    lora_dropout: DecayRate = flag(0.0, "Dropout of adapter inputs, against overfitting; 0.05 to 0.1 is usual.")
    lora_weights: AnyPath | None = flag(
        None,
        "LoRA to start from, trained with the same --rank and other LoRA flags: a .safetensors file, or a folder with "
        "pytorch_lora_weights.safetensors.",
        shown="start without effect",
    )


@dataclass(frozen=True)
class ImageFlags:
    """Image-to-video training."""

    noised_image_dropout: Probability = flag(0.05, "Probability of no image, so that it is not just copied.")
    condition_frames: ConditionFrames = flag(
        "first",
        "The frames that a video is made from. first,last: also its last one. first:K: its first 4K-3, of K latent "
        "frames, to continue a video.",
    )
    ignore_learned_positional_embeddings: bool = flag(
        False,
        "Drop the learned positional embeddings of CogVideoX-5b-I2V, which fit only 49 x 480 x 720. Needed to train "
        "that model at any other size; the result then works without them.",
    )


@dataclass(frozen=True)
class FullFlags:
    """Full fine-tuning."""

    save_pipeline: bool = flag(False, "In the end also write a full pipeline to --output_dir/pipeline (large).")
    save_validation_weights: bool = flag(
        False, "Keep the weights of every validation beside its videos (large), to use the step that looks best."
    )
