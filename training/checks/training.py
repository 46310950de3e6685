"""Checks of the flags on training, validation and the result, and warnings about what is odd but allowed.

Each check raises `UserError` with one line that names the flag and what to do; none needs a model.
"""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from checks.files import find_given_frames, find_lora, find_videos
from cli.schema import flag_values
from common.errors import UserError
from common.run_folder import CONFIG_FILE, holds_other_config, list_checkpoints, list_results
from flags.settings import TrainingSettings
from flags.tracking import TRACKERS
from flags.training import ALL_LINEAR


_ASK_FOR_VALIDATION = ("validation_steps", "validation_epochs", "validate_first", "save_validation_weights")
LORA_LEARNING_RATE_FLOOR = 5e-5  # below it users report a LoRA "without effect" after thousands of steps


def settle_validation(settings: TrainingSettings) -> TrainingSettings:
    """Return the checked settings with prompts and images one by one, and whether to validate before any step."""
    flags = settings.validation
    separator = flags.validation_prompt_separator
    if not separator:
        raise UserError("--validation_prompt_separator: the value is empty; pass the text between two prompts")
    texts = (flags.validation_prompt, flags.validation_images, flags.validation_controls)
    prompts, images, controls = (_split(text, separator) for text in texts)
    if "" in prompts:
        raise UserError(
            f"--validation_prompt: prompt {prompts.index('') + 1} of {len(prompts)} is empty; prompts are separated "
            f"by '{separator}'"
        )
    is_validated, values = bool(prompts or flags.validation_dataset_file), flag_values(settings)
    asking = [name for name in _ASK_FOR_VALIDATION if values[name]]
    uses_captions = bool(asking) and not is_validated and settings.task == "text-to-video"
    if asking and not is_validated and not uses_captions:
        raise UserError(f"--{asking[0]}: nothing to validate; add --validation_prompt or --validation_dataset_file")
    fraction = flags.validation_fraction
    if flags.validation_dataset_file and fraction:
        if "validation_fraction" in settings.given:
            raise UserError(
                "--validation_fraction: not with --validation_dataset_file, whose clips are held out; omit one of them"
            )
        fraction = 0.0
    for task, what, given in (("image-to-video", "image", images), ("control-to-video", "control", controls)):
        if settings.task == task and len(given) != len(prompts):
            raise UserError(
                f"--validation_{what}s: {len(given)} for {len(prompts)} in --validation_prompt; pass one {what} per "
                f"prompt, separated by '{separator}'"
            )
    if settings.task == "image-to-video":
        images = find_given_frames("--validation_images", images, settings.image.condition_frames)
    controls = find_videos("--validation_controls", controls)
    first = is_validated or uses_captions if flags.validate_first is None else flags.validate_first
    settled = replace(
        flags,
        prompts=prompts,
        images=images,
        controls=controls,
        uses_captions=uses_captions,
        validate_first=first,
        validation_fraction=fraction,
    )
    return replace(settings, validation=settled)


def _split(text: str | None, separator: str) -> tuple[str, ...]:
    return () if text is None else tuple(part.strip() for part in text.split(separator))


def settle_files(settings: TrainingSettings) -> TrainingSettings:
    """Return the settings with the LoRA to start from and the checkpoint as files that exist, or raise a UserError."""
    lora = settings.lora.lora_weights and find_lora("--lora_weights", settings.lora.lora_weights)
    checkpoint = _find_checkpoint(settings.checkpoints.resume_from_checkpoint, settings.training.output_dir)
    return replace(
        settings,
        lora=replace(settings.lora, lora_weights=lora),
        checkpoints=replace(settings.checkpoints, resume_from_checkpoint=checkpoint),
    )


def _find_checkpoint(wanted: str | None, output_dir: str) -> str | None:
    """Return the folder of a checkpoint, from its path or its name in the output folder."""
    if wanted is None or wanted == "latest":
        return wanted
    for folder in (wanted, os.path.join(output_dir, wanted)):
        if os.path.isdir(folder):
            return folder
    raise UserError(f"--resume_from_checkpoint: no folder '{wanted}'; pass a checkpoint's folder, or latest")


def settle_batches(settings: TrainingSettings) -> TrainingSettings:
    """Return the checked settings with batches of one clip, as far as that matters, if a token budget fills them."""
    training, speed = settings.training, settings.speed
    if training.max_tokens_per_batch is None:
        return settings
    for is_set, flag, reason in (
        ("train_batch_size" in settings.given, "--train_batch_size", "a budget replaces it"),
        (speed.compile, "--compile", "it would compile every combination of sizes"),
        (speed.context_parallel_size > 1, "--context_parallel_size", "it divides samples of one size"),
        (settings.objective.stratified_timesteps, "--stratified_timesteps", "batches have no fixed number of clips"),
        (settings.schedule.scale_lr, "--scale_lr", "batches have no fixed number of clips"),
    ):
        if is_set:
            raise UserError(f"--max_tokens_per_batch: not with {flag}, because {reason}; omit one of them")
    return replace(settings, training=replace(training, train_batch_size=1))


