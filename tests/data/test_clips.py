"""Clips get frames and a bucket, or the reason why not, as `data.clips` documents."""

import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.buckets import Bucket, make_buckets
from data.clips import BadClip, Clip, plan_clips
from video.probe import VideoInfo


BUCKETS = make_buckets([9, 17], [32, 64], [32, 64])
STILL = VideoInfo(1, 64, 64, 0.0, is_image=True)
PART = Clip(Path("a.mp4"), "A cat.", "list.csv:2", start_frame=60, end_frame=80)


def plan(infos, buckets=BUCKETS, **options):
    clips = [Clip(Path(f"{number}.mp4"), "A cat.", f"videos.txt:{number + 1}") for number in range(len(infos))]
    return plan_clips(clips, {clip.video: info for clip, info in zip(clips, infos, strict=True)}, buckets, **options)


def planned(infos, buckets=BUCKETS, **options):
    samples, bad = plan(infos, buckets, **options)
    assert bad == []
    return samples


def test_every_clip_gets_its_bucket_and_frames():
    samples = planned([VideoInfo(33, 90, 90, 25.0), VideoInfo(16, 40, 80, 25.0)])
    assert [sample.bucket for sample in samples] == [Bucket(17, 64, 64), Bucket(9, 32, 64)]
    assert samples[0].frame_indices == tuple(range(0, 33, 2))
    assert samples[1].frame_indices == (0, 2, 4, 6, 8, 9, 11, 13, 15)
    assert samples[0].clip.source == "videos.txt:1"
    assert samples[1].info == VideoInfo(16, 40, 80, 25.0)


def test_skipped_ends_and_the_rate_are_applied_before_the_bucket():
    options = {"skip_start": 5, "fps": 10, "long_clips": "first"}
    (sample,) = planned([VideoInfo(60, 64, 64, 30.0)], skip_end=5, **options)
    assert sample.bucket.num_frames == 17
    assert sample.frame_indices == tuple(range(5, 55, 3))
    (sample,) = planned([VideoInfo(60, 64, 64, 30.0)], skip_end=10, **options)
    assert sample.bucket.num_frames == 9


def test_a_long_clip_can_be_split_into_samples_of_different_buckets():
    samples = planned([VideoInfo(45, 64, 64, 8.0), VideoInfo(9, 64, 64, 8.0)], long_clips="split")
    found = [(sample.clip.video.name, sample.part, sample.bucket.num_frames) for sample in samples]
    assert found == [("0.mp4", 0, 17), ("0.mp4", 1, 17), ("0.mp4", 2, 9), ("1.mp4", 0, 9)]
    assert samples[2].frame_indices == tuple(range(34, 43))
    assert samples[0].clip is samples[1].clip


def test_a_still_image_goes_into_a_bucket_of_one_frame():
    (sample,) = planned([STILL], make_buckets([1, 9], [64], [64]))
    assert (sample.bucket, sample.frame_indices) == (Bucket(1, 64, 64), (0,))


def test_a_clip_without_a_sample_is_a_bad_clip_with_the_reason():
    infos = ["does not exist", VideoInfo(20, 64, 64, 25.0), STILL, VideoInfo(30, 64, 64, 25.0)]
    samples, bad = plan(infos, skip_start=12)
    assert [sample.clip.source for sample in samples] == ["videos.txt:4"]
    missing, short, still = map(str, bad)
    assert missing == "0.mp4 (videos.txt:1): does not exist"
    assert short.startswith("1.mp4 (videos.txt:2): 8 usable frames (of 20)")
    assert still.startswith("2.mp4 (videos.txt:3): is a still image")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"num_frames": 29}, r"has 29 frames, its clip 30"),
        ({"num_frames": 31}, r"has 31 frames, its clip 30"),
        ({"height": 32}, r"has 32x64 pixels, its clip 64x64"),
        ({"fps": 24.0}, None),  # a clip of a variable rate, whose control has a constant one
        (None, "does not exist"),
    ],
)
def test_a_control_has_the_frames_and_the_size_of_its_clip(change, reason):
    info = VideoInfo(30, 64, 64, 25.0, sha256="a")
    control = "does not exist" if change is None else replace(info, **change, sha256="b")
    clip = Clip(Path("a.mp4"), "A cat.", "list.csv:2", control=Path("c.mp4"), start_frame=3)
    samples, bad = plan_clips([clip], {clip.video: info, clip.control: control}, BUCKETS)
    if reason is None:
        assert samples[0].control is control and not bad
    else:
        assert re.match(rf"a\.mp4 \(list\.csv:2\): its control c\.mp4: {reason}", str(bad[0]))


