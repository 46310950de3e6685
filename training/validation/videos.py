"""Sample videos with the model in training, write them, and log them to the trackers."""

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
from diffusers import AutoencoderKLCogVideoX
from diffusers.training_utils import free_memory
from PIL import Image

from common.errors import UserError
from common.files import atomic_write, slug
from data.buckets import Bucket
from models.prompts import PromptCache
from models.sampling import Pipeline, sample_video
from parallel.coordinator import Coordinator
from parallel.fsdp import is_fsdp
from parallel.lockstep import Lockstep, OutOfStep
from validation.grid import draw_grid
from validation.trackers import ValidationVideo, log_videos
from video.contact_sheet import SheetRow, draw_contact_sheet, shown_indices
from video.io import read_frames, write_video


logger = logging.getLogger(__name__)

_SHOWN_SIZE = 360, 240  # pixels, the most that they are wide and high


@dataclass(frozen=True)
class ValidationSettings:
    """What is sampled at each validation. The seed is fixed, so that successive validations compare."""

    prompts: list[str]
    images: list[Image.Image] | None  # to begin with, one for each prompt; None for text-to-video
    dtype: torch.dtype  # that the pipeline computes in
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
    """Sample the validation videos, spread over the ranks, into `folder/step-<step>/`; called on every rank.

    There they lie with a contact sheet of all of them, beside those of `folder/step-0` where there are any; a picture
    in `folder` has all steps side by side. A failure is logged as a warning: it never ends the run. Transformer, VAE
    and the global random states are left as they were found.

    Args:
        make_pipeline: wires the transformer in training to a VAE and a scheduler; called anew at each validation.
        settings: what to sample.
        prompts: holds the embeddings of the prompts and, where there is guidance, of the empty one.
        folder: of all the run's validations; the same one on all machines.
        step: optimizer steps done; 0 for the model as it was before.
        is_told_to_stop: when it says so, no other video is begun.

    Returns:
        Why sampling failed, for each rank where it did, in its first line; the same on all ranks.
    """
    with _random_states_kept(accelerator.device):
        share = _sample_share(
            accelerator, coordinator, make_pipeline, settings, prompts, folder / f"step-{step}", is_told_to_stop
        )
        free_memory()
        # Whatever happened, every rank comes here, and may have to wait for long.
        videos_of_ranks, failures_of_ranks = zip(*coordinator.gather(share), strict=True)
        failures = list(chain(*failures_of_ranks))
        for failure in failures:
            logger.warning("warning: validation at step %d failed, training goes on; %s", step, failure)
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
    """This rank's videos, and why there are no more of them if anything failed."""
    videos: list[ValidationVideo] = []
    total, num_ranks = len(settings.prompts) * settings.num_videos, accelerator.num_processes
    # In shards the network needs all ranks: those that have no more to do sample for the others' sake.
    last = math.ceil(total / num_ranks) * num_ranks if is_fsdp(accelerator) else total
    try:
        with Lockstep(accelerator, coordinator) as lockstep:
            pipeline = make_pipeline()
            with (
                _sampling(accelerator, pipeline, settings.enable_model_cpu_offload),
                lockstep.calling(pipeline.transformer),
            ):
                for number in range(accelerator.process_index, last, num_ranks):
                    # In shards no rank may stop before the others.
                    if is_told_to_stop() and not is_fsdp(accelerator):
                        break
                    pipeline.set_progress_bar_config(
                        desc=f"Validation video {min(number, total - 1) + 1} of {total}",
                        unit=" steps",
                        leave=False,
                        disable=not accelerator.is_main_process,
                    )
                    if number < total:
                        videos.append(_make_video(pipeline, settings, prompts, number, folder))
                    else:
                        _sample(pipeline, settings, prompts, 0, settings.seed)
    except OutOfStep:
        raise
    except UserError as error:
        return videos, [f"rank {accelerator.process_index}: {error}"]
    except Exception as error:
        # As text: the error itself holds on to all that was on the device.
        trace = "".join(traceback.format_exception(error)).rstrip()
        return videos, [f"rank {accelerator.process_index}: {type(error).__name__}: {error}\n{trace}"]
    return videos, []


