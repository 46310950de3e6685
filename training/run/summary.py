"""Describe a run before its first step, as a block of lines."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel

from checkpoints.schedule import StepSchedule
from common.files import path_of_script
from common.run_folder import METRICS_FILE, PICTURE_FILE, VALIDATION_FOLDER, list_checkpoints, list_validated
from common.units import in_bytes
from flags.settings import TrainingSettings
from memory.ladder import Choice
from memory.settings import describe_change, memory_settings_of
from methods.full import FullFinetune
from methods.lora import Lora
from models.compilation import STEPS_TO_EARN, earns_compilation
from models.configs import ModelConfigs
from models.quantization import describe_products
from parallel.deepspeed import count_weights
from run.memory_fit import RunMemory, has_card, is_left_to_card, typed_memory
from run.spec import RunSpec
from tracking.loss_curve import LossCurve
from tracking.verdict import Points, best_point
from validation.schedule import LossSchedule
from video.condition_frames import ENDS, is_context, split_files


_MOST_SIZES = 4  # that are listed
_BITS = {"use_8bit": " in 8 bits", "use_4bit": " in 4 bits", "use_fp8": " in float8"}


def start_rows(
    spec: RunSpec,
    transformer: CogVideoXTransformer3DModel,
    schedule: StepSchedule,
    total_steps: int,
    padding: int,
    losses: LossSchedule | None = None,
) -> dict[str, str]:
    """Return the summary, a text for each subject; `padding` is the number of batches drawn twice in an epoch."""
    settings, accelerator = spec.settings, spec.accelerator
    trainable, total = count_weights(transformer)
    name = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "cpu"
    devices = f"{accelerator.num_processes} x {name}, precision {spec.precision}"
    if spec.context is not None:
        devices += f"; {settings.speed.context_parallel_size} ranks at a time divide the tokens of a sample"
    run_memory = RunMemory(spec)
    memory = run_memory.needed(run_memory.current)
    return {
        "model": f"{settings.model.pretrained_model_name_or_path}: {describe_model(spec.configs)}",
        "training": f"{describe_method(spec.method)}{describe_products(transformer)}: {trainable:,} of {total:,} "
        "parameters",
        "data": describe_samples(spec),
        **({"controls": describe_controls(spec.task.kind)} if spec.task.condition == "control" else {}),
        "steps": describe_steps(spec, schedule, total_steps, padding),
        "optimizer": describe_optimizer(spec),
        "devices": devices,
        "memory": describe_expected_memory(memory, accelerator.device, shares=accelerator.num_processes > 1)
        + describe_chosen(settings),
        **describe_compilation(settings, len(spec.sizes), total_steps),
        "validation": describe_validation(spec),
        **({"held-out": describe_losses(losses, len(spec.data.held_out.clips), total_steps)} if losses else {}),
        "output": settings.training.output_dir,
        "written": f"every {settings.checkpoints.checkpointing_steps} steps a checkpoint of "
        f"{in_bytes(spec.checkpoint_bytes)}; losses to {describe_logs(settings.tracking.report_to)}",
    }


def as_table(rows: Mapping[str, str]) -> str:
    """Return a line for each row: its name, and its text in a second column."""
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows.items())


def describe_model(configs: ModelConfigs) -> str:
    """Describe the kind of a CogVideoX model."""
    transformer = configs.transformer
    family = "CogVideoX 1.5" if transformer.get("patch_size_t") else "CogVideoX"
    task = "control" if configs.is_control else "image" if configs.is_image_to_video else "text"
    positions = "rotary" if transformer["use_rotary_positional_embeddings"] else "sinusoidal"
    if transformer.get("use_learned_positional_embeddings"):
        positions = "learned"
    blocks = f"{transformer['num_layers']} blocks"
    return f"{family} {task}-to-video, {blocks}, {positions} positions, made for {configs.native_size}"


def describe_method(method: Lora | FullFinetune) -> str:
    """Describe the trained weights."""
    if not isinstance(method, Lora):
        return f"full fine-tuning, weights in {method.weights_dtype}"
    base = "" if method.quantize_base == "none" else f" on a base in {method.quantize_base}"
    return f"{method.title} of rank {method.rank}, alpha {method.alpha:g}{base}"


def describe_controls(kind: str | None) -> str:
    """Describe what the videos follow."""
    return f"{kind}, computed from the clips" if kind else "clips of their own"


def describe_samples(spec: RunSpec) -> str:
    """Describe the numbers of samples by size, the most frequent sizes first."""
    trained, all_samples = spec.data.trained, len(spec.data.clips)
    sizes = sorted(trained.buckets.counts.items(), key=lambda size: -size[1])
    listed = ", ".join(f"{count} x {size}" for size, count in sizes[:_MOST_SIZES])
    more = f" and {len(sizes) - _MOST_SIZES} more sizes" if len(sizes) > _MOST_SIZES else ""
    held_out = spec.data.held_out
    kept = f"; {len(held_out.clips)} held out for the validation loss" if held_out else ""
    regularization = ""
    if apart := all_samples - len(trained.clips):
        weight = spec.settings.regularization.regularization_weight
        regularization = f"; {apart} for regularization, as many in an epoch, loss x {weight:g}"
    noun = "samples" if trained.num_captions is None else "samples, one for each caption"
    return f"{len(trained.clips)} {noun} (frames x height x width): {listed}{more}{regularization}{kept}"


def describe_steps(spec: RunSpec, schedule: StepSchedule, total_steps: int, padding: int) -> str:
    """Describe the first and last step, and the size of a step."""
    if spec.state.step == total_steps:
        return f"none left of {total_steps}"
    twice = f"; {padding} batches are drawn twice in each epoch, to give all ranks equally many" if padding else ""
    per_step, per_epoch = spec.samples_per_step, schedule.steps_per_epoch
    steps = f"{spec.state.step + 1} to {total_steps}"
    return f"{steps}, up to {per_step} samples a step, {per_epoch} steps an epoch{twice}"


def describe_optimizer(spec: RunSpec) -> str:
    """Describe the optimizer and its learning rate; a resumed run logs its rate when the checkpoint is loaded."""
    settings = spec.settings
    bits = next((words for flag, words in _BITS.items() if getattr(settings.optimizer, flag)), "")
    rate = "" if spec.resumed else f", learning rate {spec.learning_rate:g}"
    return f"{settings.optimizer.optimizer}{bits}{rate}, {settings.schedule.lr_scheduler}"


def describe_expected_memory(memory: Choice, device: torch.device, *, shares: bool) -> str:
    """Describe the memory expected on one card; with `shares`, several GPUs train and may shard weights and states."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    card = f"of {in_bytes(total, 1024)}" if total else "on a GPU"
    less = ", less if GPUs shard weights" if shares else ""
    return f"{in_bytes(memory.needed, 1024)} {card} expected ({memory.how}){less}"


