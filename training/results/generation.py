"""Sample the videos of generate.py: load the text encoder, then transformer and VAE, never all at once."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.training_utils import free_memory
from PIL import Image

from common.errors import UserError, first_line
from common.files import atomic_write
from common.logs import start_logging
from common.ranks import local_rank
from data.buckets import Bucket
from diffusion.control_to_video import ControlToVideo
from diffusion.image_to_video import ImageToVideo
from diffusion.task import SizeFlags, Task, choose_scheduler
from diffusion.text_to_video import TextToVideo
from flags.generation import AS_IT_IS, BASE, COMPARED, DEFAULT_FOLDER, SHEET, ContentFlags, PlannedVideo
from flags.settings import GenerationSettings
from methods.lora_file import PATCHES, read_passed_lora
from methods.lora_mounting import check_loras, mount_loras
from models.configs import CPU, DTYPES, ModelConfigs, precision_warning
from models.encoding import encode_prompts
from models.quantization import check_quantization
from models.sampling import Pipeline, cached, sample_video
from models.source import ModelSource
from results.trained_conditions import TrainedConditions, find_trained_conditions, takes_control
from video.condition_frames import ENDS, FIRST
from video.contact_sheet import SheetRow, draw_contact_sheet, shown_condition, shown_indices
from video.frames import UNCUT
from video.images import load_controls, load_given_frames
from video.io import read_frames, write_video


logger = logging.getLogger(__name__)

_GIVEN = {FIRST: ("image",), ENDS: ("image", "last_image")}  # flags of the files; for others, --video
_A_FILE = {"image": "an image", "last_image": "a last image", "video": "a video to continue"}


@dataclass(frozen=True)
class Generation:
    """The videos to sample, checked against the configs of the model."""

    settings: GenerationSettings
    source: ModelSource  # the base model
    configs: ModelConfigs  # of the base model, with the inputs that the task adds
    task: Task
    size: Bucket
    fps: int
    device: torch.device
    dtype: torch.dtype
    # First frames or the frames of controls for each prompt, of the videos' size; None for text-to-video
    conditions: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None

    @property
    def is_guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.settings.guidance.guidance_scale > 1


def generate(settings: GenerationSettings) -> None:
    """Sample and write the videos that the flags ask for.

    Raises UserError if model, training result, images and flags do not fit together, before weights are loaded.
    """
    start_logging()
    if not settings.videos:
        logger.info("all videos of %s are there already", settings.output.output_dir or DEFAULT_FOLDER)
        return
    generation = settle(settings)
    check_loras(settings.loras, generation.configs, settings.model.cache_dir, settings.memory.quantize_base)
    dtype = str(generation.dtype).removeprefix("torch.")
    message = "videos: %d of %s (frames x height x width), in %s on %s"
    logger.info(message, len(settings.videos), generation.size, dtype, generation.device)
    embeds = embed_prompts(generation)
    for video, frames in sample_all(generation, embeds, tuned=True):
        if settings.output.as_dataset:
            with atomic_write(video.beside(".txt")) as partial:
                partial.write_text(video.prompt, encoding="utf-8")
        write(frames, video.file, generation.fps)
    if settings.result.compare:
        free_memory()
        for video, frames in sample_all(generation, embeds, tuned=False):
            write(frames, video.beside(BASE), generation.fps)
            compare(video, generation)


def settle(settings: GenerationSettings) -> Generation:
    """Complete the settings with the configs of the model, and check them; load no weights."""
    model, sampling, memory = settings.model, settings.sampling, settings.memory
    source = ModelSource(model.pretrained_model_name_or_path, model.revision, model.variant, model.cache_dir)
    configs = source.configs()
    native = configs.native_size
    flags = (sampling.num_frames, sampling.height, sampling.width)
    size = Bucket(*(given or default for given, default in zip(flags, native, strict=True)))
    task = choose_task(settings, configs)
    configs = task.model_configs(configs)
    task.check_model(configs, [size], SizeFlags("--height, --width", "--num_frames"))
    choose_scheduler(task, settings.guidance.sampling_scheduler)
    check_quantization(memory.quantize_base)
    conditions, (trained, _) = None, find_trained(settings)
    cut = trained.cut if trained else UNCUT
    if task.condition == "image":
        names = _GIVEN.get(task.condition_frames, ("video",))
        files = list(zip(*(getattr(settings.content, name) for name in names), strict=True))
        flag = ", ".join(f"--{name}" for name in names)
        conditions = load_given_frames(files, task.condition_frames, size.height, size.width, flag=flag, cut=cut)
    elif task.condition == "control":
        conditions = load_controls(settings.content.control, size, task.kind, "--control", cut)
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else CPU
    if device == CPU and (memory.enable_model_cpu_offload or memory.enable_sequential_cpu_offload):
        logger.warning("warning: there is no GPU, nothing is offloaded from it")
    fps, dtype = settings.output.fps or configs.native_fps, choose_dtype(memory.dtype, source, device)
    return Generation(settings, source, configs, task, size, fps, device, dtype, conditions)


def choose_task(settings: GenerationSettings, configs: ModelConfigs) -> Task:
    """Return the task of the model's config; raise a UserError if flags or tuned transformer are for another one."""
    ignores_positions = settings.result.ignore_learned_positional_embeddings
    has_positions = configs.transformer["use_learned_positional_embeddings"]
    if settings.content.control:
        if given := given_frames_flags(settings.content):
            raise UserError(
                f"--{given[0]}: not together with --control, which no released model takes too; omit one of them"
            )
        return choose_control(settings, configs)
    trained = "the base model" if configs.is_control else find_control_result(settings, configs)
    if trained and configs.is_image_to_video:
        raise UserError(
            f"--pretrained_model_name_or_path: this is an image-to-video model, and {trained} was trained with "
            "controls; pass the text-to-video model that it was trained on, and --control"
        )
    if trained:
        raise UserError(f"--control: {trained} was trained with controls; pass a control clip for each prompt")
    if settings.result.transformer is not None:
        tuned = read_tuned_config(settings.result.transformer, settings.model.cache_dir, configs)
        ignores_positions |= has_positions and not tuned["use_learned_positional_embeddings"]
    if configs.is_image_to_video:
        return ImageToVideo(0.0, ignores_positions, choose_condition_frames(settings))
    if given := given_frames_flags(settings.content):
        raise UserError(
            f"--{given[0]}: this is a text-to-video model, which takes none; omit it, or pass an image-to-video model "
            "such as THUDM/CogVideoX-5b-I2V"
        )
    if ignores_positions:
        raise UserError("--ignore_learned_positional_embeddings: this model has no learned positions; omit the flag")
    return TextToVideo()