def check_details(settings: TrainingSettings) -> None:
    """Check that the details of an option come with the option."""
    for name in ("logit_mean", "logit_std"):
        if name in settings.given and settings.objective.timestep_sampling != "logit_normal":
            raise UserError(f"--{name}: no effect on uniform timesteps; add --timestep_sampling logit_normal")
    if "ema_decay" in settings.given and not settings.objective.use_ema:
        raise UserError("--ema_decay: no effect without an average; add --use_ema or omit it")
    modules = settings.lora.lora_target_modules
    if ALL_LINEAR in modules and len(modules) > 1:
        raise UserError(f"--lora_target_modules: {ALL_LINEAR} already includes the others; omit these")
    adapter = settings.lora.adapter
    for name in ("use_rslora", "use_dora", "lora_dropout"):
        if getattr(settings.lora, name) and adapter != "lora":
            raise UserError(f"--{name}: not available for --adapter {adapter}; omit one of them")
    if "lokr_factor" in settings.given and adapter != "lokr":
        raise UserError(f"--lokr_factor: no effect on --adapter {adapter}; add --adapter lokr or omit it")
    flags = settings.regularization
    if "regularization_weight" in settings.given and not (
        flags.regularization_data_root or settings.sources.dataset_mix
    ):
        raise UserError("--regularization_weight: no effect without --regularization_data_root; add it or omit this")
    for name in ("hub_token", "hub_model_id"):
        if getattr(settings.hub, name) and not settings.hub.push_to_hub:
            raise UserError(f"--{name}: nothing would be uploaded; add --push_to_hub or omit it")


def check_tracker(report_to: str) -> None:
    """Check that the chosen tracker is installed."""
    if report_to in TRACKERS and not any(map(find_spec, TRACKERS[report_to])):
        raise UserError(f"--report_to {report_to}: not installed; pip install {report_to}, or use --report_to none")


def check_no_earlier_run(settings: TrainingSettings) -> None:
    """Check that the run would overwrite nothing in the output folder, except the run that it resumes."""
    folder = Path(settings.training.output_dir)
    earlier = list_results(folder)
    if not earlier:
        if holds_other_config(folder):
            raise UserError(
                f"--output_dir: the run would write its flags over '{folder / CONFIG_FILE}', which is not of a run; "
                "rename that file, or choose another folder"
            )
        return
    resumed = settings.checkpoints.resume_from_checkpoint
    checkpoints = [path.resolve() for _, path in list_checkpoints(folder)]
    if resumed is None:
        raise UserError(
            f"--output_dir: '{folder}' already holds a run ({earlier[0]}); choose another folder, or continue the run "
            "with --resume_from_checkpoint latest"
        )
    if resumed == "latest" and not checkpoints:
        raise UserError(
            f"--resume_from_checkpoint latest: '{folder}' holds {earlier[0]} but no complete checkpoint; choose "
            "another --output_dir"
        )
    if resumed != "latest" and Path(resumed).resolve() not in checkpoints[-1:]:
        raise UserError(
            f"--resume_from_checkpoint: '{resumed}' is not the newest checkpoint of --output_dir '{folder}', whose "
            f"{earlier[0]} would be overwritten; to branch off, choose another --output_dir"
        )


def training_warnings(settings: TrainingSettings) -> list[str]:
    """Return what is odd but allowed, a line each."""
    given = settings.given
    lines = []
    if settings.task == "text-to-video":
        without_effect = {"noised_image_dropout", "ignore_learned_positional_embeddings", "validation_images"}
        without_effect.add("condition_frames")
        lines += [f"--{name} has no effect on text-to-video training" for name in sorted(without_effect & given)]
    if settings.method == "sft":
        lines += [f"--{name} has no effect on full fine-tuning" for name in ("rank", "lora_alpha") if name in given]
    if settings.prepared.load_tensors:
        lines += [
            f"--{name} has no effect with --load_tensors: the data lists its own samples"
            for name in ("dataset_file", "dataset_name", "max_samples")
            if name in given
        ]
    embeds = settings.validation.has_videos or settings.validation.validation_dataset_file
    embeds = embeds or settings.objective.caption_dropout or not settings.prepared.load_tensors
    if settings.memory.text_encoder_8bit and not embeds:
        lines.append("--text_encoder_8bit has no effect: all captions are embedded, and there are no prompts")
    return lines + _optimizer_warnings(settings) + _schedule_warnings(settings)


def _optimizer_warnings(settings: TrainingSettings) -> list[str]:
    flags, rate = settings.optimizer, settings.schedule.learning_rate
    lines = []
    needs_torchao = flags.use_8bit or flags.use_4bit or flags.use_fp8 or flags.use_cpu_offload_optimizer
    if flags.use_torchao and not needs_torchao and settings.memory.weights_dtype == "fp32":
        lines.append("--use_torchao has no effect without --use_8bit, --use_4bit or --use_fp8")
    # Zero is a deliberate test of saving and loading; a scaled rate is known only when the number of devices is.
    if rate == 0 or settings.schedule.scale_lr:
        return lines
    if flags.optimizer == "prodigy" and rate < 0.1:
        lines.append(f"--learning_rate {rate:g} is low for prodigy, which finds its own step size; use 1")
    if settings.method == "lora" and flags.optimizer in ("adam", "adamw") and rate < LORA_LEARNING_RATE_FLOOR:
        lines.append(
            f"--learning_rate {rate:g} is low for a LoRA, which may have no effect; published runs use 1e-4 to 1e-3"
        )
    return lines


def _schedule_warnings(settings: TrainingSettings) -> list[str]:
    schedule, steps = settings.schedule, settings.training.max_train_steps
    lines = []
    if settings.optimizer.optimizer == "schedulefree" and not schedule.lr_scheduler.startswith("constant"):
        lines.append(
            f"--lr_scheduler {schedule.lr_scheduler} is not needed with schedulefree, whose average replaces a "
            "falling rate; use constant_with_warmup"
        )
    if {"num_train_epochs", "max_train_steps"} <= settings.given:
        lines.append("--num_train_epochs has no effect: --max_train_steps sets the length of the run")
    if schedule.lr_scheduler != "constant" and steps and schedule.lr_warmup_steps >= steps:
        lines.append(
            f"--lr_warmup_steps {schedule.lr_warmup_steps} is all of the run's {steps} steps: the learning rate never "
            "reaches its full value"
        )
    return lines
