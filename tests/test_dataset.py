"""Clips and tensors become the planned batches, whichever process reads them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.remote import to_path
from data.buckets import Bucket
from data.clips import Clip, ClipSample, plan_clips
from data.sampler import BucketBatchSampler, Draw
from dataset import (
    LISTED,
    Batch,
    ClipDataset,
    DeviceCopies,
    PreparedDataset,
    check_prepared,
    collate,
    make_loader,
    without_failures,
)
from encoded_clips import all_frames, encode, numbers_of
from models.encoding import encode_mask, encode_prompts
from models.prompts import PromptCache
from models.source import ModelSource
from original_folders import write_original_folder
from prepared.read_index import read_index
from prepared_folders import write_prepared
from video.controls import HIDDEN, INPAINT, KINDS, compute_control
from video.probe import probe_files, probe_video


BUCKET = Bucket(9, 64, 96)


def plan(demo_clips: Path, num_frames: int, **choice) -> list[ClipSample]:
    paths = sorted((demo_clips / "videos").iterdir())
    infos = probe_files(paths)
    buckets = sorted({Bucket(num_frames, info.height, info.width) for info in infos.values()})
    samples, bad = plan_clips([Clip(path, path.stem, path.name) for path in paths], infos, buckets, **choice)
    assert not bad
    return samples


@pytest.mark.parametrize("num_frames", [60, 160])  # the later frames are sought
def test_a_control_has_the_frames_of_its_clip_and_its_crop_and_flip(tmp_path, num_frames):
    video, control = encode(tmp_path / "a.mp4", num_frames), encode(tmp_path / "b.mp4", num_frames)
    infos = probe_files([video, control])
    clip = Clip(video, "a cat", "a:1", control=control, start_frame=num_frames - 41)
    bucket = Bucket(9, 32, 32)
    (sample,), _ = plan_clips([clip], infos, [bucket])
    options = {"reshape_mode": "random", "random_flip": 0.5, "control": LISTED}
    flipped = set()
    for epoch in range(8):
        batch = make_dataset([sample], **options)[Draw(0, epoch)]
        assert torch.equal(batch.controls, batch.videos)
        flipped.add(bytes(batch.controls[0, 0].numpy()))
    assert len(flipped) > 2
    batch = make_dataset([replace(sample, bucket=Bucket(9, 48, 80))], control=LISTED)[Draw(0, 0)]
    assert numbers_of(batch.controls[0].permute(0, 2, 3, 1).numpy()) == list(sample.frame_indices)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != INPAINT])
def test_a_computed_control_is_that_of_the_shaped_frames(planned, kind):
    batch = make_dataset(planned[:2], random_flip=1.0, control=kind)[Draw(1, 0)]
    expected = compute_control(batch.videos[0].permute(0, 2, 3, 1).numpy(), kind)
    assert np.array_equal(batch.controls[0].permute(0, 2, 3, 1).numpy(), expected)
    assert collate([batch, batch]).controls.shape == (2, *batch.videos.shape[1:])


def test_a_mask_has_the_frames_the_crop_and_the_flip_of_its_clip(tmp_path):
    """The mask is the clip itself."""
    video, mask = encode(tmp_path / "a.mp4"), encode(tmp_path / "b.mp4")
    clip = Clip(video, "a cat", "a:1", mask=mask, start_frame=19)
    (sample,), _ = plan_clips([clip], probe_files([video, mask]), [Bucket(9, 32, 32)])
    options = {"reshape_mode": "random", "random_flip": 0.5, "control": INPAINT, "with_masks": True}
    dataset = make_dataset([sample], **options)
    assert dataset.files_of(Draw(0, 0)) == [video, mask]
    seen = set()
    for epoch in range(8):
        batch = dataset[Draw(0, epoch)]
        assert torch.equal(batch.masks[0], encode_mask(batch.videos[0]))
        is_white = batch.videos.float().mean(dim=2, keepdim=True) >= HIDDEN
        assert torch.equal(batch.controls, torch.where(is_white, HIDDEN, batch.videos))
        seen.add(bytes(batch.masks.numpy()))
    assert len(seen) > 2


def test_a_mask_that_is_nowhere_white_is_a_warning_for_the_loss_and_an_error_for_inpainting(tmp_path, caplog):
    video, mask = encode(tmp_path / "a.mp4"), tmp_path / "a.mask.png"
    info = probe_video(video)

    def read(value: int, **options: str) -> list[tuple[Draw, str]]:
        pixels = np.zeros((info.height, info.width), np.uint8)
        pixels[:, : info.width // 4] = value  # outside of the crop, which may be another one in every epoch
        Image.fromarray(pixels).save(mask)
        samples, _ = plan_clips(
            [Clip(video, "a cat", "a:1", mask=mask)], probe_files([video, mask]), [Bucket(9, 32, 32)]
        )
        dataset = make_dataset(samples * 2, with_masks=True, **options)
        return [failure for index in (0, 1) for failure in dataset[Draw(index, 0)].failed]

    message = f"mask {mask} is nowhere white (255)"
    assert read(1) == [] and [message in record.message for record in caplog.records] == [True]  # once
    assert [f"nothing to fill, because the {message}" in reason for _, reason in read(1, control=INPAINT)] == [
        True
    ] * 2
    assert read(255, control=INPAINT) == read(255) == [] and len(caplog.records) == 1


def test_a_still_masks_every_frame_and_a_clip_without_a_mask_counts_everywhere(tmp_path):
    video, still = encode(tmp_path / "a.mp4"), tmp_path / "a.mask.png"
    pixels = np.zeros((48, 80), np.uint8)
    pixels[:, :40] = 255
    Image.fromarray(pixels).save(still)
    clips = [Clip(video, "a cat", "a:1", mask=mask) for mask in (still, None)]
    samples, _ = plan_clips(clips, probe_files([video, still]), [Bucket(9, 48, 80)])
    batch = collate([make_dataset(samples, with_masks=True)[Draw(index, 0)] for index in (0, 1)])
    expected = torch.ones(2, 3, 6, 10)
    expected[0, :, :, 5:] = 0
    assert torch.equal(batch.masks, expected.half())


@pytest.fixture(scope="module")
def planned(demo_clips) -> list[ClipSample]:
    """The 16 clips, each in a bucket of its size, so that nothing is resized."""
    return plan(demo_clips, 9)


def make_dataset(planned: list[ClipSample], **options) -> ClipDataset:
    return ClipDataset(planned, **{"reshape_mode": "center", "random_flip": None, "seed": 0} | options)


@pytest.mark.parametrize(
    "choice",
    [{}, {"long_clips": "split"}, {"fps": 6.0, "long_clips": "split"}, {"long_clips": "first", "skip_start": 3}],
)
def test_a_clip_has_exactly_the_planned_frames(demo_clips, choice):
    samples = plan(demo_clips, 5, **choice)
    truth = {path: all_frames(path) for path in (demo_clips / "videos").iterdir()}
    dataset = make_dataset(samples)
    assert len(dataset) == len(samples) >= 16
    for index, sample in enumerate(samples):
        expected = truth[sample.clip.video][list(sample.frame_indices)].transpose(0, 3, 1, 2)
        batch = dataset[Draw(index, 0)]
        assert (batch.names, batch.bucket) == ([str(sample.clip.video)], sample.bucket)
        assert batch.videos.dtype == torch.uint8
        assert np.array_equal(batch.videos[0].numpy(), expected)


@pytest.mark.parametrize("condition", ["first,last", "first:2"])
def test_given_frames_are_cropped_and_flipped_like_the_clip(planned, condition):
    dataset = make_dataset(
        planned, random_flip=0.5, reshape_mode="random", with_images=True, condition_frames=condition
    )
    for index in range(len(planned)):
        batch = dataset[Draw(index, 0)]
        given = [0, batch.bucket.num_frames - 1] if condition == "first,last" else [0, 1, 2, 3, 4]
        assert torch.equal(batch.images, batch.videos[:, given])


def test_an_image_of_the_users_own_replaces_the_first_frame_and_not_the_last(planned, tmp_path):
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    red = replace(planned[0], clip=replace(planned[0].clip, image=tmp_path / "red.png"))
    batch = make_dataset([red], with_images=True, condition_frames="first,last")[Draw(0, 0)]
    first, last = batch.images[0]
    assert (first.float().mean(dim=(1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 5
    assert torch.equal(last, batch.videos[0, -1])


def test_a_flipped_clip_is_mirrored_in_every_frame(planned):
    plain, flipped = (make_dataset(planned, random_flip=flip)[Draw(0, 0)].videos for flip in (None, 1.0))
    assert np.array_equal(flipped.numpy(), plain.numpy()[..., ::-1])
    assert not torch.equal(flipped, plain)


def flips(planned: list[ClipSample], draws: list[Draw], seed: int = 0) -> list[bool]:
    """Return which draws are mirrored, and assert that the others are unchanged in every frame."""
    plain, maybe_flipped = make_dataset(planned), make_dataset(planned, random_flip=0.5, seed=seed)
    found = []
    for draw in draws:
        before, after = plain[draw].videos, maybe_flipped[draw].videos
        assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
        found.append(not torch.equal(after, before))
    return found


def test_flips_depend_on_the_epoch_the_seed_and_the_clip_but_not_on_its_place(planned):
    draws = [Draw(index, epoch) for index in range(4) for epoch in range(4)]
    first = flips(planned, draws)
    assert len(set(first[::4])) == 2  # the clips in one epoch
    assert any(len(set(first[start : start + 4])) == 2 for start in (0, 4, 8, 12))  # a clip in several epochs
    assert flips(planned, draws[::-1])[::-1] == first
    assert flips(planned, draws, seed=1) != first
    moved = [Draw(3 - draw.index, draw.epoch) for draw in draws]
    assert flips(planned[:4][::-1], moved) == first


def with_image(planned: ClipSample, image: Path | None) -> ClipSample:
    return replace(planned, clip=replace(planned.clip, image=image))


def image_of(planned: ClipSample, mode: str = "center", random_flip: float | None = None) -> tuple[Batch, np.ndarray]:
    batch = make_dataset([planned], reshape_mode=mode, random_flip=random_flip, with_images=True)[Draw(0, 0)]
    return batch, batch.images[0, 0].numpy()


@pytest.mark.parametrize("part", [0, 1])
def test_clips_without_an_image_and_later_parts_start_from_their_own_first_frame(planned, tmp_path, part):
    Image.new("RGB", (96, 64)).save(tmp_path / "black.png")
    sample = replace(with_image(planned[2], tmp_path / "black.png" if part else None), part=part)
    batch, image = image_of(sample)
    assert np.array_equal(image, batch.videos[0, 0].numpy())
    assert make_dataset([sample])[Draw(0, 0)].images is None


@pytest.mark.parametrize("mode", ["center", "random"])
def test_an_image_is_cut_and_flipped_like_its_clip(planned, tmp_path, mode):
    smaller = replace(planned[2], bucket=Bucket(9, 64, 96))
    frame = all_frames(smaller.clip.video)[smaller.frame_indices[0]]
    Image.fromarray(frame).save(tmp_path / "first.png")
    batch, image = image_of(with_image(smaller, tmp_path / "first.png"), mode, random_flip=1.0)
    assert image.shape == (3, 64, 96)
    assert np.array_equal(image, batch.videos[0, 0].numpy())


@pytest.fixture
def broken(planned, tmp_path) -> ClipSample:
    """A clip like the third, whose file was removed after planning."""
    return replace(planned[2], clip=replace(planned[2].clip, video=tmp_path / "gone.mp4"))


def test_a_batch_keeps_its_other_clips_if_one_does_not_decode(planned, broken):
    dataset = make_dataset([planned[2], broken, planned[7]])
    batch = collate([dataset[Draw(index, 0)] for index in range(3)])
    assert (batch.draws, len(batch.videos)) == ([Draw(0, 0), Draw(2, 0)], 2)
    ((draw, reason),) = batch.failed
    assert draw == Draw(1, 0)
    assert "gone.mp4" in reason


def test_training_stops_at_a_clip_that_does_not_decode_and_names_it(planned, broken):
    loader = make_loader(make_dataset([planned[2], broken]), [[Draw(0, 0)], [Draw(1, 0)]], num_workers=1)
    batches = without_failures(loader)
    assert next(batches).names == [str(planned[2].clip.video)]
    with pytest.raises(UserError, match=r"gone\.mp4"):
        next(batches)


def test_a_clip_that_does_not_decode_is_replaced_by_another_of_its_bucket(planned, broken, caplog):
    clips = [planned[0], broken, planned[1], planned[7]]
    assert planned[7].bucket == broken.bucket != planned[1].bucket
    dataset = make_dataset(clips, replace_failed=True)
    batch = dataset[Draw(1, 0)]
    assert batch.names == [str(planned[7].clip.video)]
    assert not batch.failed
    assert batch.draws == [Draw(1, 0)]  # with the noise of the clip that it replaces
    assert "gone.mp4" in caplog.text
    assert make_dataset([broken, broken], replace_failed=True)[Draw(0, 0)].failed


def load_epochs(planned: list[ClipSample], num_workers: int) -> list[Batch]:
    """Two epochs of batches of up to 2, cropped and flipped at random."""
    sampler = BucketBatchSampler([clip.bucket for clip in planned], 2, seed=3)
    sampler.total_batches = 2 * sampler.batches_per_epoch
    dataset = make_dataset(planned, reshape_mode="random", random_flip=0.5, seed=3)
    return list(make_loader(dataset, sampler, num_workers=num_workers))


def test_batches_do_not_depend_on_the_number_of_workers(demo_clips):
    paths = sorted((demo_clips / "videos").iterdir())[:5]
    buckets = [Bucket(5, 80, 96), Bucket(5, 96, 80)]
    clips, _ = plan_clips([Clip(path, "", "") for path in paths], probe_files(paths), buckets)
    in_process, in_workers = load_epochs(clips, 0), load_epochs(clips, 2)
    assert [batch.names for batch in in_process] == [batch.names for batch in in_workers]
    assert all(torch.equal(ours.videos, theirs.videos) for ours, theirs in zip(in_process, in_workers, strict=True))
    assert sorted(name for batch in in_process for name in batch.names) == sorted(2 * list(map(str, paths)))


@pytest.fixture
def in_store(planned, bucket) -> list[ClipSample]:
    """Four of the clips, in a store."""
    bucket.put_folder(planned[0].clip.video.parent, "videos")
    folder = to_path(f"{bucket.url}/videos")
    return [replace(one, clip=replace(one.clip, video=folder / one.clip.video.name)) for one in planned[:4]]


def test_clips_in_a_store_are_the_same_clips_and_each_is_fetched_once(planned, in_store, bucket):
    draws = [[Draw(index, epoch)] for epoch in range(2) for index in range(4)]
    expected = [make_dataset(planned)[draw].videos for (draw,) in draws]
    loader = make_loader(make_dataset(in_store), draws, num_workers=2)
    for batch, videos in zip(without_failures(loader), expected, strict=True):
        assert torch.equal(batch.videos, videos)
        assert batch.names[0].startswith("s3://")
    assert sorted(bucket.fetched()) == [f"videos/{one.clip.video.name}" for one in in_store]


@pytest.mark.parametrize(
    ("fault", "told"), [("503", "cannot be fetched after 4 tries ("), ("missing", "cannot be decoded: does not exist")]
)
def test_training_stops_at_a_clip_that_its_store_does_not_hand_out_and_names_it(in_store, bucket, fault, told):
    name = in_store[1].clip.video.name
    if fault == "missing":
        bucket.delete(f"videos/{name}")
    else:
        bucket.store.faults[name] = [fault] * 99
    dataset = make_dataset(in_store, replace_failed=fault == "503")  # an outage is no reason to replace a clip
    loader = make_loader(dataset, [[Draw(index, 0)] for index in range(4)], num_workers=1)
    with pytest.raises(UserError, match=r"^a clip cannot be read;") as raised:
        list(without_failures(loader))
    assert f"{bucket.url}/videos/{name}" in str(raised.value) and told in str(raised.value)


def test_loading_does_not_change_the_global_random_numbers(planned):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(make_loader(make_dataset(planned), [[Draw(2, 0)]], num_workers=0))
    assert torch.equal(torch.rand(3), expected)


def test_captions_come_as_their_embeddings(planned, tiny_models, tmp_path):
    source = ModelSource(str(tiny_models("5b")))
    prompts = PromptCache(tmp_path, source, torch.float32)
    prompts.embed([planned[2].clip.caption], torch.device("cpu"))
    dataset = make_dataset(planned, prompts=prompts)
    expected = encode_prompts(source.load_text_pipeline(torch.float32), [planned[2].clip.caption])
    assert torch.equal(dataset[Draw(2, 0)].prompt_embeds, expected)


def tensors(moments: tuple[int, ...] = (32, 3, 8, 12), embeds: tuple[int, ...] = (226, 64)) -> dict[str, torch.Tensor]:
    return {"video_latents": torch.randn(moments), "prompt_embeds": torch.randn(embeds)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_clip_is_read_as_it_was_written(tmp_path, dtype):
    written = {name: {kind: tensor.to(dtype) for kind, tensor in tensors().items()} for name in "ab"}
    dataset = PreparedDataset(write_prepared(tmp_path, written, Bucket(9, 64, 96)))
    assert len(dataset) == 2
    batch = dataset[Draw(1, 0)]
    assert (batch.names, batch.bucket, batch.videos) == (["b"], Bucket(9, 64, 96), None)
    assert torch.equal(batch.video_moments, written["b"]["video_latents"][None])
    assert torch.equal(batch.prompt_embeds, written["b"]["prompt_embeds"][None])


def test_a_damaged_tensor_is_named_without_advice_to_unpickle_it(tmp_path):
    index = read_index(write_original_folder(tmp_path, 1))
    index[0].video_latents.file.write_bytes(b"damaged")
    loader = make_loader(PreparedDataset(index), [[Draw(0, 0)]], num_workers=1)
    with pytest.raises(UserError, match=r"video_latents/9f3c0\.pt cannot be read as a tensor") as caught:
        next(without_failures(loader))
    assert "weights_only=False" not in str(caught.value)


@pytest.mark.parametrize(("moments", "embeds"), [((16, 3, 8, 12), (226, 64)), ((32, 3, 8, 12), (226, 4096))])
def test_tensors_of_another_model_are_refused_with_file_and_channels(tiny_models, tmp_path, moments, embeds):
    index = write_prepared(tmp_path, {"a": tensors(moments, embeds)}, Bucket(9, 64, 96))
    with pytest.raises(UserError, match=r"^--load_tensors: ") as caught:
        check_prepared(index, ModelSource(str(tiny_models("5b"))).configs())
    message = str(caught.value)
    assert str(index[0].video_latents.file) in message
    assert f"have {moments[0]} and {embeds[1]} channels" in message
    assert "needs 32 and 64" in message


def test_samples_without_image_latents_are_refused_only_for_an_image_to_video_model(tiny_models, tmp_path):
    index = write_prepared(tmp_path, {"a": tensors()}, Bucket(9, 64, 96))
    check_prepared(index, ModelSource(str(tiny_models("5b"))).configs())
    with pytest.raises(
        UserError, match=r"1 samples .*PREPARED=my-prepared bash prepare_dataset\.sh --save_image_latents"
    ):
        check_prepared(index, ModelSource(str(tiny_models("5b-i2v"))).configs())


def make_batch(name: str) -> Batch:
    return Batch([name], BUCKET, video_moments=torch.randn(1, 32, 3, 8, 12), prompt_embeds=torch.ones(1, 4))


def test_samples_are_joined_in_order():
    samples = [make_batch(name) for name in "cab"]
    batch = collate(samples)
    assert batch.names == ["c", "a", "b"]
    assert batch.bucket == Bucket(9, 64, 96)
    assert batch.videos is None
    assert torch.equal(batch.video_moments, torch.stack([sample.video_moments[0] for sample in samples]))
    assert batch.prompt_embeds.shape == (3, 4)


def test_a_moved_batch_keeps_its_fields():
    batch = make_batch("a")
    moved = DeviceCopies(torch.device("cpu"))(batch)
    assert (moved.names, moved.bucket, moved.tensors) == (batch.names, batch.bucket, batch.tensors)
    on_meta = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in on_meta.tensors.values()} == {"meta"}
    assert batch.video_moments.device.type == "cpu"
    without_tensors = Batch(["a"], BUCKET)
    assert without_tensors.pin_memory() == without_tensors


@pytest.mark.gpu
def test_a_pinned_batch_keeps_its_fields():
    batch = make_batch("a")
    pinned = batch.pin_memory()
    assert pinned.videos is None
    assert pinned.video_moments.is_pinned()
    assert torch.equal(pinned.prompt_embeds, batch.prompt_embeds)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_no_batch_is_overwritten_while_it_is_used(pinned):
    device = torch.device("cuda")
    copy, load = DeviceCopies(device), torch.randn(4096, 4096, device=device)
    sums = []
    for number in range(30):
        moments = torch.full((1, 32, 13, 60, 90), float(number))
        batch = Batch(["a"], Bucket(49, 480, 720), video_moments=moments, prompt_embeds=moments[0, 0])
        moved = copy(batch.pin_memory() if pinned else batch)
        for _ in range(20):  # the GPU falls behind the CPU
            load = load @ load * 1e-3
        sums.append(moved.video_moments.mean() + moved.prompt_embeds.mean())
        del moved
    assert torch.stack(sums).tolist() == pytest.approx([2.0 * number for number in range(30)])