def given_frames_flags(content: ContentFlags) -> list[str]:
    """Return the names of the flags that were passed among those of given frames."""
    return [name for name in ("image", "last_image", "video", "condition_frames") if getattr(content, name)]


def find_trained(settings: GenerationSettings) -> tuple[TrainedConditions, str] | tuple[None, None]:
    """Return what a result of the flags was given in training, and which result."""
    results = [*(lora for lora, _ in settings.loras), settings.result.transformer]
    return find_trained_conditions(results, settings.model.pretrained_model_name_or_path)


def choose_condition_frames(settings: GenerationSettings) -> str:
    """Return the frames to sample from: those of the flag, of the training, or of the files that were passed.

    Raises a UserError if other files were passed.
    """
    content, (trained, result) = settings.content, find_trained(settings)
    condition = content.condition_frames or (trained.frames if trained else ENDS if content.last_image else FIRST)
    if content.video and not (content.condition_frames or trained):
        raise UserError("--video: pass as many of its frames as in training: --condition_frames first:K")
    needed, passed = _GIVEN.get(condition, ("video",)), set(given_frames_flags(content)) - {"condition_frames"}
    what = "this is an image-to-video model"
    if content.condition_frames:
        what = f"--condition_frames {condition} was passed"
    elif trained:
        what = f"'{result}' was trained with --condition_frames {condition}"
    for name in needed:
        if name not in passed:
            raise UserError(f"--{name}: {what}; pass {_A_FILE[name]} for each prompt")
    for name in sorted(passed.difference(needed)):
        raise UserError(f"--{name}: {what}, which needs none; omit it, or pass other --condition_frames")
    return condition


def choose_control(settings: GenerationSettings, configs: ModelConfigs) -> ControlToVideo:
    """Return the task of a model or a result of training that takes a control; raise a UserError if there is none."""
    if configs.is_image_to_video:
        raise UserError(
            "--control: this is an image-to-video model, which takes none; omit it, or pass a text-to-video model and "
            "a result with controls"
        )
    task = ControlToVideo(choose_control_kind(settings), widens=not configs.takes_condition)
    transformer, cache_dir = settings.result.transformer, settings.model.cache_dir
    if transformer is not None:
        is_control = not task.widens or is_control_transformer(transformer, cache_dir, configs)
        read_tuned_config(transformer, cache_dir, task.model_configs(configs) if is_control else configs)
    if task.widens and not find_control_result(settings, configs):
        raise UserError(
            "--control: nothing here takes a control: neither the model nor a --lora or --transformer; omit it, or "
            "pass the result of cogvideox_control_to_video_lora.py or cogvideox_control_to_video_sft.py, or a control "
            "model as --pretrained_model_name_or_path"
        )
    return task