def describe_chosen(settings: TrainingSettings) -> str:
    """Return the memory settings that were chosen for the card, as the end of a line; empty if the flags set them."""
    if not is_left_to_card(settings):
        return ""
    flags = describe_change(memory_settings_of(settings), typed_memory(settings))
    return f"; for this card: {flags}" if flags else "; this card needs no savings"


def describe_compilation(settings: TrainingSettings, num_sizes: int, total_steps: int) -> dict[str, str]:
    """Return a row on what is compiled and why; none where nothing is, unasked, or on a CPU."""
    needed = f"{STEPS_TO_EARN * num_sizes:,} steps for {num_sizes} size{'s' if num_sizes > 1 else ''}"
    if settings.speed.compile:
        why = "" if "compile" in settings.given else f": from {needed} on it saves time; --no-compile turns it off"
        return {"compiled": f"the blocks{why}"}
    is_short = has_card() and "compile" not in settings.given and not earns_compilation(total_steps, num_sizes)
    return {"compiled": f"nothing: it saves time from {needed} on"} if is_short else {}


def describe_losses(losses: LossSchedule, num_clips: int, total_steps: int) -> str:
    """Describe the measurements of the loss of held-out clips, and what they cost."""
    used, levels = len({clip for clip, _ in losses.pairs}), len({quantile for _, quantile in losses.pairs})
    clips = f"{num_clips} clip{'s' if num_clips > 1 else ''}"
    clips += f", {used} of them measured" if used < num_clips else ""
    is_regular = 2 < losses.count == 1 + math.ceil(total_steps / losses.every)
    when = f"every {losses.every} steps" if is_regular else f"{losses.count} times"
    when = "before the first step and after the last one" if losses.count == 2 else when
    return f"{clips}; the loss at {levels} noise levels, {when}, takes {losses.share:.1%} of the run's work"


def describe_validation(spec: RunSpec) -> str:
    """Describe what is sampled, and when."""
    flags = spec.settings.validation
    videos, epochs = len(flags.prompts) * flags.num_validation_videos, flags.validation_epochs
    what = [f"{videos} video{'s' if videos > 1 else ''} of {spec.sampled_size}"] if videos else []
    what += ["no videos"] if spec.is_validated and not videos else []
    when = ["before the first step"] if flags.validate_first and not spec.state.step else []
    when += [f"every {flags.validation_steps} steps"] if flags.validation_steps else []
    when += [f"every {epochs} epochs" if epochs > 1 else "every epoch"] if epochs else []
    kept = f"; each keeps its weights in {VALIDATION_FOLDER}/step-N" if spec.keeps_validated else ""
    return f"{' and '.join(what)}, {', '.join([*when, 'at the end'])}{kept}" if what else "none"


