"""The losses of held-out clips: what is encoded, and that only the weights change them."""

import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UserError
from data.buckets import Bucket
from data.clips import Clip, ClipSample, plan_clips
from data.sampler import Draw
from dataset import Batch, ClipDataset
from diffusion.image_to_video import ImageToVideo
from diffusion.objective import Objective
from models.encoding import encode_noised_image, encode_videos
from models.prompts import PromptCache
from models.source import ModelSource
from parallel.coordinator import Coordinator
from schedulers import make_scheduler
from tiny_steps import make_objective
from validation.loss import clip_losses, encode_validation_set, mean_losses, validate_loss
from video.probe import probe_files


CPU = torch.device("cpu")
TIMESTEPS = [100, 200, 300, 400, 500, 599, 699, 799, 899]  # of 1000


@pytest.fixture(scope="module")
def held_out(demo_clips) -> list[ClipSample]:
    """Three clips of 5 x 32 x 48."""
    paths = sorted((demo_clips / "videos").iterdir())[:3]
    clips = [Clip(path, f"clip {number}", path.name) for number, path in enumerate(paths)]
    return plan_clips(clips, probe_files(paths), [Bucket(5, 32, 48)], with_images=True)[0]


class Encoders:
    def __init__(self, model: Path, folder: Path, clips: list[ClipSample]):
        source = ModelSource(str(model))
        self.vae = source.load_vae(torch.float32, slicing=False, tiling=False)
        self.prompts = PromptCache(folder, source, torch.float32)
        self.prompts.embed([planned.clip.caption for planned in clips], CPU)

    def encode(self, clips: list[ClipSample], *, with_images: bool = False, **ranks: int) -> list[Batch]:
        return encode_validation_set(
            clips, self.vae, self.prompts, reshape_mode="center", with_images=with_images, **ranks
        )


@pytest.fixture(scope="module")
def encoders(tiny_models, held_out, tmp_path_factory) -> Encoders:
    return Encoders(tiny_models("5b"), tmp_path_factory.mktemp("prompts"), held_out)


@pytest.fixture(scope="module")
def encoded(encoders, held_out) -> list[Batch]:
    return encoders.encode(held_out)


def frames_of(planned: ClipSample) -> torch.Tensor:
    """A clip as the model sees it, `[1, F, 3, H, W]`."""
    return ClipDataset([planned], reshape_mode="center", random_flip=None, seed=0)[Draw(0, 0)].videos


# What is encoded


def test_each_clip_becomes_a_batch_of_its_moments_and_its_prompt(encoders, held_out, encoded):
    assert [batch.draws[0].index for batch in encoded] == [0, 1, 2]
    for planned, batch in zip(held_out, encoded, strict=True):
        assert torch.equal(batch.video_moments, encode_videos(encoders.vae, frames_of(planned)))
        assert torch.equal(batch.prompt_embeds[0], encoders.prompts.load(planned.clip.caption))
        assert (batch.videos, batch.images, batch.image_moments) == (None, None, None)


def test_the_image_is_the_first_frame_under_fixed_noise(encoders, held_out):
    (batch,) = encoders.encode(held_out[:1], with_images=True)
    assert batch.image_moments.shape == (1, 32, 1, 4, 6)
    assert torch.equal(batch.image_moments, encoders.encode(held_out[1::-1], with_images=True)[1].image_moments)
    # Neither clean nor further off than by noise that is five standard deviations stronger than usual.
    clean, strongest = (
        encode_noised_image(encoders.vae, frames_of(held_out[0])[0, 0], scale, torch.Generator().manual_seed(1))
        for scale in (torch.zeros(1), torch.full((1,), math.exp(-3 + 0.5 * 5)))
    )
    assert 0 < (batch.image_moments - clean)[:, :16].abs().mean() < (strongest - clean)[:, :16].abs().mean()


