"""Sample videos with the model in training, write them, and log them."""

import logging
import math
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from PIL import Image

from common.errors import UserError
from common.files import atomic_write, slug
from data.buckets import Bucket
from models.prompts import PromptCache
from models.sampling import Pipeline, cached, sample_video
from parallel.coordinator import Coordinator
from parallel.fsdp import is_fsdp
from parallel.lockstep import OutOfStep, lockstep
from validation.grid import draw_grid
from validation.trackers import ValidationVideo, log_videos
from video.contact_sheet import SheetRow, draw_contact_sheet, shown_condition, shown_indices
from video.io import read_frames, write_video


logger = logging.getLogger(__name__)

# First frames, other given frames, or the frames of controls.
Conditions = Sequence[Image.Image] | Sequence[Sequence[Image.Image]]

_SHOWN_SIZE = 360, 240  # largest width and height, in pixels


@dataclass(frozen=True)
class ValidationSettings:
    """Settings of the videos to sample at each validation. The fixed seed makes validations comparable."""

    prompts: list[str]
    conditions: Conditions | None  # one for each prompt; None for text-to-video
    dtype: torch.dtype  # of the pipeline's computation
    num_videos: int  # per prompt
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    enable_model_cpu_offload: bool
    seed: int
    fps: int  # of the written files
    sampling_cache: str = "none"  # as in `cached`


