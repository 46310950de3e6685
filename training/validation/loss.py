"""The loss of held-out clips at fixed noise levels under fixed noise: the curve that shows overfitting.

The training loss also falls on clips that are memorized, and videos sampled from them look good. Here only the weights
differ from one validation to the next.
"""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLCogVideoX

from common.bars import tqdm
from common.errors import UserError, listing
from data.clips import ClipSample
from data.sampler import Draw
from dataset import Batch, ClipDataset, PreparedDataset, without_failures
from diffusion.latents import image_noise_scales
from diffusion.objective import Objective
from diffusion.randomness import step_generator
from models.encoding import encode_noised_images, encode_videos
from models.prompts import PromptCache
from parallel.coordinator import Coordinator
from parallel.lockstep import OutOfStep, lockstep
from tracking.loss_curve import LossCurve
from validation.schedule import QUANTILES, Pair
from video.condition_frames import FIRST


if TYPE_CHECKING:
    from prepared.index import PreparedIndex

logger = logging.getLogger(__name__)

NOISE_SEED = 0  # the same in every run, so that runs can be compared


def encode_validation_set(
    clips: Sequence[ClipSample],
    share: Collection[int],
    vae: AutoencoderKLCogVideoX,
    prompts: PromptCache,
    *,
    reshape_mode: str,
    with_images: bool,
    condition_frames: str = FIRST,
    control: str | None = None,
    replace_failed: bool = False,
    shows_progress: bool = True,
) -> list[Batch]:
    """Encode a rank's share of the clips, each to a batch of one on the CPU. Clips that do not decode are a UserError.

    Args:
        clips: the full set, one sample each.
        share: indices of clips.
        vae: on the device to use.
        reshape_mode: how a clip gets its bucket's size, as in `reshape_frames`; not random.
        with_images: also encode the given frames for image-to-video, under fixed noise.
        condition_frames: which these are, as in `ClipDataset`.
        replace_failed: use another clip of the same size instead of one that does not decode, if there is one.
        control: also encode the controls, as in `ClipDataset`.
    """
    dataset = ClipDataset(
        clips,
        reshape_mode=reshape_mode,
        random_flip=None,
        seed=0,
        prompts=prompts,
        with_images=with_images,
        condition_frames=condition_frames,
        control=control,
        replace_failed=replace_failed,
    )
    batches, failed = [], []
    for index in tqdm(share, desc="Encoding validation clips", unit=" clips", disable=not shows_progress):
        sample = dataset[Draw(index, 0)]
        failed += [reason for _, reason in sample.failed]
        if not failed:
            # The noise depends on a clip's content, so it stays when clips are added, moved or reordered.
            batches.append(_encode(replace(sample, names=[clips[index].info.sha256]), vae))
    if failed:
        title = f"{len(failed)} of the clips held out for validation cannot be decoded; fix or remove them:"
        raise UserError(listing(title, failed, most=len(failed)))
    return batches


def read_validation_set(
    clips: "PreparedIndex", share: Collection[int], *, with_images: bool, with_controls: bool = False
) -> list[Batch]:
    """Read a rank's share of prepared clips, each as a batch of one; clips that cannot be read are a UserError."""
    dataset = PreparedDataset(clips, with_images=with_images, with_controls=with_controls)
    return list(without_failures(dataset[Draw(index, 0)] for index in share))


def _encode(sample: Batch, vae: AutoencoderKLCogVideoX) -> Batch:
    image_moments = None
    if sample.images is not None:
        generator = step_generator(torch.device("cpu"), NOISE_SEED, "image", *sample.names)
        image_moments = encode_noised_images(vae, sample.images[0], image_noise_scales(1, generator), generator).cpu()
    moments = encode_videos(vae, sample.videos).cpu()
    encoded = replace(sample, videos=None, images=None, video_moments=moments, image_moments=image_moments)
    if sample.controls is None:
        return encoded
    return replace(encoded, controls=None, control_moments=encode_videos(vae, sample.controls).cpu())


def validate_loss(
    objective: Objective,
    batches: Sequence[Batch],
    quantiles: Mapping[int, Sequence[int]],
    accelerator: Accelerator,
    coordinator: Coordinator,
    step: int,
    curve: LossCurve | None = None,
) -> list[str]:
    """Compute and log the losses of all ranks after `step` optimizer steps; called on every rank.

    A failure is a warning and never ends the run.

    Args:
        objective: has the model, whose mode is restored, as are the global random states.
        batches: this rank's clips, as from `encode_validation_set`.
        quantiles: what this rank measures, as from `share_pairs`.
        curve: where the run's losses are kept, which tells the best step and what the losses show.

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
            losses = clip_losses(objective, bar, quantiles, accelerator.device)
    except OutOfStep:
        raise
    except Exception as error:
        # As text, because the error keeps the tensors on the device alive.
        failures = [f"rank {accelerator.process_index}: {type(error).__name__}: {error}"]
    # Each loss, not each rank's sum, so the means have the same bits for any number of ranks.
    of_ranks, failures_of_ranks = zip(*coordinator.gather((losses, failures)), strict=True)
    failures = list(chain(*failures_of_ranks))
    for failure in failures:
        logger.warning("warning: the validation loss at step %d failed, training continues; %s", step, failure)
    if not failures:
        means = mean_losses({k: v for of_rank in of_ranks for k, v in of_rank.items()}, _timesteps(objective))
        logger.info("validation loss at step %d: %.4f", step, means["validation_loss"])
        accelerator.log(means | (curve.best_with(step, means["validation_loss"]) if curve else {}), step=step)
        if curve and (news := curve.news()):
            logger.warning("warning: %s", news)
    return failures


@torch.no_grad()
def clip_losses(
    objective: Objective, batches: Iterable[Batch], quantiles: Mapping[int, Sequence[int]], device: torch.device
) -> dict[Pair, float]:
    """Compute the losses of a rank's clips at some quantiles of the timesteps.

    Blocks are not computed by their compiled functions, which would be compiled again for batches of one.

    Args:
        quantiles: by the clips' index in the full set.
    """
    losses: dict[Pair, torch.Tensor] = {}
    timesteps = _timesteps(objective)
    was_training = objective.model.training
    objective.model.eval()
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager"),
        ):
            for batch in batches:
                on_device, index = batch.to(device), batch.draws[0].index
                for number in quantiles[index]:
                    losses[index, number] = objective.losses(
                        on_device,
                        torch.tensor([timesteps[number]], device=device),
                        [step_generator(device, NOISE_SEED, QUANTILES[number], *batch.names)],
                    )
    finally:
        objective.model.train(was_training)
    return dict(zip(losses, torch.cat(list(losses.values())).tolist(), strict=True))


def mean_losses(losses: Mapping[Pair, float], timesteps: Sequence[int]) -> dict[str, float]:
    """Return the means over clips: `validation_loss` over all quantiles, `validation_loss/t=100` and so on for each.

    Args:
        losses: of all ranks' clips, as from `clip_losses`.
        timesteps: of all quantiles.
    """
    of_quantiles = {number: [] for number in sorted({number for _, number in losses})}
    for pair in sorted(losses):
        of_quantiles[pair[1]].append(losses[pair])
    means = {timesteps[number]: math.fsum(values) / len(values) for number, values in of_quantiles.items()}
    at_timesteps = {f"validation_loss/t={timestep}": mean for timestep, mean in means.items()}
    return {"validation_loss": math.fsum(means.values()) / len(means), **at_timesteps}


def _timesteps(objective: Objective) -> list[int]:
    return [round(quantile * (objective.scheduler.config.num_train_timesteps - 1)) for quantile in QUANTILES]
