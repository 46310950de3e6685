"""The loss of held-out clips at fixed noise levels under fixed noise: the curve that shows overfitting.

The training loss also falls on clips that are memorized, and videos sampled from them look good. Here only the weights
differ from one validation to the next.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLCogVideoX

from common.bars import tqdm
from common.errors import UserError, listing
from data.clips import ClipSample
from data.sampler import Draw
from dataset import Batch, ClipDataset
from diffusion.latents import image_noise_scales
from diffusion.objective import Objective
from diffusion.randomness import step_generator
from models.encoding import encode_noised_image, encode_videos
from models.prompts import PromptCache
from parallel.coordinator import Coordinator
from parallel.lockstep import OutOfStep, lockstep


logger = logging.getLogger(__name__)

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the timesteps
NOISE_SEED = 0  # the same in every run, so that runs can be compared


def encode_validation_set(
    clips: Sequence[ClipSample],
    vae: AutoencoderKLCogVideoX,
    prompts: PromptCache,
    *,
    reshape_mode: str,
    with_images: bool,
    control: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[Batch]:
    """Encode a rank's share of the clips, each to a batch of one on the CPU.

    All ranks get the same number of clips, because a sharded network needs all ranks for every call. The last ranks
    may get a clip of another rank again, which `mean_losses` counts once. Clips that do not decode are a UserError.

    Args:
        clips: the full set, one sample each.
        vae: on the device to use.
        reshape_mode: how a clip gets its bucket's size, as in `reshape_frames`; not random.
        with_images: also encode the first frames for image-to-video, under fixed noise.
        control: also encode the controls, as in `ClipDataset`.
    """
    conditions = {"with_images": with_images, "control": control}
    dataset = ClipDataset(clips, reshape_mode=reshape_mode, random_flip=None, seed=0, prompts=prompts, **conditions)
    batches, failed = [], []
    rounds = math.ceil(len(clips) / world_size)
    share = [number % len(clips) for number in range(rank, rounds * world_size, world_size)]
    for index in tqdm(share, desc="Encoding validation clips", unit=" clips", disable=rank != 0):
        sample = dataset[Draw(index, 0)]
        failed += [reason for _, reason in sample.failed]
        if not failed:
            # The noise depends on a clip's content, so it stays when clips are added, moved or reordered.
            batches.append(_encode(replace(sample, names=[clips[index].info.sha256]), vae))
    if failed:
        title = f"--validation_dataset_file: {len(failed)} clips cannot be decoded; fix or remove them:"
        raise UserError(listing(title, failed, most=len(failed)))
    return batches


def _encode(sample: Batch, vae: AutoencoderKLCogVideoX) -> Batch:
    image_moments = None
    if sample.images is not None:
        generator = step_generator(torch.device("cpu"), NOISE_SEED, "image", *sample.names)
        image_moments = encode_noised_image(vae, sample.images[0], image_noise_scales(1, generator), generator).cpu()
    moments = encode_videos(vae, sample.videos).cpu()
    encoded = replace(sample, videos=None, images=None, video_moments=moments, image_moments=image_moments)
    if sample.controls is None:
        return encoded
    return replace(encoded, controls=None, control_moments=encode_videos(vae, sample.controls).cpu())


def validate_loss(
    objective: Objective, batches: Sequence[Batch], accelerator: Accelerator, coordinator: Coordinator, step: int
) -> list[str]:
    """Compute and log the losses of the full set after `step` optimizer steps; called on every rank.

    A failure is a warning and never ends the run.

    Args:
        objective: has the model, whose mode is restored, as are the global random states.
        batches: this rank's batches, as from `encode_validation_set`.

    Returns:
        The reason of each failed rank; the same on all ranks.
    """
    losses, failures = {}, []
    try:
        with lockstep(accelerator, coordinator) as watch:
            watch(objective.model)
            bar = tqdm(
                batches, desc="Validation loss", unit=" clips", leave=False, disable=not accelerator.is_main_process
            )
            losses = clip_losses(objective, bar, accelerator.device)
    except OutOfStep:
        raise
    except Exception as error:
        # As text, because the error keeps the tensors on the device alive.
        failures = [f"rank {accelerator.process_index}: {type(error).__name__}: {error}"]
    # The losses of each clip, not each rank's sum, so the means have the same bits for any number of ranks.
    of_ranks, failures_of_ranks = zip(*coordinator.gather((losses, failures)), strict=True)
    failures = list(chain(*failures_of_ranks))
    for failure in failures:
        logger.warning("warning: the validation loss at step %d failed, training continues; %s", step, failure)
    if not failures:
        means = mean_losses({k: v for of_rank in of_ranks for k, v in of_rank.items()}, _timesteps(objective))
        logger.info("validation loss at step %d: %.4f", step, means["validation_loss"])
        accelerator.log(means, step=step)
    return failures


@torch.no_grad()
def clip_losses(objective: Objective, batches: Iterable[Batch], device: torch.device) -> dict[int, list[float]]:
    """Compute the losses of a rank's clips at each quantile of the timesteps, by the clips' index in the full set."""
    losses: dict[int, torch.Tensor] = {}
    was_training = objective.model.training
    objective.model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for batch in batches:
                on_device = batch.to(device)
                at_quantiles = [
                    objective.losses(
                        on_device,
                        torch.tensor([timestep], device=device),
                        [step_generator(device, NOISE_SEED, quantile, *batch.names)],
                    )
                    for quantile, timestep in zip(QUANTILES, _timesteps(objective), strict=True)
                ]
                losses[batch.draws[0].index] = torch.cat(at_quantiles)
    finally:
        objective.model.train(was_training)
    return {index: values.tolist() for index, values in losses.items()}


def mean_losses(losses: Mapping[int, Sequence[float]], timesteps: Sequence[int]) -> dict[str, float]:
    """Return the means over clips: `validation_loss` over all quantiles, `validation_loss/t=100` and so on for each.

    Args:
        losses: losses of all ranks' clips at each of the timesteps, as from `clip_losses`.
    """
    means = [math.fsum(of_quantile) / len(losses) for of_quantile in zip(*losses.values(), strict=True)]
    at_timesteps = {f"validation_loss/t={t}": mean for t, mean in zip(timesteps, means, strict=True)}
    return {"validation_loss": math.fsum(means) / len(means), **at_timesteps}


def _timesteps(objective: Objective) -> list[int]:
    return [round(quantile * (objective.scheduler.config.num_train_timesteps - 1)) for quantile in QUANTILES]
