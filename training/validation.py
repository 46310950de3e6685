"""Sample videos with the model in training, write them, and log them to the trackers."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.training_utils import free_memory
from diffusers.utils import export_to_video, load_image
from PIL import Image

from files import written_whole
from prompts import PromptCache


logger = logging.getLogger(__name__)
Pipeline = CogVideoXPipeline | CogVideoXImageToVideoPipeline


@dataclass(frozen=True)
class ValidationSettings:
    """What is sampled at each validation. The seed is fixed, so that successive validations compare."""

    prompts: list[str]
    images: list[str] | None  # paths or addresses, one for each prompt; None for text-to-video
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


@dataclass(frozen=True)
class ValidationVideo:
    """One sampled video, as it is logged."""

    name: str
    prompt: str
    file: Path
    strip: np.ndarray  # uint8 [H, 5 * W, 3]: five frames side by side


def validate(
    accelerator: Accelerator,
    make_pipeline: Callable[[], Pipeline],
    settings: ValidationSettings,
    prompts: PromptCache,
    folder: Path,
    step: int,
) -> None:
    """Sample the validation videos, spread over the ranks, into `folder/step-<step>/`; called on every rank.

    A failure is logged as a warning: it never ends the run. The transformer is left as it was found.

    Args:
        make_pipeline: wires the transformer in training to a VAE and a scheduler; called anew at each validation.
        settings: what to sample.
        prompts: holds the embeddings of the prompts and of the empty one.
        folder: of all the run's validations.
        step: optimizer steps done.
    """
    jobs = [(prompt, video) for prompt in range(len(settings.prompts)) for video in range(settings.num_videos)]
    videos: list[ValidationVideo] = []

    def sample_share() -> None:
        pipeline = make_pipeline()
        with _sampling(accelerator, pipeline, settings.enable_model_cpu_offload):
            for number in range(accelerator.process_index, len(jobs), accelerator.num_processes):
                prompt, video = jobs[number]
                name = f"{prompt:02d}-{video:02d}-{_slug(settings.prompts[prompt])}"
                frames = _sample(pipeline, settings, prompts, prompt, settings.seed + number)
                file = folder / f"step-{step}" / f"{name}.mp4"
                videos.append(_write(frames, name, settings.prompts[prompt], file, settings.fps))

    try:
        sample_share()
    except Exception:
        logger.warning("validation at step %d failed; training goes on", step, exc_info=True)
    free_memory()
    videos = gather_object(videos)
    if accelerator.is_main_process:
        _log(accelerator, videos, step)


@contextmanager
def _sampling(accelerator: Accelerator, pipeline: Pipeline, cpu_offload: bool) -> Iterator[None]:
    transformer: CogVideoXTransformer3DModel = pipeline.transformer
    was_training = transformer.training
    transformer.eval()
    pipeline.set_progress_bar_config(disable=True)
    try:
        if cpu_offload and accelerator.device.type != "cpu":
            pipeline.enable_model_cpu_offload(device=accelerator.device)
        else:
            pipeline.vae.to(accelerator.device)
        # Autocast, which the float32 adapters need on a base in half precision, is in the transformer's forward pass:
        # accelerate put it there for training.
        yield
    finally:
        pipeline.remove_all_hooks()
        # Offloading left both on the CPU; training goes on with the transformer, and from raw clips with the VAE.
        transformer.to(accelerator.device)
        pipeline.vae.to(accelerator.device)
        transformer.train(was_training)


def _sample(
    pipeline: Pipeline, settings: ValidationSettings, prompts: PromptCache, prompt: int, seed: int
) -> np.ndarray:
    device = pipeline._execution_device
    # The pipeline draws its noise in the dtype of the embeddings.
    texts = (settings.prompts[prompt], "")
    embeds, negative_embeds = (prompts.load(text)[None].to(device, settings.dtype) for text in texts)
    image = {} if settings.images is None else {"image": load_image(settings.images[prompt])}
    return pipeline(
        **image,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative_embeds,
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        use_dynamic_cfg=settings.use_dynamic_cfg,
        generator=torch.Generator(device).manual_seed(seed),
        output_type="np",
    ).frames[0]


def _write(frames: np.ndarray, name: str, prompt: str, file: Path, fps: int) -> ValidationVideo:
    """Write frames `[F, H, W, 3]` in [0, 1] as mp4, and five of them side by side as PNG."""
    shown = np.linspace(0, len(frames) - 1, 5).round().astype(int)
    strip = (np.concatenate(frames[shown], axis=1) * 255).round().astype(np.uint8)
    with written_whole(file) as path:
        export_to_video(list(frames), str(path), fps=fps)
    with written_whole(file.with_suffix(".png")) as path:
        Image.fromarray(strip).save(path)
    return ValidationVideo(name, prompt, file, strip)


def _log(accelerator: Accelerator, videos: list[ValidationVideo], step: int) -> None:
    for video in videos:
        logger.info("validation video: %s", video.file)
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            logged = [wandb.Video(str(video.file), caption=f"{video.name}: {video.prompt}") for video in videos]
            tracker.log({"validation": logged}, step=step)
        elif tracker.name == "tensorboard":
            strips = {f"validation/{video.name}": video.strip[None] for video in videos}
            tracker.log_images(strips, step=step, dataformats="NHWC")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
