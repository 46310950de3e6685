"""The flags of the training scripts, by group; those on data are in data_flags."""

import argparse

from common.hub_token import HubToken
from flags.tracking import add_tracking_flags
from flags.types import (
    add_config_flag,
    choice,
    decay_rate,
    finite_float,
    non_negative_float,
    non_negative_int,
    path,
    positive_float,
    positive_int,
    probability,
    seed,
)


LORA_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
ALL_LINEAR = "all-linear"
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def add_training_flags(group: argparse._ArgumentGroup, method: str) -> None:
    group.add_argument(
        "--output_dir",
        metavar="FOLDER",
        type=path,
        default=f"cogvideox-{method}",
        help="Where checkpoints, the result, videos and logs are written; created when missing. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=seed,
        help="Seed of everything random; give one to be able to repeat a run. (default: another every time)",
    )
    group.add_argument(
        "--mixed_precision",
        **choice(("no", "fp16", "bf16")),
        help="Precision of the computation. Use what the model was trained in: fp16 for CogVideoX-2b, bf16 for all "
        "others. (default: what the accelerate config says)",
    )
    group.add_argument(
        "--train_batch_size",
        metavar="N",
        type=positive_int,
        default=4,
        help="Clips per device and forward pass; lower it first when memory runs out. (default: %(default)s)",
    )
    group.add_argument(
        "--num_train_epochs",
        metavar="N",
        type=positive_int,
        default=1,
        help="Passes over the dataset; ignored when --max_train_steps is given. (default: %(default)s)",
    )
    group.add_argument(
        "--max_train_steps",
        metavar="N",
        type=positive_int,
        help="Optimizer steps in all, however many epochs that takes. (default: set by --num_train_epochs)",
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        metavar="N",
        type=positive_int,
        default=1,
        help="Forward passes whose gradients make up one optimizer step: a larger batch for no more memory. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="Compute activations again in the backward pass instead of keeping them: much less memory, slower "
        "steps. Needed for full-size clips on most cards. (default: off)",
    )


def add_checkpoint_flags(group: argparse._ArgumentGroup) -> None:
    """What a run goes on from, and when it must not go on."""
    group.add_argument(
        "--checkpointing_steps",
        metavar="N",
        type=positive_int,
        default=500,
        help="Write a checkpoint, from which training can go on, every N optimizer steps. (default: %(default)s)",
    )
    group.add_argument(
        "--checkpoint_minutes",
        metavar="X",
        type=positive_float,
        help="Write a checkpoint too when X minutes have passed since the last one. (default: by steps alone)",
    )
    group.add_argument(
        "--checkpoints_total_limit",
        metavar="N",
        type=positive_int,
        help="Keep only the newest N checkpoints; use it when disk space is short. (default: keep all)",
    )
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="FOLDER",
        type=path,
        help="Go on from a checkpoint: its folder, its name inside --output_dir, or latest for the newest one there "
        "that is whole. (default: start anew)",
    )
    group.add_argument(
        "--max_bad_steps",
        metavar="N",
        type=positive_int,
        default=10,
        help="End the run after N steps in a row whose loss or gradient is not finite; such steps change nothing. "
        "(default: %(default)s)",
    )


def add_encoding_flags(group: argparse._ArgumentGroup) -> None:
    """How raw clips are encoded while training."""
    group.add_argument(
        "--enable_slicing",
        action="store_true",
        help="Let the VAE encode one raw clip of a batch at a time: less memory, a little slower. Validation always "
        "does so. (default: off)",
    )
    group.add_argument(
        "--enable_tiling",
        action="store_true",
        help="Let the VAE encode raw clips in overlapping tiles of a frame: much less memory, slower. Validation "
        "always does so. (default: off)",
    )


def add_dry_run_flag(group: argparse._ArgumentGroup) -> None:
    """Try out instead of training."""
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="Check every sample, train two steps of the largest batch, save, load and sample in a folder that is "
        "removed again, and say how much memory that took; nothing else is written. (default: off)",
    )


def add_objective_flags(group: argparse._ArgumentGroup) -> None:
    """What is trained beside the published objective; the defaults are the published one."""
    group.add_argument(
        "--caption_dropout",
        metavar="P",
        type=probability,
        default=0.0,
        help="Probability (0 to 1) of training a clip without its caption, which keeps classifier-free guidance "
        "working after long runs; 0.05 to 0.1 is usual. (default: %(default)s)",
    )
    group.add_argument(
        "--timestep_sampling",
        **choice(("uniform", "logit_normal")),
        default="uniform",
        help="Distribution of the noise levels trained on; logit_normal trains the middle ones more often. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--logit_mean",
        metavar="X",
        type=finite_float,
        default=0.0,
        help="Middle of --timestep_sampling logit_normal; above 0 means noisier. (default: %(default)s)",
    )
    group.add_argument(
        "--logit_std",
        metavar="X",
        type=positive_float,
        default=1.0,
        help="Width of --timestep_sampling logit_normal. (default: %(default)s)",
    )
    group.add_argument(
        "--stratified_timesteps",
        action="store_true",
        help="Let the samples of a step share the noise levels out evenly among themselves, over all ranks: the same "
        "distribution, a steadier loss. (default: off)",
    )
    group.add_argument(
        "--snr_gamma",
        metavar="X",
        type=positive_float,
        help="Weigh the loss by min-SNR with this gamma (5 is usual), which counts the noisiest timesteps less. "
        "(default: all timesteps count alike)",
    )
    group.add_argument(
        "--use_ema",
        action="store_true",
        help="Keep a running average of the trained weights, which is what is validated and written at the end. "
        "Costs as much memory as they do. (default: off)",
    )
    group.add_argument(
        "--ema_decay",
        metavar="X",
        type=decay_rate,
        default=0.9999,
        help="With --use_ema, how slowly the average follows; it follows faster in the first steps. For short runs "
        "0.99 to 0.999. (default: %(default)s)",
    )


