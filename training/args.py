"""Every command-line flag, and the checks which need no model.

Only the standard library is imported, so `--help` and every mistake in the flags show within a fraction of a second,
before anything heavy is loaded.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from errors import UserError
from flag_checks import (
    check_data,
    check_files,
    check_frames,
    check_hub,
    check_low_bit,
    check_no_earlier_run,
    check_optimizer,
    check_prepared_flags,
    check_sizes,
    check_validation,
    check_validation_images,
    find_checkpoint,
    training_warnings,
)
from flag_types import (
    FlagParser,
    choice,
    decay_rate,
    non_negative_float,
    non_negative_int,
    path,
    positive_float,
    positive_int,
    probability,
)


TASKS = ("text-to-video", "image-to-video")
METHODS = ("lora", "sft")
DATA_FLAGS = ("data_root", "dataset_file", "dataset_name", "dataset_mix")  # one of them names the data
DEFAULT_BUCKETS = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)
DEFAULT_HEIGHT = 480
DEFAULT_WIDTH = 720

OPTIMIZERS = ("adam", "adamw", "prodigy", "came")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def parse_args(argv: Sequence[str] | None = None, *, task: str, method: str) -> argparse.Namespace:
    """Read and check the flags of a training script.

    Besides one attribute for each flag, the result has `validation_prompts` (list of str, stripped). On return,
    `height_buckets`, `width_buckets` and `frame_buckets` are lists of int, `height` and `width` are ints and
    `validation_images` is a list of str.

    Args:
        argv: the flags; those of the running process when None.
        task: "text-to-video" or "image-to-video".
        method: "lora" or "sft".

    Returns:
        The flags, every one checked as far as this is possible without loading anything.

    Raises:
        SystemExit: code 2 after one line on stderr when a flag is wrong; code 0 after `--help`.
        ValueError: the caller passed an unknown task or method.
    """
    if task not in TASKS or method not in METHODS:
        raise ValueError(f"task must be one of {TASKS} and method one of {METHODS}, not {task!r} and {method!r}")
    parser = _training_parser(task, method)
    args, given = parser.read(argv)
    try:
        _fill_sizes(args, given)
        _split_validation(args)
        check_sizes(args)
        check_frames(args)
        check_data(args)
        args.long_clips = args.long_clips or ("first" if args.fps else "spread")
        check_validation(args, task)
        check_low_bit(args)
        check_optimizer(args, given)
        check_hub(args)
        check_files(
            model=args.pretrained_model_name_or_path,
            data_root=args.data_root,
            dataset_file=args.dataset_file,
            output_dir=args.output_dir,
        )
        check_validation_images(args, task)
        check_prepared_flags(args, given)
        find_checkpoint(args)
        check_no_earlier_run(args)
    except UserError as error:
        parser.error(str(error))
    _warn(training_warnings(args, given, task, method))
    _drop_long_buckets(args)
    return args


def parse_prepare_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags of prepare_dataset.py.

    Args:
        argv: the flags; those of the running process when None.

    Returns:
        One attribute for each flag; buckets are lists of int, `height` and `width` ints.

    Raises:
        SystemExit: code 2 after one line on stderr when a flag is wrong; code 0 after `--help`.
    """
    parser = _prepare_parser()
    args, given = parser.read(argv)
    try:
        _fill_sizes(args, given)
        check_sizes(args)
        check_frames(args)
        check_data(args)
        args.long_clips = args.long_clips or ("first" if args.fps else "spread")
        if args.save_image_latents and not args.save_latents_and_embeddings:
            raise UserError("--save_image_latents: latents are written by --save_latents_and_embeddings; add it")
        if args.layout == "shards" and not args.save_latents_and_embeddings:
            raise UserError("--layout shards: shards hold latents; add --save_latents_and_embeddings")
        args.layout = args.layout or ("shards" if args.save_latents_and_embeddings else "files")
        if args.layout == "files" and args.num_image_latents > 1:
            if "num_image_latents" in given:
                raise UserError("--num_image_latents: --layout files has room for one; leave it out, or use shards")
            args.num_image_latents = 1
        check_files(
            model=args.model_id,
            data_root=args.data_root,
            dataset_file=args.dataset_file,
            output_dir=args.output_dir,
            model_flag="--model_id",
        )
    except UserError as error:
        parser.error(str(error))
    _drop_long_buckets(args)
    return args


