"""The frames of every sample are those that the rules name: compared with a plain search in fractions."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video.frames import LONG_CLIPS, choose_samples, round_half_up
from video.probe import VideoInfo


def clip(num_frames, fps=25.0, frame_times=None):
    return VideoInfo(num_frames, 480, 720, fps, frame_times=frame_times)


STILL = VideoInfo(1, 480, 720, 0.0, is_image=True)


# The reference


def resampled(times, first, last, fps):
    """Frame numbers at times[first], times[first] + 1 / fps ... while the nearest frame is a usable one.

    Args:
        times: seconds, of every frame and of the end of the last.
    """
    chosen = []
    while True:
        moment = times[first] + Fraction(len(chosen)) / fps
        nearest = min(range(first, last + 2), key=lambda frame: (abs(times[frame] - moment), -frame))
        if nearest > last:
            return chosen
        chosen.append(nearest)


def samples_of(usable, counts, long_clips):
    """What the rules make of the usable frames; no sample where they are too few."""
    counts = [count for count in counts if count > 1] or [1]
    fitting = [count for count in counts if count <= len(usable)]
    if not fitting:
        return []
    count = max(fitting)
    if long_clips == "first":
        return [tuple(usable[:count])]
    if long_clips == "split":
        return [tuple(usable[:count]), *samples_of(usable[count:], counts, "split")]
    if count == 1:
        return [(usable[0],)]
    places = [Fraction(i * (len(usable) - 1), count - 1) for i in range(count)]
    return [tuple(usable[math.floor(place + Fraction(1, 2))] for place in places)]


def chosen_or_none(*arguments, **options):
    try:
        return choose_samples(*arguments, **options)
    except ValueError:
        return []


rates = st.sampled_from([Fraction(rate) for rate in (5, 8, 10, 12, 15, 16, 24, 25, 30, 50, 60)]) | st.sampled_from(
    [Fraction(15, 2), Fraction(24000, 1001), Fraction(30000, 1001), Fraction(2997, 100)]
)
frame_counts = st.lists(st.integers(1, 20), min_size=1, max_size=3)
skips = st.integers(0, 12)
increasing_times = st.lists(st.integers(1, 200_000), min_size=1, max_size=40).map(
    lambda gaps: tuple(sum(gaps[:i]) for i in range(len(gaps) + 1))
)


@given(st.integers(1, 80), frame_counts, skips, skips, st.sampled_from(LONG_CLIPS))
def test_without_a_rate_the_usable_frames_are_not_resampled(num_frames, counts, start, end, long_clips):
    samples = chosen_or_none(clip(num_frames), counts, skip_start=start, skip_end=end, long_clips=long_clips)
    assert samples == samples_of(list(range(start, num_frames - end)), counts, long_clips)


@given(st.integers(1, 40), frame_counts, skips, skips, rates, rates, st.sampled_from(["first", "split"]))
def test_at_a_rate_frames_are_the_nearest_in_time(num_frames, counts, start, end, clip_fps, fps, long_clips):
    info = clip(num_frames, fps=float(clip_fps))
    samples = chosen_or_none(info, counts, skip_start=start, skip_end=end, fps=float(fps), long_clips=long_clips)
    times = [frame / clip_fps for frame in range(num_frames + 1)]
    usable = resampled(times, start, num_frames - end - 1, fps) if start + end < num_frames else []
    assert samples == samples_of(usable, counts, long_clips)


@given(increasing_times, frame_counts, skips, skips, rates, st.sampled_from(["first", "split"]))
def test_at_a_variable_rate_frames_are_the_nearest_in_time(frame_times, counts, start, end, fps, long_clips):
    last = len(frame_times) - 1
    average = Fraction(frame_times[-1], last)
    info = clip(last + 1, fps=float(1_000_000 / average), frame_times=frame_times)
    samples = chosen_or_none(info, counts, skip_start=start, skip_end=end, fps=float(fps), long_clips=long_clips)
    times = [Fraction(time) / 1_000_000 for time in (*frame_times, frame_times[-1] + average)]
    usable = resampled(times, start, last - end, fps) if start + end <= last else []
    assert samples == samples_of(usable, counts, long_clips)


@given(
    increasing_times | st.none(),
    st.integers(1, 41),
    frame_counts,
    skips,
    skips,
    st.floats(0.01, 1000) | st.none(),
    st.floats(0, 200),
    st.sampled_from(LONG_CLIPS),
    st.booleans(),
)
def test_no_index_is_ever_outside_the_usable_frames(
    frame_times, num_frames, counts, start, end, fps, clip_fps, long_clips, hold
):
    num_frames = num_frames if frame_times is None else len(frame_times)
    info = clip(num_frames, fps=clip_fps, frame_times=frame_times)
    options = {"skip_start": start, "skip_end": end, "fps": fps, "long_clips": long_clips, "hold_last_frame": hold}
    for sample in chosen_or_none(info, counts, **options):
        assert len(sample) in counts
        assert set(sample) <= set(range(start, num_frames - end))
        assert list(sample) == sorted(sample)


@given(st.integers(1, 40), st.lists(st.integers(2, 60), min_size=1, max_size=3), rates | st.none())
def test_a_held_clip_ends_with_its_last_frame_repeated(num_frames, counts, fps):
    times = [Fraction(frame, 25) for frame in range(num_frames + 1)]
    usable = list(range(num_frames)) if fps is None else resampled(times, 0, num_frames - 1, fps)
    usable += usable[-1:] * (min(counts) - len(usable))
    rate = None if fps is None else float(fps)
    samples = choose_samples(clip(num_frames), counts, fps=rate, long_clips="first", hold_last_frame=True)
    assert samples == samples_of(usable, counts, "first")


# The rules by example


def test_frames_are_spread_from_the_first_to_the_last():
    assert choose_samples(clip(101), [3, 5]) == [(0, 25, 50, 75, 100)]
    assert choose_samples(clip(101), [5], skip_start=10, skip_end=10) == [(10, 30, 50, 70, 90)]


def test_halves_round_up():
    assert choose_samples(clip(6), [3]) == [(0, 3, 5)]
    assert choose_samples(clip(100), [5], fps=10, long_clips="first") == [(0, 3, 5, 8, 10)]
    assert [round_half_up(Fraction(n, 2)) for n in (-3, -1, 1, 3)] == [-1, 0, 1, 2]


def test_the_first_part_is_consecutive():
    assert choose_samples(clip(50), [4], skip_start=3, long_clips="first") == [(3, 4, 5, 6)]


def test_a_long_clip_is_split_into_the_longest_parts_that_fit():
    lengths = [len(sample) for sample in choose_samples(clip(120), [17, 49], long_clips="split")]
    assert lengths == [49, 49, 17]
    samples = choose_samples(clip(12), [4, 2], skip_end=1, long_clips="split")
    assert samples == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]


def test_parts_at_a_rate_are_consecutive():
    first, second = choose_samples(clip(61, fps=24.0), [10], fps=8, long_clips="split")
    assert first + second == tuple(range(0, 60, 3))


def test_frames_repeat_where_the_rate_is_above_the_clips():
    assert choose_samples(clip(4, fps=8.0), [7], fps=16, long_clips="first") == [(0, 1, 1, 2, 2, 3, 3)]


def test_a_pause_in_a_variable_rate_repeats_its_frame():
    times = (0, 100_000, 200_000, 700_000, 800_000)
    info = clip(5, fps=5.0, frame_times=times)
    assert choose_samples(info, [9], fps=10, long_clips="first") == [(0, 1, 2, 2, 2, 3, 3, 3, 4)]


def test_a_second_of_ntsc_film_at_its_nominal_rate_loses_no_frame():
    samples = choose_samples(clip(30, fps=30000 / 1001), [30], fps=29.97, long_clips="first")
    assert samples == [tuple(range(30))]


def test_videos_use_one_frame_only_if_there_is_no_other_count():
    assert choose_samples(clip(50), [1, 49], long_clips="first") == [tuple(range(49))]
    with pytest.raises(ValueError, match=r"^40 usable frames; the smallest frame bucket for videos has 49"):
        choose_samples(clip(40), [1, 49])
    assert choose_samples(clip(40), [1], skip_start=2) == [(2,)]


@pytest.mark.parametrize("fps", [None, 8])
@pytest.mark.parametrize("hold", [True, False])
def test_a_still_image_needs_the_bucket_of_one_frame_and_is_never_held(fps, hold):
    options = {"fps": fps, "long_clips": "first", "hold_last_frame": hold, "skip_start": 3, "skip_end": 3}
    assert choose_samples(STILL, [49, 1], **options) == [(0,)]
    with pytest.raises(ValueError, match=r"^is a still image; add 1 to --frame_buckets$"):
        choose_samples(STILL, [49], **options)


def test_a_short_clip_is_held_to_the_smallest_count_above_one():
    assert choose_samples(clip(3), [1, 5, 9], hold_last_frame=True) == [(0, 1, 2, 2, 2)]
    assert choose_samples(clip(9), [4], skip_start=6, skip_end=1, hold_last_frame=True) == [(6, 7, 7, 7)]


def test_without_usable_frames_nothing_is_held():
    with pytest.raises(ValueError, match=r"^0 usable frames \(of 9\); .*: lower --skip_frames_start"):
        choose_samples(clip(9), [4], skip_start=9, hold_last_frame=True)


# The reasons


@pytest.mark.parametrize(
    ("num_frames", "options", "reason"),
    [
        (
            40,
            {},
            "40 usable frames; the smallest frame bucket for videos has 49: add a smaller one to --frame_buckets, or "
            "pass --hold_last_frame",
        ),
        (1, {}, "1 usable frame; the smallest frame bucket for videos has 49: pass --hold_last_frame"),
        (
            94,
            {"fps": 8.0, "long_clips": "first"},
            "30 usable frames at 8 fps (of 94 at 25 fps); the smallest frame bucket for videos has 49: raise --fps, "
            "or add a smaller one to --frame_buckets, or pass --hold_last_frame",
        ),
        (
            60,
            {"skip_start": 10, "skip_end": 10},
            "40 usable frames (of 60); the smallest frame bucket for videos has 49: lower --skip_frames_start or "
            "--skip_frames_end, or add a smaller one to --frame_buckets, or pass --hold_last_frame",
        ),
        (
            30,
            {"fps": 8.0, "long_clips": "first", "skip_end": 5},
            "8 usable frames at 8 fps (of 30 at 25 fps); the smallest frame bucket for videos has 49: add a smaller "
            "one to --frame_buckets, or pass --hold_last_frame",
        ),
    ],
)
def test_the_reason_has_the_numbers_and_what_helps(num_frames, options, reason):
    with pytest.raises(ValueError) as raised:
        choose_samples(clip(num_frames), [49], **options)
    assert str(raised.value) == reason


def test_a_rate_needs_the_rate_of_the_clip():
    with pytest.raises(ValueError, match="frame rate is unknown, so it cannot be sampled at --fps"):
        choose_samples(clip(100, fps=0.0), [10], fps=8, long_clips="first")


def test_damaged_time_stamps_do_not_make_endless_samples():
    info = clip(3, fps=2e-6, frame_times=(0, 40_000, 10**12))
    with pytest.raises(ValueError, match="plays at 2e-06 fps, too slow to be sampled at --fps 8"):
        choose_samples(info, [10], fps=8, long_clips="split")