def add_schedule_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--learning_rate",
        metavar="X",
        type=non_negative_float,
        default=1e-4,
        help="Step size of the optimizer after warm-up. Published LoRA runs use 1e-4 to 1e-3, full fine-tuning about "
        "1e-5 to 5e-5; prodigy wants 1. (default: %(default)s)",
    )
    group.add_argument(
        "--scale_lr",
        action="store_true",
        help="Multiply the learning rate by devices x batch size x accumulation steps, to carry a rate over from a "
        "run with batches of one. (default: off)",
    )
    group.add_argument(
        "--lr_scheduler",
        **choice(LR_SCHEDULERS),
        default="constant",
        help="How the learning rate changes over the run. All but constant start with --lr_warmup_steps. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--lr_warmup_steps",
        metavar="N",
        type=non_negative_int,
        default=500,
        help="Optimizer steps over which the learning rate rises from 0; make it a small part of the run. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--lr_num_cycles",
        metavar="N",
        type=positive_int,
        default=1,
        help="Restarts of cosine_with_restarts; other schedulers ignore it. (default: %(default)s)",
    )
    group.add_argument(
        "--lr_power",
        metavar="X",
        type=positive_float,
        default=1.0,
        help="Exponent of polynomial: 1 falls in a straight line; other schedulers ignore it. (default: %(default)s)",
    )


def add_lora_flags(group: argparse._ArgumentGroup, method: str) -> None:
    group.add_argument(
        "--rank",
        metavar="N",
        type=positive_int,
        default=64,
        help="Rank of the LoRA matrices: higher can learn more and makes larger files. (default: %(default)s)",
    )
    group.add_argument(
        "--lora_alpha",
        metavar="X",
        type=positive_float,
        default=64,
        help="The LoRA's output is scaled by lora_alpha / rank; keep it at the rank for a scale of 1. "
        "(default: %(default)s)",
    )
    if method != "lora":
        return  # the two above are taken, with a warning, because launchers of both methods share them
    group.add_argument(
        "--lora_target_modules",
        metavar="NAME",
        nargs="+",
        default=list(LORA_TARGET_MODULES),
        help="Linear layers that get an adapter, by the end of their names: the attention's by default, ff.net.0.proj "
        f"and ff.net.2 are the feed-forward's; {ALL_LINEAR} for all those of the blocks. More learn more and make "
        f"larger files. (default: {' '.join(LORA_TARGET_MODULES)})",
    )
    group.add_argument(
        "--use_rslora",
        action="store_true",
        help="Scale the LoRA's output by lora_alpha / sqrt(rank), so that high ranks learn as fast as low ones. "
        "(default: off)",
    )
    group.add_argument(
        "--use_dora",
        action="store_true",
        help="Learn the weights' magnitudes beside their directions (DoRA): often better at low ranks, slower. "
        "(default: off)",
    )
    group.add_argument(
        "--lora_dropout",
        metavar="P",
        type=decay_rate,
        default=0.0,
        help="Probability of dropping an input of an adapter in training, against overfitting; 0.05 to 0.1 is usual. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--lora_weights",
        metavar="PATH",
        type=path,
        help="LoRA to start from: a .safetensors file, or a folder with pytorch_lora_weights.safetensors. It must "
        "have been trained with the same --rank and other LoRA flags. (default: start without effect)",
    )


def add_result_flags(group: argparse._ArgumentGroup) -> None:
    """What full fine-tuning writes at its end."""
    group.add_argument(
        "--save_pipeline",
        action="store_true",
        help="Write a whole pipeline to --output_dir/pipeline at the end: the tuned transformer and copies of the "
        "model's other parts, which take as much disk space as there. (default: off)",
    )


def add_image_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--noised_image_dropout",
        metavar="P",
        type=probability,
        default=0.05,
        help="Probability (0 to 1) of training a clip without its first frame as condition, which keeps the model "
        "from just copying it. (default: %(default)s)",
    )
    group.add_argument(
        "--ignore_learned_positional_embeddings",
        action="store_true",
        help="Drop the learned positions of CogVideoX-5b-I2V, which fit 49 x 480 x 720 only. Needed to train that "
        "model at any other size; the result then works without them too. (default: off)",
    )


def add_configuration_flags(group: argparse._ArgumentGroup, method: str) -> None:
    add_config_flag(group)
    add_tracking_flags(group, method)
    group.add_argument(
        "--logging_steps",
        metavar="N",
        type=positive_int,
        default=10,
        help="Fetch loss values from the device and write them to the trackers every N optimizer steps. Every step's "
        "value is logged, in batches; 1 shows them at once but makes the device wait. (default: %(default)s)",
    )
    group.add_argument(
        "--push_to_hub",
        action="store_true",
        help="Upload the result to the Hugging Face hub when training ends; whether the token may do so is looked at "
        "before it starts. (default: off)",
    )
    group.add_argument(
        "--hub_token",
        metavar="TOKEN",
        type=HubToken,
        help="Token for --push_to_hub. It is written nowhere here, but shells keep it in their history and launchers "
        "show it when a run fails: better log in once with `hf auth login`, or set HF_TOKEN. (default: these)",
    )
    group.add_argument(
        "--hub_model_id",
        metavar="ORG/NAME",
        help="Repository that --push_to_hub writes to. (default: the name of --output_dir)",
    )
    group.add_argument(
        "--nccl_timeout",
        metavar="SECONDS",
        type=positive_int,
        default=600,
        help="Seconds that a process waits for the others in a step before the run is taken for hanging and ended. "
        "Validation, saving and downloads are waited for without a limit. (default: %(default)s)",
    )
