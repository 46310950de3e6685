"""Checks of flags against one another and against the disk; none needs a model.

Each raises `UserError` with one line that names the flag and what to do.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.run_folder import CONFIG_FILE, LORA_FILE, holds_other_config, list_checkpoints, list_results
from data.prepared import PREPARED_FLAGS, read_prepared_settings
from flags.training import ALL_LINEAR


SIZE_STEP = 16  # the VAE compresses 8 times in space, the transformer's patches twice more
LORA_LEARNING_RATE_FLOOR = 5e-5  # below it users report a LoRA "without effect" after thousands of steps


def check_sizes(args: argparse.Namespace) -> None:
    """Heights and widths are multiples of 16."""
    # --height and --width come first: they may have become the buckets, and the message must name what the user typed.
    for flag, sizes in (
        ("--height", [args.height]),
        ("--width", [args.width]),
        ("--height_buckets", args.height_buckets),
        ("--width_buckets", args.width_buckets),
    ):
        for size in sizes:
            check_size(flag, size)


def check_size(flag: str, size: int) -> None:
    """A height or width is a multiple of 16."""
    if size % SIZE_STEP:
        below = size // SIZE_STEP * SIZE_STEP
        nearest = _name_nearest("size", [n for n in (below, below + SIZE_STEP) if n])
        raise UserError(f"{flag}: {size} is not divisible by {SIZE_STEP}; {nearest}")


def check_frames(args: argparse.Namespace) -> None:
    """Frame counts are ones that the VAE takes, and some bucket is within --max_num_frames."""
    for flag, counts in (("--max_num_frames", [args.max_num_frames]), ("--frame_buckets", args.frame_buckets)):
        for count in counts:
            check_frame_count(flag, count)
    shortest = min(args.frame_buckets)
    if shortest > args.max_num_frames:
        raise UserError(
            f"--frame_buckets: all exceed --max_num_frames {args.max_num_frames}; raise it to --max_num_frames "
            f"{max(args.frame_buckets)} or give a shorter bucket"
        )


def check_frame_count(flag: str, count: int) -> None:
    """A number of frames is one that the VAE takes."""
    if not _is_frame_count(count):
        below = next(n for n in range(count, 0, -1) if _is_frame_count(n))
        above = next(n for n in range(count, count + 4) if _is_frame_count(n))
        raise UserError(f"{flag}: {count} is not 4k or 4k+1; {_name_nearest('count', [below, above])}")


def _is_frame_count(count: int) -> bool:
    """True for lengths which the VAE's fourfold compression in time takes without a remainder."""
    return count == 1 or (count >= 4 and count % 4 in (0, 1))


def _name_nearest(noun: str, values: list[int]) -> str:
    if len(values) == 1:
        return f"nearest valid {noun} is {values[0]}"
    return f"nearest valid {noun}s are {values[0]} and {values[1]}"


def check_data(args: argparse.Namespace) -> None:
    """The data set is named one way only, and the flags on it go together."""
    named = [flag for flag in ("dataset_file", "dataset_name", "dataset_mix") if getattr(args, flag)]
    if len(named) > 1:
        raise UserError(f"--{named[1]}: the data is named by --{named[0]} already; leave one of them out")
    check_dataset_name(args)
    if args.dataset_mix and args.data_root:
        raise UserError("--data_root: each entry of --dataset_mix names its own; leave one of them out")
    if args.fps is not None and args.long_clips == "spread":
        raise UserError(
            "--long_clips spread: frames spread over a clip have no fixed rate; leave out --fps or give first or split"
        )


def check_dataset_name(args: argparse.Namespace) -> None:
    """Details of a data set of the hub come with its name."""
    for flag in ("dataset_config_name", "dataset_streaming"):
        if getattr(args, flag) and not args.dataset_name:
            raise UserError(f"--{flag}: no effect without --dataset_name; leave it out")


def check_validation(args: argparse.Namespace, task: str) -> None:
    """No prompt is empty, nothing is scheduled without prompts or clips, and images match them.

    Settles `args.validate_first`, which is on by default where anything is validated.
    """
    prompts, images = args.validation_prompts, args.validation_images
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise UserError(
                f"--validation_prompt: prompt {number} of {len(prompts)} is empty; prompts are separated by "
                f"'{args.validation_prompt_separator}'"
            )
    is_validated = bool(prompts or args.validation_dataset_file)
    for flag in ("validation_steps", "validation_epochs", "validate_first"):
        if getattr(args, flag) and not is_validated:
            raise UserError(
                f"--{flag}: there is nothing to validate; add --validation_prompt or --validation_dataset_file"
            )
    if args.validate_first is None:
        args.validate_first = is_validated
    if task == "image-to-video" and len(images) != len(prompts):
        raise UserError(
            f"--validation_images: {len(images)} for {len(prompts)} in --validation_prompt; give one image per "
            f"prompt, separated by '{args.validation_prompt_separator}'"
        )