def test_a_mask_fits_its_clip_or_is_a_still_of_its_size():
    info, still = VideoInfo(30, 64, 64, 25.0, sha256="a"), VideoInfo(1, 64, 64, 0.0, is_image=True)
    clip = Clip(Path("a.mp4"), "A cat.", "list.csv:2", mask=Path("m.mp4"))

    def plan(mask: VideoInfo | None, **options) -> tuple:
        named = clip if mask else replace(clip, mask=None)
        return plan_clips([named], {clip.video: info, clip.mask: mask}, BUCKETS, **options)

    assert [plan(mask)[0][0].mask for mask in (info, still, None)] == [info, still, None]
    for mask, reason in (
        (replace(info, num_frames=29), "its mask m.mp4: has 29 frames, its clip 30"),
        (replace(still, width=32), "its mask m.mp4: has 64x32 pixels, its clip 64x64"),
    ):
        assert reason in plan(mask)[1][0].reason
    assert plan(None, needs_masks=True)[1][0].reason == "has no mask"


def test_a_clip_may_be_a_part_of_a_file():
    info = VideoInfo(100, 64, 64, 25.0, sha256="a")
    (sample, whole), bad = plan_clips(
        [PART, replace(PART, start_frame=0, end_frame=None)], {PART.video: info}, BUCKETS
    )
    assert bad == []
    assert (sample.frame_indices[0], sample.frame_indices[-1], sample.bucket.num_frames) == (60, 79, 17)
    assert sample.info.num_frames == 20
    assert sample.shown_fps == pytest.approx(25 * 16 / 19)
    assert (whole.info, whole.frame_indices[-1]) == (info, 99)
    assert sample.info.content != info.content  # the part is another clip for whoever compares them


def test_the_part_of_a_file_with_a_variable_rate_is_timed_by_its_own_frames():
    times = (*range(0, 60 * 40_000, 40_000), *range(60 * 40_000, 60 * 40_000 + 40 * 100_000, 100_000))
    info = VideoInfo(100, 64, 64, 15.625, frame_times=times)
    part = replace(PART, end_frame=None)
    (sample,), _ = plan_clips([part], {PART.video: info}, BUCKETS, fps=5.0, long_clips="first")
    assert sample.frame_indices == tuple(range(60, 94, 2))
    assert (sample.info.fps, sample.shown_fps) == (pytest.approx(10), pytest.approx(5))


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (VideoInfo(70, 64, 64, 25.0), "has 70 frames, not those from start_frame 60 to end_frame 80"),
        (STILL, "is a still image, which has no start_frame and end_frame"),
    ],
)
def test_a_part_that_a_file_does_not_have_is_a_bad_clip(info, reason):
    samples, (bad,) = plan_clips([PART], {PART.video: info}, BUCKETS)
    assert samples == []
    assert bad.reason == reason


sides = st.integers(16, 90)
videos = st.builds(VideoInfo, st.integers(1, 60), sides, sides, st.sampled_from([0.0, 8.0, 24.0]))
found = st.sampled_from(["does not exist", STILL]) | videos


