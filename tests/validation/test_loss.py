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
from models.encoding import encode_noised_images, encode_videos
from models.prompts import PromptCache
from models.source import ModelSource
from parallel.coordinator import Coordinator
from prepared_folders import write_prepared
from schedulers import make_scheduler
from tiny_steps import make_objective
from validation.loss import clip_losses, encode_validation_set, mean_losses, read_validation_set, validate_loss
from validation.schedule import balanced_pairs, share_pairs
from video.probe import probe_files


CPU = torch.device("cpu")
ALL = {clip: range(9) for clip in range(3)}  # quantiles of each clip
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

    def encode(self, clips: list[ClipSample], share: list[int] | None = None, **options: bool) -> list[Batch]:
        share, options = range(len(clips)) if share is None else share, {"with_images": False} | options
        return encode_validation_set(clips, share, self.vae, self.prompts, reshape_mode="center", **options)


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
        encode_noised_images(encoders.vae, frames_of(held_out[0])[0, :1], scale, torch.Generator().manual_seed(1))
        for scale in (torch.zeros(1), torch.full((1,), math.exp(-3 + 0.5 * 5)))
    )
    assert 0 < (batch.image_moments - clean)[:, :16].abs().mean() < (strongest - clean)[:, :16].abs().mean()


def test_a_rank_encodes_only_its_share(encoders, held_out, encoded):
    (batch,) = encoders.encode(held_out, [2])
    assert (batch.names, batch.draws) == (encoded[2].names, encoded[2].draws)
    assert torch.equal(batch.video_moments, encoded[2].video_moments)
    assert torch.equal(batch.prompt_embeds, encoded[2].prompt_embeds)


def test_clips_that_do_not_decode_are_listed(encoders, held_out, tmp_path):
    clips = []
    for planned in held_out[:2]:
        video = tmp_path / planned.clip.video.name
        video.write_bytes(bytes(1000))
        clips.append(replace(planned, clip=replace(planned.clip, video=video)))
    with pytest.raises(UserError, match="2 of the clips held out for validation cannot be decoded") as caught:
        encoders.encode([*clips, held_out[2]])
    assert all(str(planned.clip.video) in str(caught.value) for planned in clips)
    first, *_ = encoders.encode([*clips, held_out[2]], [0], replace_failed=True)
    assert first.names == [clips[0].info.sha256]


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
        assert validate_loss(StandIn(), batches, ALL, accelerator, Coordinator(), step) == []
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
    clip_losses(first, make_batches([1.0, 2.0]), ALL, CPU)
    assert len(set(first.draws)) == 2 * 9
    torch.manual_seed(7)
    clip_losses(second, make_batches([1.0, 2.0])[::-1], ALL, CPU)
    assert second.draws == first.draws[9:] + first.draws[:9]


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("was_training", [True, False])
def test_losses_are_computed_in_eval_mode_which_is_undone(was_training, fails):
    objective = StandIn()
    objective.model.train(was_training)
    state = torch.get_rng_state()
    (batch,) = make_batches([1.0])
    with pytest.raises(AttributeError) if fails else nullcontext():
        clip_losses(objective, [batch, replace(batch, video_moments=None)] if fails else [batch], ALL, CPU)
    assert objective.modes[:9] == [False] * 9
    assert objective.model.training == was_training
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_compiled_for_a_batch_of_one(fresh_compiler):
    compiled = Mock(side_effect=lambda graph, inputs: graph.forward)
    objective = StandIn()
    objective.model = torch.compile(objective.model, backend=compiled, fullgraph=True)
    clip_losses(objective, make_batches([1.0]), ALL, CPU)
    assert not compiled.called
    objective.model(torch.ones(1))
    assert compiled.called


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
    losses = mean_losses(clip_losses(image_objective, image_batches, ALL, CPU), TIMESTEPS)
    torch.rand(5)
    of_ranks = [clip_losses(image_objective, [batch], ALL, CPU) for batch in image_batches[::-1]]
    assert mean_losses(of_ranks[0] | of_ranks[1], TIMESTEPS) == losses
    assert all(0 < loss < 10 for loss in losses.values())


def test_some_quantiles_of_some_clips_are_measured_by_several_ranks():
    pairs, batches = balanced_pairs(3)[:9], make_batches([1.0, 2.0, 6.0])
    shares = [share_pairs(pairs, rank, 2) for rank in range(2)]
    assert [sum(map(len, share.values())) for share in shares] == [5, 5]  # the second one does one of the first again
    of_ranks = [clip_losses(StandIn(), [batches[clip] for clip in share], share, CPU) for share in shares]
    losses = of_ranks[0] | of_ranks[1]
    assert set(losses) == set(pairs)
    assert losses[1, 4] == 2.0 * TIMESTEPS[4]
    assert mean_losses(losses, TIMESTEPS)["validation_loss"] == pytest.approx(
        sum([1.0, 2.0, 6.0][clip] * TIMESTEPS[quantile] for clip, quantile in pairs) / 9
    )


def test_prepared_clips_are_read_without_a_vae(tmp_path):
    tensors = {"video_latents": torch.randn(32, 3, 8, 12), "prompt_embeds": torch.randn(226, 64)}
    clips = write_prepared(tmp_path, dict.fromkeys("abc", tensors), Bucket(9, 64, 96))
    (batch,) = read_validation_set(clips, [1], with_images=False)
    assert (batch.names, batch.draws) == (["b"], [Draw(1, 0)])
    assert torch.equal(batch.video_moments[0], tensors["video_latents"])


@pytest.mark.parametrize("kept", ["prompt_embeds", "image_moments"])
def test_neither_captions_nor_images_are_dropped(image_objective, image_batches, kept):
    batch = image_batches[0]
    other = replace(batch, **{kept: torch.ones_like(getattr(batch, kept))})
    losses, other_losses = (clip_losses(image_objective, [one], ALL, CPU) for one in (batch, other))
    assert all(loss != other_losses[pair] for pair, loss in losses.items())


def test_a_loss_that_fails_is_a_warning(caplog):
    objective = StandIn()
    objective.losses = Mock(side_effect=RuntimeError("out of memory"))
    failures = validate_loss(objective, make_batches([1.0]), ALL, Accelerator(cpu=True), Coordinator(), 7)
    assert failures == ["rank 0: RuntimeError: out of memory"]
    assert f"the validation loss at step 7 failed, training continues; {failures[0]}" in caplog.text


def test_a_clip_keeps_its_noise_when_it_is_moved_or_listed_elsewhere(encoders, held_out, encoded, tmp_path):
    moved = Path(shutil.copy(held_out[0].clip.video, tmp_path / "moved.mp4"))
    after = encoders.encode([held_out[1], replace(held_out[0], clip=replace(held_out[0].clip, video=moved))])[1]
    objective = StandIn()
    clip_losses(objective, [encoded[0], after], {0: range(9), 1: range(9)}, CPU)
    assert objective.draws[:9] == objective.draws[9:]