def _training_parser(task: str, method: str) -> FlagParser:
    what = {"lora": "Train a LoRA for", "sft": "Fine-tune all weights of"}[method]
    parser = FlagParser(
        usage="%(prog)s --pretrained_model_name_or_path MODEL --data_root FOLDER [flags]",
        description=f"{what} a CogVideoX {task} model on your own clips.",
        required=(("pretrained_model_name_or_path",), DATA_FLAGS),
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path",
        metavar="MODEL",
        type=path,
        help="Required. Model to start from: a hub id such as THUDM/CogVideoX-5b, or a local folder in the diffusers "
        "layout (with model_index.json).",
    )
    _add_download_flags(model)
    data = parser.add_argument_group("data")
    _add_data_flags(data, caption_column="text")
    data.add_argument(
        "--load_tensors",
        action="store_true",
        help="Train on latents and embeddings written by prepare_dataset.py, with --data_root as its --output_dir. "
        "Saves loading the VAE and the text encoder and makes steps faster; use it whenever you train for more than "
        "one epoch. (default: off)",
    )
    data.add_argument(
        "--ignore_prepared_mismatch",
        action="store_true",
        help="With --load_tensors, go on with a warning when the data was prepared with other encoders than the "
        "model's. (default: off)",
    )
    _add_validation_flags(parser.add_argument_group("validation"))
    _add_training_flags(parser.add_argument_group("training"), method)
    _add_schedule_flags(parser.add_argument_group("learning rate"))
    _add_lora_flags(parser.add_argument_group("lora (no effect on full fine-tuning)"))
    _add_image_flags(parser.add_argument_group("image-to-video (no effect on text-to-video)"))
    _add_optimizer_flags(parser.add_argument_group("optimizer"))
    _add_memory_flags(parser.add_argument_group("optimizer memory"))
    _add_configuration_flags(parser.add_argument_group("configuration"), method)
    return parser


def _prepare_parser() -> FlagParser:
    parser = FlagParser(
        usage="%(prog)s --data_root FOLDER --output_dir FOLDER [flags]",
        description="Turn clips and captions into latents and text embeddings on disk, for training with "
        "--load_tensors.",
        required=(DATA_FLAGS, ("output_dir",)),
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_id",
        "--pretrained_model_name_or_path",
        metavar="MODEL",
        type=path,
        default="THUDM/CogVideoX-2b",
        help="Model whose VAE and text encoder are used: a hub id or a local folder in the diffusers layout. Give the "
        "model that you are going to train. (default: %(default)s)",
    )
    _add_download_flags(model)
    model.add_argument(
        "--dtype",
        **choice(("fp32", "fp16", "bf16")),
        default="fp32",
        help="Precision of the VAE, the text encoder and what they write. bf16 halves memory and disk space. "
        "(default: %(default)s)",
    )
    _add_data_flags(parser.add_argument_group("data"), caption_column="caption")
    _add_prepare_flags(parser.add_argument_group("preparation"))
    _add_prepare_speed_flags(parser.add_argument_group("memory and speed"))
    return parser


def _add_download_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--revision",
        help="Branch, tag or commit of the model on the hub. Give a commit to make a run repeatable. "
        "(default: the main branch)",
    )
    group.add_argument(
        "--variant",
        help="Variant of the weight files, such as fp16 for files named *.fp16.safetensors. Only for models that are "
        "stored in several. (default: the plain files)",
    )
    group.add_argument(
        "--cache_dir",
        metavar="FOLDER",
        type=path,
        help="Where downloaded models are kept. Use it when your home disk is small. (default: the hub's own cache)",
    )