def validate(
    accelerator: Accelerator,
    coordinator: Coordinator,
    make_pipeline: Callable[[], Pipeline],
    settings: ValidationSettings,
    prompts: PromptCache,
    folder: Path,
    step: int,
    is_told_to_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Sample the validation videos on all ranks into `folder/step-<step>/`; called on every rank.

    A contact sheet there shows them, with those of `folder/step-0` if it exists; a picture in `folder` shows all steps
    side by side. A failure is logged as a warning and never ends the run. Transformer, VAE and the global random
    states are restored.

    Args:
        make_pipeline: combines the transformer in training with a VAE and a scheduler; called at each validation.
        settings: what to sample.
        prompts: embeddings of the prompts and, for guidance, of the empty prompt.
        folder: folder of all the run's validations; the same on all machines.
        step: optimizer steps done; 0 before training.
        is_told_to_stop: once it returns True, no further video is sampled.

    Returns:
        The reason for each rank that failed, starting with its first line; the same on all ranks.
    """
    with _kept_random_states(accelerator.device):
        share = _sample_share(
            accelerator, coordinator, make_pipeline, settings, prompts, folder / f"step-{step}", is_told_to_stop
        )
        free_memory()
        # Every rank gets here, whatever happened, and may have to wait long for the others.
        videos_of_ranks, failures_of_ranks = zip(*coordinator.gather(share), strict=True)
        failures = list(chain(*failures_of_ranks))
        for failure in failures:
            logger.warning("warning: validation at step %d failed, training continues; %s", step, failure)
        if accelerator.is_main_process:
            videos = sorted(chain(*videos_of_ranks), key=lambda video: video.number)
            if videos:
                sheet = _draw_sheet(videos, settings, folder, step)
                grid = draw_grid(folder, videos, settings.num_frames // 2, step)
                pictures = " and ".join(str(file.relative_to(folder)) for file in (sheet, grid) if file)
                logger.info("step %d: %d validation videos in %s: %s", step, len(videos), folder, pictures)
                log_videos(accelerator.trackers, videos, sheet, step)
    return failures


def _sample_share(
    accelerator: Accelerator,
    coordinator: Coordinator,
    make_pipeline: Callable[[], Pipeline],
    settings: ValidationSettings,
    prompts: PromptCache,
    folder: Path,
    is_told_to_stop: Callable[[], bool],
) -> tuple[list[ValidationVideo], list[str]]:
    """Sample this rank's videos. Returns them, and the reason if anything failed."""
    videos: list[ValidationVideo] = []
    total, num_ranks = len(settings.prompts) * settings.num_videos, accelerator.num_processes
    # A sharded network needs all ranks: those that are done sample on to serve the others.
    last = math.ceil(total / num_ranks) * num_ranks if is_fsdp(accelerator) else total
    try:
        with lockstep(accelerator, coordinator) as watch:
            pipeline = make_pipeline()
            watch(pipeline.transformer)
            cache = cached(pipeline, settings.sampling_cache, is_guided=settings.guidance_scale > 1)
            with cache, _sampling(accelerator, pipeline, settings.enable_model_cpu_offload):
                for number in range(accelerator.process_index, last, num_ranks):
                    # With a sharded network no rank may stop before the others.
                    if is_told_to_stop() and not is_fsdp(accelerator):
                        break
                    index = min(number, total - 1)
                    pipeline.set_progress_bar_config(
                        desc=f"Validation video {index + 1} of {total}",
                        unit=" steps",
                        leave=False,
                        disable=not accelerator.is_main_process,
                    )
                    frames = _sample(pipeline, settings, prompts, index)
                    if number < total:
                        videos.append(_write(frames, settings, number, folder))
    except OutOfStep:
        raise
    except UserError as error:
        return videos, [f"rank {accelerator.process_index}: {error}"]
    except Exception as error:
        # As text, because the error keeps the tensors on the device alive.
        trace = "".join(traceback.format_exception(error)).rstrip()
        return videos, [f"rank {accelerator.process_index}: {type(error).__name__}: {error}\n{trace}"]
    return videos, []


@contextmanager
def _sampling(accelerator: Accelerator, pipeline: Pipeline, cpu_offload: bool) -> Iterator[None]:
    """Set up a pipeline for sampling, and undo everything afterwards."""
    vae = pipeline.vae
    with _restored(pipeline.transformer), _restored(vae):
        flags = vae.use_slicing, vae.use_tiling
        try:
            pipeline.transformer.eval()
            vae.use_slicing = vae.use_tiling = True  # a frame of 480x720 that is not tiled takes 18 GB
            if cpu_offload and accelerator.device.type != "cpu":
                pipeline.enable_model_cpu_offload(device=accelerator.device)
            else:
                vae.to(accelerator.device)
            # The transformer's forward pass includes accelerate's autocast, which float32 adapters on a base in half
            # precision need.
            yield
        finally:
            vae.use_slicing, vae.use_tiling = flags
            pipeline.remove_all_hooks()


@contextmanager
def _restored(module: torch.nn.Module) -> Iterator[None]:
    """Restore the device, dtypes, modes and trainable parameters of a module, which must be on one device."""
    device = next(module.parameters()).device
    dtypes = {name: tensor.dtype for name, tensor in _named_tensors(module)}
    trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        module.to(device)
        for name, tensor in _named_tensors(module):
            if tensor.dtype != dtypes.get(name, tensor.dtype):
                tensor.data = tensor.data.to(dtypes[name])
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
        for part, mode in modes:
            part.training = mode


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


@contextmanager
def _kept_random_states(device: torch.device) -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch, including that of `device`."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _sample(pipeline: Pipeline, settings: ValidationSettings, prompts: PromptCache, number: int) -> list[Image.Image]:
    """Sample the video of this number, counted over all prompts."""
    prompt = number // settings.num_videos
    return sample_video(
        pipeline,
        prompts.load(settings.prompts[prompt]).to(settings.dtype),
        prompts.load("").to(settings.dtype) if settings.guidance_scale > 1 else None,
        None if settings.conditions is None else settings.conditions[prompt],
        size=Bucket(settings.num_frames, settings.height, settings.width),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        use_dynamic_cfg=settings.use_dynamic_cfg,
        seed=settings.seed + number,
    )


def _write(frames: Sequence[Image.Image], settings: ValidationSettings, number: int, folder: Path) -> ValidationVideo:
    prompt, video = divmod(number, settings.num_videos)
    text = settings.prompts[prompt]
    name = "-".join(filter(None, (f"{prompt:02d}", f"{video:02d}", slug(text))))
    with atomic_write(folder / f"{name}.mp4") as path:
        write_video(path, frames, settings.fps)
    shown = [frames[index] for index in shown_indices(settings.num_frames)]
    for frame in shown:
        frame.thumbnail(_SHOWN_SIZE)
    return ValidationVideo(number, name, text, folder / f"{name}.mp4", [np.asarray(frame) for frame in shown])


def _draw_sheet(
    videos: Sequence[ValidationVideo], settings: ValidationSettings, folder: Path, step: int
) -> Path | None:
    """Draw a row for each video, below its row from before training; None, with a warning, if it fails."""
    indices = shown_indices(settings.num_frames)
    conditions = settings.conditions or [None] * len(settings.prompts)
    titles, _ = shown_condition(conditions[0], settings.num_frames)
    columns = [*titles, *(f"frame {index + 1}" for index in indices)]
    rows = []
    path = folder / f"step-{step}" / "contact_sheet.png"
    try:
        for video in videos:
            prompt = video.number // settings.num_videos
            _, start = shown_condition(conditions[prompt], settings.num_frames)
            if not start and settings.conditions is not None and video.number % settings.num_videos == 0:
                control = [np.asarray(settings.conditions[prompt][index]) for index in indices]
                rows.append(SheetRow(control, "control", video.prompt))
            before = folder / "step-0" / video.file.name
            if step > 0 and before.is_file():
                rows.append(SheetRow([*start, *read_frames(before, indices)], "before training", ""))
            moment = f"step {step}" if step > 0 else "before training"
            rows.append(SheetRow([*start, *video.shown], f"{moment} · {video.name}", video.prompt))
        draw_contact_sheet(rows, path, columns)
    except Exception as error:
        logger.warning("warning: cannot draw the contact sheet of step %d: %s", step, error)
        return None
    return path