def describe_end(spec: RunSpec, curve: LossCurve | None) -> list[str]:
    """Return what to know about a finished run besides its result: its best step, and the weights of other steps."""
    best = best_point(curve.points["validation_loss"]) if curve else None
    verdict = curve.verdict() if curve else None
    lines = [describe_best(curve.points["validation_loss"], spec.output_dir)] if best else []
    lines += [verdict.sentence] if verdict and verdict.kind != "unchanged" else []
    return [*lines, *filter(None, [describe_kept_weights(spec, best and best[0])])]


def describe_best(validation: Points, folder: Path) -> str:
    """Name the step with the lowest validation loss, and the saved weights of the run that are nearest to it."""
    (first, first_loss), (last, last_loss), (best, loss) = validation[0], validation[-1], best_point(validation)
    lowest = f"the validation loss was lowest at step {best}: {loss:.4f}"
    if best == last:
        return f"{lowest} ({first_loss:.4f} at step {first}); it is that of the result"
    saved = [*list_validated(folder), *list_checkpoints(folder)]
    step, nearest = min(saved, key=lambda one: abs(one[0] - best), default=(last, folder))
    where = (
        f"its weights are in {nearest}" if step == best else f"the nearest weights, of step {step}, are in {nearest}"
    )
    return f"{lowest} ({first_loss:.4f} at step {first}, {last_loss:.4f} at step {last}); {where}"


def describe_kept_weights(spec: RunSpec, best: int | None = None) -> str | None:
    """Return which steps' weights were kept, and a command that samples with one; None without an earlier step.

    The command is for those nearest to the best step, if these are not the result.
    """
    kept = list_validated(spec.output_dir)
    if len(kept) < 2:
        return None
    step, folder = kept[-2] if best is None else min(kept[:-1], key=lambda one: abs(one[0] - best))
    steps, command = ", ".join(str(step) for step, _ in kept), shlex.join(sample_command(spec, folder))
    return f"the weights of steps {steps} are in {folder.parent}; to sample with those of step {step}:\n\n{command}\n"


def sample_command(spec: RunSpec, folder: Path) -> list[str]:
    """Return the words of a command that samples the first validation video with the weights in a folder.

    What a run without validation videos does not say is in capitals, for the user to replace.
    """
    settings, size = spec.settings, spec.sampled_size
    flags: dict[str, object] = {"--model_path": settings.model.pretrained_model_name_or_path}
    flags |= {"--lora" if settings.method == "lora" else "--transformer": folder}
    flags |= {"--prompt": settings.validation.prompts[0] if size else "YOUR PROMPT"}
    condition, images, controls = (
        settings.image.condition_frames,
        settings.validation.images,
        settings.validation.controls,
    )
    if spec.task.condition == "image":
        files = {"--image": "IMAGE.png"} | ({"--last_image": "LAST_IMAGE.png"} if condition == ENDS else {})
        files = {"--video": "CLIP.mp4"} if is_context(condition) else files
        flags |= zip(files, split_files(condition, images[0]) if images else files.values(), strict=False)
    if spec.task.condition == "control":
        flags |= {"--control": controls[0] if controls else "CLIP.mp4"}
        flags |= {"--compute_control": spec.task.kind} if spec.task.kind else {}
    if size:
        flags |= {"--height": size.height, "--width": size.width, "--num_frames": size.num_frames}
        guidance = settings.guidance
        flags |= {"--seed": spec.state.seed, "--num_inference_steps": guidance.num_inference_steps}
        flags["--guidance_scale"] = f"{guidance.guidance_scale:g}"
        passed = [name for name in ("sampling_scheduler", "sampling_cache") if name in settings.given]
        flags |= {f"--{name}": getattr(guidance, name) for name in passed}
    ignores_positions = settings.method == "lora" and settings.image.ignore_learned_positional_embeddings
    switches = ["--ignore_learned_positional_embeddings"] if ignores_positions else []
    switches += ["--use_dynamic_cfg"] if settings.guidance.use_dynamic_cfg else []
    script = path_of_script("generate.py")
    return ["python", script, *switches, *(str(word) for flag in flags.items() for word in flag)]


def describe_logs(report_to: str) -> str:
    """Name the files and trackers that the losses are logged to."""
    trackers = {"none": "", "all": " and to all trackers that are installed"}.get(report_to, f" and to {report_to}")
    return f"{PICTURE_FILE}, {METRICS_FILE}{trackers}"