def choose_control_kind(settings: GenerationSettings) -> str | None:
    """Return how controls are computed from the clips of --control: as the flag says, or else as in training.

    None if the clips are controls.
    """
    passed, (trained, result) = settings.content.compute_control, find_trained(settings)
    of_training = trained.control if trained else None
    kind = passed or of_training or AS_IT_IS
    if of_training and kind != of_training:  # clips that are controls may have been computed, too
        logger.warning("warning: --compute_control %s: '%s' was trained with %s", kind, result, of_training)
    logger.info("controls: %s", "the clips of --control" if kind == AS_IT_IS else f"{kind} of the clips of --control")
    return None if kind == AS_IT_IS else kind


def find_control_result(settings: GenerationSettings, configs: ModelConfigs) -> str | None:
    """Return the result, for a model that takes no control, that was trained with one; None without one.

    Raises a UserError for one that cannot be read, and for the LoRA of a control model.
    """
    cache_dir, transformer, of_control_models = settings.model.cache_dir, settings.result.transformer, []
    for lora, _ in settings.loras:
        of_run = takes_control(lora)
        down = read_passed_lora(lora, "--lora", cache_dir).weights.get(f"{PATCHES}.lora_A.weight")
        if configs.is_image_to_video:
            # --lora_target_modules takes no convolutions.
            is_control = of_run or (down is not None and down.ndim == 4)
        else:
            is_control = down is not None and (
                of_run or (of_run is None and down[0].numel() == 2 * configs.patch_inputs)
            )
        if is_control:
            return f"'{lora}'"
        of_control_models += [lora] if of_run else []
    if transformer is not None and is_control_transformer(transformer, cache_dir, configs):
        return f"'{transformer}'"
    for lora in of_control_models:
        raise UserError(
            f"--pretrained_model_name_or_path: '{lora}' was trained on a control model; pass that model, and --control"
        )
    return None


def is_control_transformer(transformer: str, cache_dir: str | None, base: ModelConfigs) -> bool:
    """Return whether a tuned transformer was trained with a control, by its run or else by its config's difference."""
    of_run, config = takes_control(transformer), load_tuned_config(transformer, cache_dir)
    if of_run is not None or base.takes_condition:
        return bool(of_run)
    is_image_to_video = any(
        config.get(name) and not base.transformer[name]
        for name in ("ofs_embed_dim", "use_learned_positional_embeddings")
    )
    return config.get("in_channels") == 2 * base.transformer["in_channels"] and not is_image_to_video


def load_tuned_config(transformer: str, cache_dir: str | None) -> dict[str, object]:
    """Return a tuned transformer's config; raise a UserError if it cannot be read."""
    try:
        return CogVideoXTransformer3DModel.load_config(transformer, subfolder="transformer", cache_dir=cache_dir)
    except OSError as error:
        raise UserError(f"--transformer: '{transformer}' cannot be read: {first_line(error)}") from error


def read_tuned_config(transformer: str, cache_dir: str | None, base: ModelConfigs) -> dict[str, object]:
    """Return a tuned transformer's config; raise a UserError if more than its positions differs from the base's."""
    config = load_tuned_config(transformer, cache_dir)
    differing = sorted(
        name
        for name, value in base.transformer.items()
        if name[0] != "_" and name != "use_learned_positional_embeddings" and config.get(name, value) != value
    )
    if differing:
        name = differing[0]
        is_wider = config.get("in_channels") == 2 * base.transformer["in_channels"]
        kind = ", an image-to-video one" if is_wider else ""
        raise UserError(
            f"--transformer: '{transformer}' was tuned from another model than --pretrained_model_name_or_path{kind}: "
            f"its {name} is {config[name]}, not {base.transformer[name]}; pass that model"
        )
    return base.transformer | config


def choose_dtype(name: str, source: ModelSource, device: torch.device) -> torch.dtype:
    """Return the dtype of the computation; "auto" is that of the model's files, which are downloaded to read it."""
    if name == "fp16" and device == CPU:
        raise UserError("--dtype fp16: needs a GPU; pass bf16 or fp32")
    if name == "auto" and device == CPU:
        return torch.float32
    if name not in ("auto", "fp16"):
        return DTYPES[name]
    source.download("transformer")
    native = source.native_dtype()
    dtype = native if name == "auto" else DTYPES[name]
    if warning := precision_warning(dtype, native, "--dtype"):
        logger.warning("warning: %s", warning)
    return dtype