def _add_data_flags(group: argparse._ArgumentGroup, *, caption_column: str) -> None:
    """The flags on clips which training and preparation share; they differ only in the default caption column."""
    _add_dataset_flags(group, caption_column)
    _add_dataset_name_flags(group)
    _add_size_flags(group)
    _add_frame_flags(group)
    _add_long_clip_flags(group)
    group.add_argument(
        "--random_flip",
        metavar="P",
        type=probability,
        help="Probability (0 to 1) of mirroring a clip left to right: one coin per clip, so all its frames agree. "
        "Avoid it when clips show text or captions say left and right. (default: no flips)",
    )
    group.add_argument(
        "--dataloader_num_workers",
        metavar="N",
        type=non_negative_int,
        default=0,
        help="Processes that read clips while the model computes; 0 reads in the main process. Raise it (4 to 8) when "
        "steps wait for data. (default: %(default)s)",
    )
    group.add_argument(
        "--pin_memory",
        action="store_true",
        help="Keep batches in page-locked memory, which makes copies to a GPU faster at the cost of RAM. "
        "(default: off)",
    )


def _add_dataset_flags(group: argparse._ArgumentGroup, caption_column: str) -> None:
    group.add_argument(
        "--data_root",
        "--instance_data_root",
        metavar="FOLDER",
        type=path,
        help="Folder that holds the clips; required unless --dataset_file, --dataset_name or --dataset_mix is given. "
        "It lists them in two text files (see --video_column), or has a caption clip.txt beside each clip.mp4.",
    )
    group.add_argument(
        "--dataset_file",
        metavar="FILE",
        type=path,
        help="Table with one row per clip: .csv, .tsv, .jsonl, .json or .parquet. Paths in it are relative to "
        "--data_root, or to the file itself without one. (default: none)",
    )
    group.add_argument(
        "--video_column",
        metavar="NAME",
        default="video",
        help="Column with the clips' paths, or name of the text file in --data_root that lists them, videos.txt "
        "otherwise. (default: %(default)s)",
    )
    group.add_argument(
        "--caption_column",
        metavar="NAME",
        default=caption_column,
        help="Column with the captions, or name of the text file that lists them, prompts.txt otherwise. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--image_column",
        metavar="NAME",
        help="Image-to-video: column with images to start from, or name of the text file that lists them. Where it is "
        "empty, a clip starts from its own first frame. (default: image or images.txt, where there is one)",
    )
    group.add_argument(
        "--id_token",
        metavar="WORD",
        help="Rare word put in front of every caption, which then calls up what you trained; use the same word in "
        "prompts later. (default: none)",
    )
    group.add_argument(
        "--on_bad_clip",
        **choice(("error", "skip")),
        default="error",
        help="What to do about clips that are missing, damaged, too short or without a caption: list them all and "
        "stop, or leave them out and list them in skipped_clips.csv in --output_dir. (default: %(default)s)",
    )


def _add_dataset_name_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset_name",
        metavar="NAME",
        help="Data set on the Hugging Face hub, or a local one, as `datasets.load_dataset` takes it; its clips may be "
        "paths, bytes or decoded videos. (default: none)",
    )
    group.add_argument(
        "--dataset_config_name",
        metavar="NAME",
        help="Configuration of --dataset_name. (default: its only one)",
    )
    group.add_argument(
        "--dataset_split",
        metavar="NAME",
        default="train",
        help="Split of --dataset_name. (default: %(default)s)",
    )
    group.add_argument(
        "--dataset_streaming",
        action="store_true",
        help="Read --dataset_name row by row instead of downloading all of it first; with --max_samples, only what is "
        "used is downloaded. (default: off)",
    )
    group.add_argument(
        "--max_samples",
        metavar="N",
        type=positive_int,
        help="Use only the first N rows of the data set, to try something out. (default: all)",
    )
    group.add_argument(
        "--dataset_mix",
        metavar="JSON",
        type=path,
        help="Several data sets: a JSON file with a list of objects, each with these flags as keys and with repeats "
        "(how often its clips come in an epoch) or weight (its share of an epoch). (default: none)",
    )