@contextmanager
def _sampling(accelerator: Accelerator, pipeline: Pipeline, cpu_offload: bool) -> Iterator[None]:
    """Set up a pipeline for sampling, and undo it all afterwards."""
    with _left_as_found(pipeline.transformer), _left_as_found(pipeline.vae), _in_parts(pipeline.vae):
        try:
            pipeline.transformer.eval()
            if cpu_offload and accelerator.device.type != "cpu":
                pipeline.enable_model_cpu_offload(device=accelerator.device)
            else:
                pipeline.vae.to(accelerator.device)
            # Autocast, which the float32 adapters need on a base in half precision, is in the transformer's forward
            # pass: accelerate put it there for training.
            yield
        finally:
            pipeline.remove_all_hooks()


@contextmanager
def _in_parts(vae: AutoencoderKLCogVideoX) -> Iterator[None]:
    """Have the VAE work on one video and one tile at a time meanwhile: whole, a frame of 480x720 takes 18 GB."""
    flags = vae.use_slicing, vae.use_tiling
    vae.use_slicing = vae.use_tiling = True
    try:
        yield
    finally:
        vae.use_slicing, vae.use_tiling = flags


@contextmanager
def _left_as_found(module: torch.nn.Module) -> Iterator[None]:
    """Give a module its device, dtypes, modes and trainable parameters back in the end; it lies on one device."""
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
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """Give the global generators of Python, NumPy and torch, that of `device` too, their states back in the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _make_video(
    pipeline: Pipeline, settings: ValidationSettings, prompts: PromptCache, number: int, folder: Path
) -> ValidationVideo:
    """Sample the video of that number, counted over all prompts, and write it as mp4."""
    prompt, video = divmod(number, settings.num_videos)
    text = settings.prompts[prompt]
    name = "-".join(filter(None, (f"{prompt:02d}", f"{video:02d}", slug(text))))
    frames = _sample(pipeline, settings, prompts, prompt, settings.seed + number)
    with atomic_write(folder / f"{name}.mp4") as path:
        write_video(path, frames, settings.fps)
    shown = [frames[index] for index in shown_indices(settings.num_frames)]
    for frame in shown:
        frame.thumbnail(_SHOWN_SIZE)
    return ValidationVideo(number, name, text, folder / f"{name}.mp4", [np.asarray(frame) for frame in shown])


def _sample(
    pipeline: Pipeline, settings: ValidationSettings, prompts: PromptCache, prompt: int, seed: int
) -> list[Image.Image]:
    return sample_video(
        pipeline,
        prompts.load(settings.prompts[prompt]).to(settings.dtype),
        prompts.load("").to(settings.dtype) if settings.guidance_scale > 1 else None,
        None if settings.images is None else settings.images[prompt],
        size=Bucket(settings.num_frames, settings.height, settings.width),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        use_dynamic_cfg=settings.use_dynamic_cfg,
        seed=seed,
    )


def _draw_sheet(
    videos: Sequence[ValidationVideo], settings: ValidationSettings, folder: Path, step: int
) -> Path | None:
    """Draw a row for each video, below that of the model before training; None, with a warning, if it fails."""
    indices = shown_indices(settings.num_frames)
    columns = [f"frame {index + 1}" for index in indices]
    if settings.images is not None:
        columns.insert(0, "start image")
    rows = []
    path = folder / f"step-{step}" / "contact_sheet.png"
    try:
        for video in videos:
            start = []
            if settings.images is not None:
                start.append(np.asarray(settings.images[video.number // settings.num_videos]))
            before = folder / "step-0" / video.file.name
            if step > 0 and before.is_file():
                rows.append(SheetRow([*start, *read_frames(before, indices)], "before training", ""))
            moment = f"step {step}" if step > 0 else "before training"
            rows.append(SheetRow([*start, *video.shown], f"{moment} · {video.name}", video.prompt))
        draw_contact_sheet(rows, path, columns)
    except Exception as error:
        logger.warning("warning: there is no contact sheet of step %d: %s", step, error)
        return None
    return path