def check_validation_images(args: argparse.Namespace, task: str) -> None:
    """Validation images exist or are URLs; image-to-video only."""
    if task != "image-to-video":
        return
    args.validation_images = find_images("--validation_images", args.validation_images)


def find_images(flag: str, images: Sequence[str]) -> list[str]:
    """The images with ~ expanded; each exists or is a URL."""
    images = [os.path.expanduser(image) for image in images]
    for image in images:
        if not image.lower().startswith(("http://", "https://")) and not os.path.isfile(image):
            raise UserError(f"{flag}: no file '{image}'; give a path or an http(s) URL")
    return images


def check_objective(given: set[str], timestep_sampling: str, use_ema: bool) -> None:
    """Details of an option come with the option."""
    for flag in ("logit_mean", "logit_std"):
        if flag in given and timestep_sampling != "logit_normal":
            raise UserError(f"--{flag}: no effect on uniform timesteps; add --timestep_sampling logit_normal")
    if "ema_decay" in given and not use_ema:
        raise UserError("--ema_decay: there is no average; add --use_ema or leave it out")


def check_lora(args: argparse.Namespace) -> None:
    """The target modules are not contradictory, and the LoRA to start from exists; a folder becomes the file in it."""
    if ALL_LINEAR in args.lora_target_modules and len(args.lora_target_modules) > 1:
        raise UserError(f"--lora_target_modules: {ALL_LINEAR} has all others in it; leave these out")
    if args.lora_weights is not None:
        args.lora_weights = find_lora("--lora_weights", args.lora_weights)


def find_lora(flag: str, reference: str) -> str:
    """The file of a LoRA that is given by its path or by the folder that it is in."""
    file = Path(reference)
    if file.is_dir():
        file /= LORA_FILE
    if not file.is_file():
        raise UserError(f"{flag}: no file '{file}'; give a .safetensors file or a folder with {LORA_FILE}")
    if file.suffix != ".safetensors":
        raise UserError(f"{flag}: '{file}' is no .safetensors file, and others may run code; convert it")
    return str(file)


def check_hub(args: argparse.Namespace) -> None:
    """Hub flags come with --push_to_hub."""
    for flag in ("hub_token", "hub_model_id"):
        if getattr(args, flag) and not args.push_to_hub:
            raise UserError(f"--{flag}: nothing would be uploaded; add --push_to_hub or leave it out")


def check_files(
    *,
    model: str,
    data_root: str | None,
    dataset_file: str | None,
    output_dir: str,
    model_flag: str = "--pretrained_model_name_or_path",
) -> None:
    """Check everything on disk that a run needs, without creating anything that stays.

    Args:
        model: hub id (`org/name`) or folder in the diffusers layout.
        data_root: folder of the clips, or None.
        dataset_file: table of clips, or None.
        output_dir: folder to write to; it need not exist yet.
        model_flag: the flag which `model` came from, for messages.

    Raises:
        UserError: a folder or file is missing or of the wrong kind, or `output_dir` cannot be written.
    """
    check_model(model, model_flag)
    if data_root is not None and not os.path.isdir(data_root):
        raise UserError(f"--data_root: no folder '{data_root}'; give the folder which holds your clips")
    if dataset_file is not None and not os.path.isfile(dataset_file):
        inside = os.path.join(data_root or "", dataset_file)
        advice = f"did you mean '{inside}'?" if os.path.isfile(inside) else "give the path of a table of clips"
        raise UserError(f"--dataset_file: no file '{dataset_file}'; {advice}")
    check_writable(output_dir)


def check_model(model: str, flag: str) -> None:
    """A model is the folder of a pipeline, or may be on the hub."""
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, "model_index.json")):
            raise UserError(f"{flag}: no model_index.json in '{model}'; give the folder of a whole diffusers pipeline")
        return
    if not is_hub_id(model):
        raise UserError(
            f"{flag}: no folder '{model}'; give a local folder in the diffusers layout or a hub id such as "
            "THUDM/CogVideoX-5b"
        )


def is_hub_id(reference: str) -> bool:
    """Whether this may be `owner/name` on the hub, and is nothing here."""
    return reference.count("/") == 1 and not reference.startswith(("/", ".", "~")) and not os.path.exists(reference)


def check_writable(output_dir: str, flag: str = "--output_dir") -> None:
    """Raise unless `output_dir`, which `flag` named, can be created and written.

    Processes of one launch run this at the same time, so it creates no folder: it tries a nameless
    temporary file in the nearest folder that exists.
    """
    existing = Path(output_dir).absolute()
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{flag}: '{existing}' is not a folder; give another place for the output")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{flag}: cannot write to '{existing}' ({error.strerror}); change its permissions or give another "
            "place for the output"
        ) from None