def _add_size_flags(group: argparse._ArgumentGroup) -> None:
    buckets = " ".join(map(str, DEFAULT_BUCKETS))
    group.add_argument(
        "--height_buckets",
        metavar="PX",
        nargs="+",
        type=positive_int,
        help="Heights in pixels, multiples of 16; each clip is resized to the nearest height x width of the two "
        "lists. When neither list is given but both --height and --width are, that one size is used for all clips. "
        f"(default: {buckets})",
    )
    group.add_argument(
        "--width_buckets",
        metavar="PX",
        nargs="+",
        type=positive_int,
        help=f"Widths in pixels, multiples of 16; see --height_buckets. (default: {buckets})",
    )
    group.add_argument(
        "--height",
        metavar="PX",
        type=positive_int,
        help="Height in pixels, a multiple of 16, of validation videos; together with --width, and without bucket "
        f"lists, also the only size of clips. (default: {DEFAULT_HEIGHT})",
    )
    group.add_argument(
        "--width",
        metavar="PX",
        type=positive_int,
        help=f"Width in pixels, a multiple of 16; see --height. (default: {DEFAULT_WIDTH})",
    )
    group.add_argument(
        "--video_reshape_mode",
        **choice(("center", "random", "none")),
        default="center",
        help="How a clip gets its bucket's size: center and random resize it with its aspect kept and crop the middle "
        "or a random part; none stretches it, which distorts clips of another aspect. (default: %(default)s)",
    )


def _add_frame_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--frame_buckets",
        metavar="N",
        nargs="+",
        type=positive_int,
        default=[49],
        help="Lengths in frames that clips are cut to: 1, or numbers of the form 4k or 4k+1. The models know 49 "
        "(CogVideoX 1.5: 81). (default: 49)",
    )
    group.add_argument(
        "--max_num_frames",
        metavar="N",
        type=positive_int,
        default=49,
        help="Longest clip in frames, and the length of validation videos. Raise it together with --frame_buckets. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--fps",
        metavar="RATE",
        type=positive_float,
        help="Sample clips in time at this many frames per second, so that motion keeps its speed; give the model's "
        "own rate (8, CogVideoX 1.5: 16). Without it frames are spread evenly over the clip, and written videos play "
        "at 8. (default: not resampled)",
    )
    for end in ("start", "end"):
        group.add_argument(
            f"--skip_frames_{end}",
            metavar="N",
            type=non_negative_int,
            default=0,
            help=f"Frames of the file to leave out at the clip's {end}, for title cards and fades. "
            "(default: %(default)s)",
        )


def _add_long_clip_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--long_clips",
        **choice(("spread", "first", "split")),
        help="What to take of a clip longer than its frame bucket: spread takes frames evenly from all of it, first "
        "its first frames in succession, split makes several samples of successive frames. "
        "(default: spread; with --fps, which spread cannot keep, first)",
    )
    group.add_argument(
        "--hold_last_frame",
        action="store_true",
        help="Fill clips that are too short for the smallest frame bucket by holding their last frame; otherwise they "
        "are bad clips. (default: off)",
    )