def embed_prompts(generation: Generation) -> dict[str, torch.Tensor]:
    """Embed all prompts, `[T, D]` each on the CPU, and free the text encoder."""
    settings = generation.settings
    prompts = [video.prompt for video in settings.videos]
    texts = [*prompts, *([settings.content.negative_prompt] if generation.is_guided else [])]
    device, in_8bit = generation.device, settings.memory.text_encoder_8bit
    text_pipeline = generation.source.load_text_pipeline(generation.dtype, device=device, in_8bit=in_8bit)
    # One at a time as in validation, because the last digits may differ in a batch.
    embeds = {text: encode_prompts(text_pipeline, [text])[0].cpu() for text in dict.fromkeys(texts)}
    del text_pipeline
    free_memory()
    return embeds


def sample_all(
    generation: Generation, embeds: dict[str, torch.Tensor], *, tuned: bool
) -> Iterator[tuple[PlannedVideo, list[Image.Image]]]:
    """Sample all videos one after another, with the tuned model or with the base model."""
    settings, guidance = generation.settings, generation.settings.guidance
    pipeline = load_pipeline(generation, tuned=tuned)
    with cached(pipeline, guidance.sampling_cache, is_guided=generation.is_guided):
        for number, video in enumerate(settings.videos, start=1):
            title = "video" if tuned else "base model"
            pipeline.set_progress_bar_config(desc=f"{title} {number} of {len(settings.videos)}")
            frames = sample_video(
                pipeline,
                embeds[video.prompt],
                embeds[settings.content.negative_prompt] if generation.is_guided else None,
                None if generation.conditions is None else generation.conditions[video.number],
                size=generation.size,
                num_inference_steps=guidance.num_inference_steps,
                guidance_scale=guidance.guidance_scale,
                use_dynamic_cfg=guidance.use_dynamic_cfg,
                seed=video.seed,
            )
            yield video, frames


def load_pipeline(generation: Generation, *, tuned: bool) -> Pipeline:
    """Load the pipeline without its text encoder, with the trained weights if `tuned`."""
    source, device, dtype = generation.source, generation.device, generation.dtype
    settings, memory = generation.settings, generation.settings.memory
    is_offloaded = device != CPU and (memory.enable_model_cpu_offload or memory.enable_sequential_cpu_offload)
    resting = CPU if is_offloaded else device
    is_replaced = tuned and settings.result.transformer
    origin = ModelSource(settings.result.transformer, cache_dir=settings.model.cache_dir) if is_replaced else source
    # Quantizing is fastest on the GPU.
    transformer_device = resting if memory.quantize_base == "none" else device
    transformer = origin.load_transformer(dtype, device=transformer_device, quantize=memory.quantize_base)
    generation.task.prepare_model(transformer)
    pipeline = generation.task.pipeline_class(
        tokenizer=None,
        text_encoder=None,
        vae=source.load_vae(
            dtype,
            slicing=False,  # videos are decoded one at a time
            tiling=memory.enable_tiling,
            device=resting,
            decoder_only=generation.task.condition is None,
        ),
        transformer=transformer.eval(),
        scheduler=source.load_scheduler(choose_scheduler(generation.task, settings.guidance.sampling_scheduler)),
    )
    if tuned:
        mount_loras(pipeline, settings.loras, settings.model.cache_dir)
    if is_offloaded and memory.enable_sequential_cpu_offload:
        pipeline.enable_sequential_cpu_offload(device=device)
    elif is_offloaded:
        pipeline.enable_model_cpu_offload(device=device)
    return pipeline


def write(frames: list[Image.Image], file: Path, fps: int) -> None:
    """Write a video, completely or not at all, and log it."""
    with atomic_write(file) as partial:
        write_video(partial, frames, fps)
    logger.info("wrote %s", file)


def compare(video: PlannedVideo, generation: Generation) -> None:
    """Write a video and a picture that show the videos of base model and tuned model side by side."""
    size = generation.size
    files = (video.beside(BASE), video.file)
    base, tuned = (read_frames(file, range(size.num_frames)) for file in files)  # each [F, H, W, 3]
    with atomic_write(video.beside(COMPARED)) as partial:
        write_video(partial, list(np.concatenate([base, tuned], axis=2)), generation.fps)
    indices = shown_indices(size.num_frames)
    condition = None if generation.conditions is None else generation.conditions[video.number]
    titles, start = shown_condition(condition, size.num_frames)
    columns = [*titles, *(f"frame {index + 1}" for index in indices)]
    rows = []
    if condition is not None and not start:
        rows.append(SheetRow([np.asarray(condition[index]) for index in indices], "control", video.prompt))
    rows += [
        SheetRow([*start, *frames[indices]], title, video.prompt)
        for frames, title in ((base, f"base model · seed {video.seed}"), (tuned, f"tuned · seed {video.seed}"))
    ]
    draw_contact_sheet(rows, video.beside(SHEET), columns)
    logger.info("wrote %s and %s", video.beside(COMPARED), video.beside(SHEET))