@given(
    st.lists(found, max_size=8),
    st.sets(st.sampled_from([1, 9, 17, 33]), min_size=1),
    st.sampled_from([(None, "spread"), (None, "first"), (None, "split"), (8.0, "first"), (30.0, "split")]),
    st.integers(0, 20),
    st.booleans(),
)
def test_every_clip_is_either_planned_or_bad_never_both(infos, counts, choice, skip, hold):
    fps, long_clips = choice
    options = {"fps": fps, "long_clips": long_clips, "skip_start": skip, "hold_last_frame": hold}
    samples, bad = plan(infos, make_buckets(counts, [32], [32, 64]), **options)
    good = list(dict.fromkeys(sample.clip.source for sample in samples))
    assert sorted([*good, *(clip.source for clip in bad)]) == [f"videos.txt:{n + 1}" for n in range(len(infos))]
    assert good == sorted(good)
    assert all(clip.reason for clip in bad)
    parts = Counter()
    for sample in samples:
        assert sample.part == parts[sample.clip.source]
        parts[sample.clip.source] += 1
        assert len(sample.frame_indices) == sample.bucket.num_frames
        assert set(sample.frame_indices) <= set(range(sample.info.num_frames))
        assert 0 <= sample.num_held < sample.bucket.num_frames
        assert hold or sample.num_held == 0


def images(image, **options):
    """A clip with an image, planned for image-to-video, and its bad clips."""
    clip = Clip(Path("a.mp4"), "A cat.", "data.csv:2", image=Path("a.png"))
    infos = {Path("a.mp4"): VideoInfo(9, 64, 64, 8.0), Path("a.png"): image}
    samples, bad = plan_clips([clip], infos, BUCKETS, **options)
    return [sample.first_frame for sample in samples], bad


def test_the_image_of_a_clip_is_planned_with_it_where_it_is_needed():
    assert images(STILL, with_images=True) == ([STILL], [])
    assert images("does not exist") == ([None], [])
    assert planned([VideoInfo(9, 64, 64, 8.0)], with_images=True)[0].first_frame is None


def test_an_image_that_cannot_be_used_makes_its_clip_a_bad_one():
    reason = "its image a.png: does not exist"
    assert images("does not exist", with_images=True) == ([], [BadClip("a.mp4", "data.csv:2", reason)])


@pytest.mark.parametrize(
    ("num_frames", "options", "indices", "num_held"),
    [
        *((6, {"long_clips": choice}, (0, 1, 2, 3, 4, 5, 5, 5, 5), 3) for choice in ("spread", "first", "split")),
        (6, {"long_clips": "first", "fps": 16}, (0, 1, 1, 2, 2, 3, 3, 4, 4), 0),  # repeated because of the rate
        # At 16 frames per second the three frames give 0, 1, 1, 2 and, as the nearest to 4 / 16 s, 2.
        (3, {"long_clips": "first", "fps": 16}, (0, 1, 1, 2, 2, 2, 2, 2, 2), 4),
        (5, {"skip_start": 4}, (4,) * 9, 8),
        (9, {}, tuple(range(9)), 0),
    ],
)
def test_frames_that_repeat_the_last_one_are_counted(num_frames, options, indices, num_held):
    (sample,) = planned([VideoInfo(num_frames, 64, 64, 8.0)], hold_last_frame=True, **options)
    assert (sample.frame_indices, sample.num_held) == (indices, num_held)


def test_similar_clips_share_their_frame_numbers_and_their_bucket():
    similar = [VideoInfo(33, 90, 90, 25.0, sha256="a"), VideoInfo(33, 91, 90, 25.0, sha256="b")]
    one, other, shorter = planned([*similar, VideoInfo(20, 90, 90, 25.0)])
    assert one.frame_indices is other.frame_indices
    assert one.bucket is shorter.bucket
    assert pickle.loads(pickle.dumps(one)) == one  # it can be sent to another process


def test_a_folder_of_frames_that_is_listed_as_a_clip_a_control_or_a_mask_is_explained(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.png").touch()
    clip = Clip(tmp_path, "A cat.", "videos.txt:1")
    others = [Clip(Path("a.mp4"), "A cat.", "a:1", **{kind: tmp_path}) for kind in ("control", "mask")]
    infos = {tmp_path: "is not a file", Path("a.mp4"): VideoInfo(30, 64, 64, 25.0)}
    _, unusable = plan_clips([clip, *others], infos, BUCKETS)
    starts = ["", f"its control {tmp_path}: ", f"its mask {tmp_path}: "]
    for one, start in zip(unusable, starts, strict=True):
        assert one.reason.startswith(f"{start}6 numbered pictures are not a clip; make one")