def _add_validation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--validation_prompt",
        metavar="TEXT",
        help="Prompts to make videos from during and after training, several joined by --validation_prompt_separator. "
        "Without it nothing is validated.",
    )
    group.add_argument(
        "--validation_images",
        metavar="PATHS",
        help="Image-to-video: first frames, one path or http(s) URL per prompt, joined by the same separator.",
    )
    group.add_argument(
        "--validation_prompt_separator",
        metavar="TEXT",
        default=":::",
        help="What stands between two prompts or two images; change it when a prompt contains it. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--num_validation_videos",
        metavar="N",
        type=positive_int,
        default=1,
        help="Videos per prompt; more show how much the seed matters, each costs a full sampling. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--validation_steps",
        metavar="N",
        type=positive_int,
        help="Validate every N optimizer steps. (default: only once, when training ends)",
    )
    group.add_argument(
        "--validation_epochs",
        metavar="N",
        type=positive_int,
        help="Validate every N epochs; handy when the dataset is small. (default: only once, when training ends)",
    )
    group.add_argument(
        "--num_inference_steps",
        metavar="N",
        type=positive_int,
        default=50,
        help="Denoising steps of a validation video; fewer are faster but coarser. (default: %(default)s)",
    )
    group.add_argument(
        "--guidance_scale",
        metavar="X",
        type=non_negative_float,
        default=6.0,
        help="Strength of classifier-free guidance in validation; higher follows the prompt more closely, 1 and below "
        "switch it off. (default: %(default)s)",
    )
    group.add_argument(
        "--use_dynamic_cfg",
        action="store_true",
        help="Let the guidance grow over the denoising steps instead of keeping it constant. (default: off)",
    )
    group.add_argument(
        "--enable_model_cpu_offload",
        action="store_true",
        help="In validation keep each network on the CPU except while it works: slower, but needs less GPU memory. "
        "(default: off)",
    )


def _add_training_flags(group: argparse._ArgumentGroup, method: str) -> None:
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
        type=non_negative_int,
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
    group.add_argument(
        "--checkpointing_steps",
        metavar="N",
        type=positive_int,
        default=500,
        help="Write a checkpoint, from which training can go on, every N optimizer steps. (default: %(default)s)",
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
        help="Go on from a checkpoint: its folder, its name inside --output_dir, or latest for the newest one there. "
        "(default: start anew)",
    )
    group.add_argument(
        "--enable_slicing",
        action="store_true",
        help="Let the VAE work on one clip of a batch at a time: less memory, a little slower. (default: off)",
    )
    group.add_argument(
        "--enable_tiling",
        action="store_true",
        help="Let the VAE work on overlapping tiles of a frame: much less memory, slower. Use it when encoding or "
        "validation runs out of memory. (default: off)",
    )


def _add_schedule_flags(group: argparse._ArgumentGroup) -> None:
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


def _add_lora_flags(group: argparse._ArgumentGroup) -> None:
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


def _add_image_flags(group: argparse._ArgumentGroup) -> None:
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


def _add_optimizer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optimizer",
        **choice(OPTIMIZERS),
        default="adam",
        help="adam or adamw (decoupled weight decay) for most runs; prodigy finds its own step size; came needs less "
        "memory. (default: %(default)s)",
    )
    group.add_argument(
        "--beta1",
        "--adam_beta1",
        metavar="X",
        type=decay_rate,
        default=0.9,
        help="Decay of the running mean of gradients. (default: %(default)s)",
    )
    group.add_argument(
        "--beta2",
        "--adam_beta2",
        metavar="X",
        type=decay_rate,
        default=0.95,
        help="Decay of the running mean of squared gradients; raise it towards 0.999 when training is unsteady. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--beta3",
        "--prodigy_beta3",
        metavar="X",
        type=decay_rate,
        help="prodigy: decay of its step size estimate (default: square root of beta2). came: decay of its "
        "confidence (default: 0.9999).",
    )
    group.add_argument(
        "--weight_decay",
        "--adam_weight_decay",
        metavar="X",
        type=non_negative_float,
        default=1e-4,
        help="How strongly weights are pulled towards 0; raise it when the result overfits. (default: %(default)s)",
    )
    group.add_argument(
        "--epsilon",
        "--adam_epsilon",
        metavar="X",
        type=positive_float,
        default=1e-8,
        help="Added to the denominator of a step so that it cannot be 0. (default: %(default)s)",
    )
    group.add_argument(
        "--max_grad_norm",
        metavar="X",
        type=positive_float,
        default=1.0,
        help="Gradients whose norm is larger are scaled down to this norm. (default: %(default)s)",
    )
    group.add_argument(
        "--prodigy_decouple",
        action="store_true",
        help="prodigy: decouple weight decay from the gradient, as adamw does. (default: off)",
    )
    group.add_argument(
        "--prodigy_use_bias_correction",
        action="store_true",
        help="prodigy: correct the bias of the first steps' running means, as adam does. (default: off)",
    )
    group.add_argument(
        "--prodigy_safeguard_warmup",
        action="store_true",
        help="prodigy: keep the learning rate out of the step size estimate; use it with warm-up. (default: off)",
    )


