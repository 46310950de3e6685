"""Read the command line of the training scripts and of prepare_dataset.py, and check it as far as no model is needed.

Only the standard library is imported, so `--help` and every mistake in the flags show within a fraction of a second,
before anything heavy is loaded.
"""

import argparse
import sys
from collections.abc import Sequence

from common.errors import UserError
from common.ranks import launch_rank
from flags.checks import (
    check_data,
    check_files,
    check_frames,
    check_hub,
    check_lora,
    check_no_earlier_run,
    check_objective,
    check_prepared_flags,
    check_sizes,
    check_validation,
    check_validation_images,
    resolve_checkpoint,
    training_warnings,
)
from flags.data import DEFAULT_BUCKETS, DEFAULT_HEIGHT, DEFAULT_WIDTH, add_data_flags, add_download_flags
from flags.deepspeed import check_zero
from flags.fsdp import check_fsdp
from flags.memory import add_memory_flags, check_memory
from flags.optimizer import add_optimizer_flags, add_optimizer_memory_flags, check_low_bit, check_optimizer
from flags.preparation import add_prepare_flags, add_prepare_speed_flags
from flags.speed import add_speed_flags, check_context_parallel, check_speed
from flags.tracking import check_tracker
from flags.training import (
    add_checkpoint_flags,
    add_configuration_flags,
    add_dry_run_flag,
    add_encoding_flags,
    add_image_flags,
    add_lora_flags,
    add_objective_flags,
    add_result_flags,
    add_schedule_flags,
    add_training_flags,
)
from flags.types import FlagParser, choice, path
from flags.validation import add_validation_flags, add_validation_set_flags


TASKS = ("text-to-video", "image-to-video")
METHODS = ("lora", "sft")
DATA_FLAGS = ("data_root", "dataset_file", "dataset_name", "dataset_mix")  # one of them names the data


def parse_args(argv: Sequence[str] | None = None, *, task: str, method: str) -> argparse.Namespace:
    """Read and check the flags of a training script.

    Besides one attribute for each flag, the result has `validation_prompts` (list of str, stripped), `method` and
    `given` (the names of the flags that the user typed). On return,
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
        check_memory(args, given, method)
        check_speed(args)
        check_context_parallel(args)
        check_zero(args)
        check_fsdp(args)
        check_objective(given, args.timestep_sampling, args.use_ema)
        if method == "lora":
            check_lora(args)
        check_tracker(args.report_to)
        check_hub(args)
        check_files(
            model=args.pretrained_model_name_or_path,
            data_root=args.data_root,
            dataset_file=args.dataset_file,
            output_dir=args.output_dir,
        )
        check_validation_images(args, task)
        check_prepared_flags(args, given)
        resolve_checkpoint(args)
        if not args.dry_run:
            check_no_earlier_run(args)
    except UserError as error:
        parser.error(str(error))
    _warn(training_warnings(args, given, task, method))
    _drop_long_buckets(args)
    args.method, args.given = method, frozenset(given)
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
        if args.text_encoder_8bit and not args.save_latents_and_embeddings:
            raise UserError("--text_encoder_8bit: nothing is embedded without --save_latents_and_embeddings; add it")
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


def flag_names(task: str, method: str) -> list[str]:
    """The attributes that the flags of a training script have after `parse_args`, in the order of `--help`."""
    actions = _training_parser(task, method)._actions
    return [action.dest for action in actions if action.dest != "help"]


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
    add_download_flags(model)
    data = parser.add_argument_group("data")
    add_data_flags(data, caption_column="text")
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
    validation = parser.add_argument_group("validation")
    add_validation_flags(validation)
    add_validation_set_flags(validation)
    training = parser.add_argument_group("training")
    add_training_flags(training, method)
    add_checkpoint_flags(training)
    add_encoding_flags(training)
    add_dry_run_flag(training)
    add_objective_flags(parser.add_argument_group("objective"))
    add_schedule_flags(parser.add_argument_group("learning rate"))
    if method == "lora":
        add_lora_flags(parser.add_argument_group("lora"), method)
    else:
        add_lora_flags(parser.add_argument_group("lora (no effect on full fine-tuning)"), method)
        add_result_flags(parser.add_argument_group("result"))
    add_image_flags(parser.add_argument_group("image-to-video (no effect on text-to-video)"))
    add_optimizer_flags(parser.add_argument_group("optimizer"))
    add_optimizer_memory_flags(parser.add_argument_group("optimizer memory"))
    add_memory_flags(parser.add_argument_group("memory"), method)
    add_speed_flags(parser.add_argument_group("speed"))
    add_configuration_flags(parser.add_argument_group("configuration"), method)
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
    add_download_flags(model)
    model.add_argument(
        "--dtype",
        **choice(("fp32", "fp16", "bf16")),
        default="fp32",
        help="Precision of the VAE, the text encoder and what they write. bf16 halves memory and disk space. "
        "(default: %(default)s)",
    )
    add_data_flags(parser.add_argument_group("data"), caption_column="caption")
    add_prepare_flags(parser.add_argument_group("preparation"))
    add_prepare_speed_flags(parser.add_argument_group("memory and speed"))
    return parser


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
    if launch_rank() == 0:
        for line in lines:
            print(f"warning: {line}", file=sys.stderr, flush=True)