@pytest.mark.parametrize(("world_size", "indices"), [(2, [[0, 2], [1, 0]]), (4, [[0], [1], [2], [0]])])
def test_the_ranks_share_all_clips_evenly(encoders, held_out, encoded, world_size, indices):
    shares = [encoders.encode(held_out, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [[batch.draws[0].index for batch in share] for share in shares] == indices
    for batch in (batch for share in shares for batch in share):
        assert torch.equal(batch.video_moments, encoded[batch.draws[0].index].video_moments)
        assert torch.equal(batch.prompt_embeds, encoded[batch.draws[0].index].prompt_embeds)


def test_clips_that_do_not_decode_are_listed(encoders, held_out, tmp_path):
    clips = []
    for planned in held_out[:2]:
        video = tmp_path / planned.clip.video.name
        video.write_bytes(bytes(1000))
        clips.append(replace(planned, clip=replace(planned.clip, video=video)))
    with pytest.raises(UserError, match="--validation_dataset_file: 2 clips cannot be decoded") as caught:
        encoders.encode([*clips, held_out[2]])
    assert all(str(planned.clip.video) in str(caught.value) for planned in clips)


# What the losses are


class StandIn:
    """An objective with losses that a test can compute from latents and timesteps."""

    def __init__(self):
        self.scheduler = make_scheduler(1.0)
        self.model = torch.nn.Dropout(0.5)
        self.modes: list[bool] = []
        self.draws: list[float] = []

    def losses(self, batch: Batch, timesteps: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        assert timesteps.dtype == torch.int64
        assert not torch.is_grad_enabled()
        self.modes.append(self.model.training)
        (generator,) = generators
        self.draws.append(float(torch.rand(1, generator=generator)))
        torch.rand(1)  # as a model that draws from the global generator would
        return self.model(batch.video_moments.mean(dim=(1, 2, 3, 4))) * timesteps


def make_batches(means: list[float]) -> list[Batch]:
    return [
        Batch([f"clip {number}"], None, video_moments=torch.full((1, 2, 1, 2, 2), mean), draws=[Draw(number, 0)])
        for number, mean in enumerate(means)
    ]


def test_the_losses_are_logged_as_means_over_clips_and_over_quantiles(tmp_path):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    for step, factor in ((0, 1.0), (10, 0.5)):
        batches = make_batches([1.0 * factor, 2.0 * factor, 6.0 * factor])
        assert validate_loss(StandIn(), batches, accelerator, Coordinator(), step) == []
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    expected = {f"validation_loss/t={timestep}": 3.0 * timestep for timestep in TIMESTEPS}
    expected["validation_loss"] = 3.0 * sum(TIMESTEPS) / 9
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, loss in expected.items():
        assert [event.step for event in events.Scalars(name)] == [0, 10]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([loss, loss / 2])


def test_every_clip_has_its_own_fixed_noise_at_every_quantile():
    first, second = StandIn(), StandIn()
    clip_losses(first, make_batches([1.0, 2.0]), CPU)
    assert len(set(first.draws)) == 2 * 9
    torch.manual_seed(7)
    clip_losses(second, make_batches([1.0, 2.0])[::-1], CPU)
    assert second.draws == first.draws[9:] + first.draws[:9]


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("was_training", [True, False])
def test_losses_are_computed_in_eval_mode_which_is_undone(was_training, fails):
    objective = StandIn()
    objective.model.train(was_training)
    state = torch.get_rng_state()
    (batch,) = make_batches([1.0])
    with pytest.raises(AttributeError) if fails else nullcontext():
        clip_losses(objective, [batch, replace(batch, video_moments=None)] if fails else [batch], CPU)
    assert objective.modes[:9] == [False] * 9
    assert objective.model.training == was_training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def image_objective(tiny_models) -> Objective:
    source = ModelSource(str(tiny_models("1.5-5b-i2v")))
    objective = make_objective(source, task=ImageToVideo(noised_image_dropout=1.0, ignore_learned_positions=False))
    objective.caption_dropout, objective.empty_prompt = 1.0, torch.zeros(8, 64)
    return objective


@pytest.fixture(scope="module")
def image_batches() -> list[Batch]:
    """Two clips of 5 x 32 x 48, encoded."""
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            names=[f"clip {number}"],
            bucket=Bucket(5, 32, 48),
            video_moments=torch.randn(1, 32, 2, 4, 6, generator=generator),
            image_moments=torch.randn(1, 32, 1, 4, 6, generator=generator),
            prompt_embeds=torch.randn(1, 8, 64, generator=generator),
            draws=[Draw(number, 0)],
        )
        for number in range(2)
    ]


def test_the_losses_of_a_model_are_the_same_at_every_call_and_on_any_ranks(image_objective, image_batches):
    losses = mean_losses(clip_losses(image_objective, image_batches, CPU), TIMESTEPS)
    torch.rand(5)
    of_ranks = [clip_losses(image_objective, [batch], CPU) for batch in image_batches[::-1]]
    assert mean_losses(of_ranks[0] | of_ranks[1], TIMESTEPS) == losses
    assert all(0 < loss < 10 for loss in losses.values())


@pytest.mark.parametrize("kept", ["prompt_embeds", "image_moments"])
def test_neither_captions_nor_images_are_dropped(image_objective, image_batches, kept):
    batch = image_batches[0]
    other = replace(batch, **{kept: torch.ones_like(getattr(batch, kept))})
    ((losses,), (other_losses,)) = (clip_losses(image_objective, [one], CPU).values() for one in (batch, other))
    assert all(loss != other_loss for loss, other_loss in zip(losses, other_losses, strict=True))


def test_a_loss_that_fails_is_a_warning(caplog):
    objective = StandIn()
    objective.losses = Mock(side_effect=RuntimeError("out of memory"))
    failures = validate_loss(objective, make_batches([1.0]), Accelerator(cpu=True), Coordinator(), 7)
    assert failures == ["rank 0: RuntimeError: out of memory"]
    assert f"the validation loss at step 7 failed, training continues; {failures[0]}" in caplog.text


def test_a_clip_keeps_its_noise_when_it_is_moved_or_listed_elsewhere(encoders, held_out, encoded, tmp_path):
    moved = Path(shutil.copy(held_out[0].clip.video, tmp_path / "moved.mp4"))
    after = encoders.encode([held_out[1], replace(held_out[0], clip=replace(held_out[0].clip, video=moved))])[1]
    objective = StandIn()
    clip_losses(objective, [encoded[0], after], CPU)
    assert objective.draws[:9] == objective.draws[9:]