def _add_memory_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--use_8bit",
        "--use_8bit_adam",
        action="store_true",
        help="Keep the states of adam or adamw in 8 bits, a quarter of the memory: by bitsandbytes, or by torchao "
        "with --use_torchao. (default: off)",
    )
    group.add_argument(
        "--use_4bit",
        action="store_true",
        help="Keep the states of adam or adamw in 4 bits; needs --use_torchao. (default: off)",
    )
    group.add_argument(
        "--use_torchao",
        action="store_true",
        help="Take the optimizer of --use_8bit or --use_4bit from torchao instead of bitsandbytes. (default: off)",
    )
    group.add_argument(
        "--use_cpu_offload_optimizer",
        action="store_true",
        help="Keep the states of adam or adamw in CPU memory and step there (by torchao): slower, for full "
        "fine-tuning on one GPU that is too small otherwise. (default: off)",
    )
    group.add_argument(
        "--offload_gradients",
        action="store_true",
        help="With --use_cpu_offload_optimizer, keep gradients on the CPU too; not together with gradient "
        "accumulation. (default: off)",
    )


def _add_configuration_flags(group: argparse._ArgumentGroup, method: str) -> None:
    group.add_argument(
        "--report_to",
        **choice(("tensorboard", "wandb", "comet_ml", "all", "none")),
        default="tensorboard",
        help="Where losses and validation videos are logged; all means every tracker that is installed. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--tracker_name",
        metavar="NAME",
        default=f"cogvideox-{method}",
        help="Project name in the tracker. (default: %(default)s)",
    )
    group.add_argument(
        "--logging_dir",
        metavar="FOLDER",
        type=path,
        default="logs",
        help="Folder of the tracker's files, inside --output_dir. (default: %(default)s)",
    )
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
        help="Upload the result to the Hugging Face hub when training ends. (default: off)",
    )
    group.add_argument(
        "--hub_token",
        metavar="TOKEN",
        help="Token for --push_to_hub; better to log in once with `hf auth login` than to leave it in your shell "
        "history. (default: your login)",
    )
    group.add_argument(
        "--hub_model_id",
        metavar="ORG/NAME",
        help="Repository that --push_to_hub writes to. (default: the name of --output_dir)",
    )
    group.add_argument(
        "--allow_tf32",
        action="store_true",
        help="Let float32 matrix products use TF32 on Ampere GPUs and newer: faster, slightly less exact. "
        "(default: off)",
    )
    group.add_argument(
        "--nccl_timeout",
        metavar="SECONDS",
        type=positive_int,
        default=600,
        help="Seconds a process waits for the others before the run is ended; raise it when validation or saving "
        "takes longer. (default: %(default)s)",
    )


