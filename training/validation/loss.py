"""The loss of clips held out from training, at fixed noise levels under fixed noise: the curve that shows overfitting.

Training losses cannot show it, as they fall on clips learnt by heart too; nor can sampled videos, which look better
than ever then. Here nothing but the weights differs from one validation to the next.
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
from parallel.lockstep import Lockstep, OutOfStep


logger = logging.getLogger(__name__)

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the timesteps
NOISE_SEED = 0  # the same in every run, so that runs compare


def encode_validation_set(
    clips: Sequence[ClipSample],
    vae: AutoencoderKLCogVideoX,
    prompts: PromptCache,
    *,
    reshape_mode: str,
    with_images: bool,
    rank: int = 0,
    world_size: int = 1,
) -> list[Batch]:
    """Encode a rank's share of the clips, each to a batch of one on the CPU.

    All ranks get as many, because the networks of some ways to run need all of them for every call: the last ones may
    share a clip that another rank has, which `mean_losses` counts once.

    Args:
        clips: the whole set, one sample each.
        vae: on the device to use.
        prompts: where the captions' embeddings are.
        reshape_mode: how a clip gets its bucket's size, as `reshape_frames` takes it; not random.
        with_images: also encode what image-to-video starts from, under a noise that is always the same.

    Raises:
        UserError: clips do not decode; all of this rank's are listed.
    """
    dataset = ClipDataset(
        clips, reshape_mode=reshape_mode, random_flip=None, seed=0, prompts=prompts, with_images=with_images
    )
    batches, failed = [], []
    share = _share(len(clips), rank, world_size)
    for index in tqdm(share, desc="Encoding validation clips", unit=" clips", disable=rank != 0):
        sample = dataset[Draw(index, 0)]
        failed += [reason for _, reason in sample.failed]
        if not failed:
            # Noise follows a clip's content, so that it stays when clips are added, moved or put in another order.
            batches.append(_encode(replace(sample, names=[clips[index].info.sha256]), vae))
    if failed:
        title = f"--validation_dataset_file: {len(failed)} clips cannot be decoded; mend or remove them:"
        raise UserError(listing(title, failed, most=len(failed)))
    return batches


def _share(num_clips: int, rank: int, world_size: int) -> list[int]:
    rounds = math.ceil(num_clips / world_size)
    return [number % num_clips for number in range(rank, rounds * world_size, world_size)]


def _encode(sample: Batch, vae: AutoencoderKLCogVideoX) -> Batch:
    image_moments = None
    if sample.images is not None:
        generator = step_generator(torch.device("cpu"), NOISE_SEED, "image", *sample.names)
        image_moments = encode_noised_image(vae, sample.images[0], image_noise_scales(1, generator), generator).cpu()
    moments = encode_videos(vae, sample.videos).cpu()
    return replace(sample, videos=None, images=None, video_moments=moments, image_moments=image_moments)


def validation_losses(
    objective: Objective,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    coordinator: Coordinator,
    num_train_timesteps: int,
) -> tuple[dict[str, float], list[str]]:
    """The losses of the whole set, by the names they are logged under; called on every rank, which all get them.

    A failure never ends the run.

    Args:
        objective: with the model to judge, which is left in the mode it was in; nor do the global random numbers move.
        batches: this rank's, as from `encode_validation_set`.
        num_train_timesteps: the noise schedule's.

    Returns:
        The losses, none if any rank failed, and why each such rank did.
    """
    losses, failures = {}, []
    try:
        with Lockstep(accelerator, coordinator) as lockstep, lockstep.calling(objective.model):
            bar = tqdm(
                batches, desc="Validation loss", unit=" clips", leave=False, disable=not accelerator.is_main_process
            )
            losses = clip_losses(objective, bar, accelerator.device, num_train_timesteps)
    except OutOfStep:
        raise
    except Exception as error:
        # As text: the error itself holds on to all that was on the device.
        failures = [f"rank {accelerator.process_index}: {type(error).__name__}: {error}"]
    # The losses of each clip, not their sum on each rank: however many ranks there are, the means have the same bits.
    of_ranks, failures_of_ranks = zip(*coordinator.gather((losses, failures)), strict=True)
    failures = list(chain(*failures_of_ranks))
    if failures:
        return {}, failures
    return mean_losses({k: v for of_rank in of_ranks for k, v in of_rank.items()}, num_train_timesteps), []


@torch.no_grad()
def clip_losses(
    objective: Objective, batches: Iterable[Batch], device: torch.device, num_train_timesteps: int
) -> dict[int, list[float]]:
    """The losses of a rank's clips at each quantile of the timesteps, by the clips' place in the whole set."""
    timesteps = _timesteps(num_train_timesteps)
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
                    for quantile, timestep in zip(QUANTILES, timesteps, strict=True)
                ]
                losses[batch.draws[0].index] = torch.cat(at_quantiles)
    finally:
        objective.model.train(was_training)
    return {index: values.tolist() for index, values in losses.items()}


def mean_losses(losses: Mapping[int, Sequence[float]], num_train_timesteps: int) -> dict[str, float]:
    """Means over clips, by name: `validation_loss` over all quantiles, `validation_loss/t=100` and so on for each.

    Args:
        losses: of each clip at each quantile, as from `clip_losses`, of all ranks together.
        num_train_timesteps: the noise schedule's.
    """
    means = [math.fsum(of_quantile) / len(losses) for of_quantile in zip(*losses.values(), strict=True)]
    by_timestep = zip(_timesteps(num_train_timesteps), means, strict=True)
    return {
        "validation_loss": math.fsum(means) / len(means),
        **{f"validation_loss/t={timestep}": mean for timestep, mean in by_timestep},
    }


def log_validation_losses(
    accelerator: Accelerator, losses: Mapping[str, float], failures: Sequence[str], step: int
) -> None:
    """Write the losses after `step` optimizer steps to every tracker, and their mean or what went wrong to the log."""
    for failure in failures:
        logger.warning("warning: the validation loss at step %d failed, training goes on; %s", step, failure)
    if losses:
        logger.info("validation loss at step %d: %.4f", step, losses["validation_loss"])
        accelerator.log(dict(losses), step=step)


def _timesteps(num_train_timesteps: int) -> list[int]:
    return [round(quantile * (num_train_timesteps - 1)) for quantile in QUANTILES]