def check_no_earlier_run(args: argparse.Namespace) -> None:
    """The output folder holds nothing that this run would write over, but for the run that it goes on with."""
    folder = Path(args.output_dir)
    earlier = list_results(folder)
    if not earlier:
        if holds_other_config(folder):
            raise UserError(
                f"--output_dir: the run would write its flags over '{folder / CONFIG_FILE}', which is not of a run; "
                "name that file otherwise, or give another folder"
            )
        return
    resumed = args.resume_from_checkpoint
    checkpoints = [path.resolve() for _, path in list_checkpoints(folder)]
    if resumed is None:
        advice = "give another folder, or go on with it by --resume_from_checkpoint latest"
        raise UserError(f"--output_dir: '{folder}' already holds a run ({earlier[0]}); {advice}")
    if resumed == "latest" and not checkpoints:
        raise UserError(
            f"--resume_from_checkpoint latest: '{folder}' holds {earlier[0]} but no complete checkpoint; "
            "give another --output_dir"
        )
    if resumed != "latest" and Path(resumed).resolve() not in checkpoints[-1:]:
        raise UserError(
            f"--resume_from_checkpoint: '{resumed}' is not the newest checkpoint of --output_dir '{folder}', whose "
            f"{earlier[0]} would be written over; to branch off, give another --output_dir"
        )


def resolve_checkpoint(args: argparse.Namespace) -> None:
    """Replace a checkpoint's bare name by its path inside the output folder."""
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted == "latest":
        return
    for folder in (wanted, os.path.join(args.output_dir, wanted)):
        if os.path.isdir(folder):
            args.resume_from_checkpoint = folder
            return
    raise UserError(f"--resume_from_checkpoint: no folder '{wanted}'; give a checkpoint's folder, or latest")


def training_warnings(args: argparse.Namespace, given: set[str], task: str, method: str) -> list[str]:
    """What is odd but allowed, a line each."""
    lines = []
    if task == "text-to-video":
        for flag in ("noised_image_dropout", "ignore_learned_positional_embeddings", "validation_images"):
            if flag in given:
                lines.append(f"--{flag} has no effect on text-to-video training")
    if method == "sft":
        lines += [f"--{flag} has no effect on full fine-tuning" for flag in ("rank", "lora_alpha") if flag in given]
    needs_torchao = args.use_8bit or args.use_4bit or args.use_fp8 or args.use_cpu_offload_optimizer
    if args.use_torchao and not needs_torchao and args.weights_dtype == "fp32":
        lines.append("--use_torchao has no effect without --use_8bit, --use_4bit or --use_fp8")
    if args.optimizer == "schedulefree" and not args.lr_scheduler.startswith("constant"):
        lines.append(
            f"--lr_scheduler {args.lr_scheduler} is not needed with schedulefree, whose average does what a falling "
            "rate does; give constant_with_warmup"
        )
    embeds = args.validation_prompts or args.validation_dataset_file or args.caption_dropout or not args.load_tensors
    if args.text_encoder_8bit and not embeds:
        lines.append("--text_encoder_8bit has no effect: all captions are embedded, and there are no prompts")
    if args.load_tensors:
        lines += [
            f"--{flag} has no effect with --load_tensors: the data lists its own samples"
            for flag in ("dataset_file", "dataset_name", "max_samples")
            if flag in given
        ]
    if {"num_train_epochs", "max_train_steps"} <= given:
        lines.append("--num_train_epochs has no effect: --max_train_steps says how long the run is")
    if args.lr_scheduler != "constant" and args.max_train_steps and args.lr_warmup_steps >= args.max_train_steps:
        lines.append(
            f"--lr_warmup_steps {args.lr_warmup_steps} is all of the run's {args.max_train_steps} steps: the learning "
            "rate never gets to its full value"
        )
    return lines + _learning_rate_warnings(args, method)


def _learning_rate_warnings(args: argparse.Namespace, method: str) -> list[str]:
    # Zero is a deliberate test of saving and loading; a scaled rate is known only when the number of devices is.
    if args.learning_rate == 0 or args.scale_lr:
        return []
    if args.optimizer == "prodigy" and args.learning_rate < 0.1:
        return [f"--learning_rate {args.learning_rate:g} is low for prodigy, which finds its own step size; give 1"]
    if method == "lora" and args.optimizer in ("adam", "adamw") and args.learning_rate < LORA_LEARNING_RATE_FLOOR:
        return [
            f"--learning_rate {args.learning_rate:g} is low for a LoRA, which may show no effect; published runs use "
            "1e-4 to 1e-3"
        ]
    return []


def check_prepared_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Flags on raw clips that come with --load_tensors say what the data was prepared with."""
    if not args.load_tensors or not args.data_root:
        return
    made_with = read_prepared_settings(Path(args.data_root)).get("flags", {})
    # The launchers pass the length of validation videos as a frame bucket.
    differing = [
        f"--{name} was {made_with[name]!r}, is now {getattr(args, name)!r}"
        for name in PREPARED_FLAGS
        if name in given and name != "frame_buckets" and name in made_with and made_with[name] != getattr(args, name)
    ]
    if differing:
        raise UserError(
            f"--load_tensors: '{args.data_root}' was prepared otherwise ({'; '.join(differing)}); prepare it again, "
            "or leave these flags out"
        )