def _add_prepare_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output_dir",
        metavar="FOLDER",
        type=path,
        help="Required. Where the prepared dataset is written; give it as --data_root when training.",
    )
    group.add_argument(
        "--save_latents_and_embeddings",
        action="store_true",
        help="Write latents and text embeddings, for training with --load_tensors. Without it only resized clips and "
        "captions are written. (default: off)",
    )
    group.add_argument(
        "--save_image_latents",
        action="store_true",
        help="Also write the latents of each clip's first frame, which image-to-video training needs. (default: off)",
    )
    group.add_argument(
        "--num_image_latents",
        metavar="K",
        type=positive_int,
        default=4,
        help="With --save_image_latents, encode each first frame K times under noise of different strength; training "
        "picks one at each step. (default: %(default)s)",
    )
    group.add_argument(
        "--layout",
        **choice(("shards", "files")),
        help="shards: safetensors files of --shard_size_mb; files: one file per clip and tensor, and a preview of "
        "each, as the original script wrote them. (default: shards; files without --save_latents_and_embeddings)",
    )
    group.add_argument(
        "--shard_size_mb",
        metavar="MIB",
        type=positive_int,
        default=1024,
        help="About how large a shard becomes. (default: %(default)s)",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="Only check the clips and print the plan; write it clip by clip to plan.csv in --output_dir, and a "
        "picture of some clips as the model will see them to contact_sheet.png. (default: off)",
    )
    group.add_argument(
        "--target_fps",
        metavar="RATE",
        type=positive_int,
        default=8,
        help="Frame rate of the preview videos of --layout files only; to resample clips in time use --fps. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max_sequence_length",
        metavar="N",
        type=positive_int,
        default=226,
        help="Length of text embeddings in tokens; the released models want the default. (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=non_negative_int,
        default=42,
        help="Seed of random crops and flips. (default: %(default)s)",
    )


def _add_prepare_speed_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch_size",
        metavar="N",
        type=positive_int,
        default=1,
        help="Clips encoded at once on each device; lower it when memory runs out. (default: %(default)s)",
    )
    group.add_argument(
        "--use_slicing",
        action="store_true",
        help="Let the VAE work on one clip of a batch at a time: less memory, a little slower. (default: off)",
    )
    group.add_argument(
        "--use_tiling",
        action="store_true",
        help="Let the VAE work on overlapping tiles of a frame: much less memory, slower. (default: off)",
    )
    group.add_argument(
        "--num_decode_threads",
        metavar="N",
        type=non_negative_int,
        default=0,
        help="Threads that decode one clip; 0 lets the decoder choose. (default: %(default)s)",
    )
    group.add_argument(
        "--num_artifact_workers",
        metavar="N",
        type=positive_int,
        default=4,
        help="Threads that write files while the next clips are encoded. (default: %(default)s)",
    )


def _fill_sizes(args: argparse.Namespace, given: set[str]) -> None:
    """Turn the four size flags into numbers; with height and width alone that one size becomes the only bucket."""
    one_size = {"height", "width"} <= given and not given & {"height_buckets", "width_buckets"}
    args.height = args.height or DEFAULT_HEIGHT
    args.width = args.width or DEFAULT_WIDTH
    args.height_buckets = args.height_buckets or ([args.height] if one_size else list(DEFAULT_BUCKETS))
    args.width_buckets = args.width_buckets or ([args.width] if one_size else list(DEFAULT_BUCKETS))


def _split_validation(args: argparse.Namespace) -> None:
    separator = args.validation_prompt_separator
    if not separator:
        raise UserError("--validation_prompt_separator: the value is empty; give the text between two prompts")
    args.validation_prompts = _split(args.validation_prompt, separator)
    args.validation_images = _split(args.validation_images, separator)


def _split(text: str | None, separator: str) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(separator)]


def _drop_long_buckets(args: argparse.Namespace) -> None:
    long = [str(count) for count in args.frame_buckets if count > args.max_num_frames]
    if long:
        _warn([f"--frame_buckets {' '.join(long)} not used: longer than --max_num_frames {args.max_num_frames}"])
    args.frame_buckets = [count for count in args.frame_buckets if count <= args.max_num_frames]


def _warn(lines: list[str]) -> None:
    """Write each line to stderr, once for all processes of a launch."""
    if int(os.environ.get("RANK", "0")) == 0:
        for line in lines:
            print(f"warning: {line}", file=sys.stderr, flush=True)
