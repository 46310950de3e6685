"""The frames of every sample are those that the rules name: compared with a plain search in fractions."""

import itertools
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


def resampled(times, first, last, fps):
    """Frames at times[first], times[first] + 1 / fps ... while the nearest is usable; `times` ends with the end."""
    moments = (times[first] + number / fps for number in itertools.count())
    nearest = (min(range(first, last + 2), key=lambda frame: (abs(times[frame] - at), -frame)) for at in moments)
    return list(itertools.takewhile(lambda frame: frame <= last, nearest))


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


infos = st.builds(clip, st.integers(1, 41), st.floats(0, 200)) | st.builds(
    lambda times, fps: clip(len(times), fps, times), increasing_times, st.floats(0, 200)
)
wanted_rates = st.floats(0.01, 1000) | st.none()


@given(infos, frame_counts, skips, skips, wanted_rates, st.sampled_from(LONG_CLIPS), st.booleans())
def test_no_index_is_ever_outside_the_usable_frames(info, counts, start, end, fps, long_clips, hold):
    options = {"skip_start": start, "skip_end": end, "fps": fps, "long_clips": long_clips, "hold_last_frame": hold}
    for sample in chosen_or_none(info, counts, **options):
        assert len(sample) in counts
        assert set(sample) <= set(range(start, info.num_frames - end))
        assert list(sample) == sorted(sample)


@given(st.integers(1, 40), st.lists(st.integers(2, 60), min_size=1, max_size=3), rates | st.none())
def test_a_held_clip_ends_with_its_last_frame_repeated(num_frames, counts, fps):
    times = [Fraction(frame, 25) for frame in range(num_frames + 1)]
    usable = list(range(num_frames)) if fps is None else resampled(times, 0, num_frames - 1, fps)
    usable += usable[-1:] * (min(counts) - len(usable))
    rate = None if fps is None else float(fps)
    samples = choose_samples(clip(num_frames), counts, fps=rate, long_clips="first", hold_last_frame=True)
    assert samples == samples_of(usable, counts, "first")


VARIABLE = clip(5, fps=5.0, frame_times=(0, 100_000, 200_000, 700_000, 800_000))
FIRST, SPLIT, HOLD = {"long_clips": "first"}, {"long_clips": "split"}, {"hold_last_frame": True}
EXAMPLES = {
    "spread from the first to the last": (clip(101), [3, 5], {}, [(0, 25, 50, 75, 100)]),
    "spread over the usable ones": (clip(101), [5], {"skip_start": 10, "skip_end": 10}, [(10, 30, 50, 70, 90)]),
    "halves round up": (clip(6), [3], {}, [(0, 3, 5)]),
    "halves at a rate round up": (clip(100), [5], FIRST | {"fps": 10}, [(0, 3, 5, 8, 10)]),
    "the first part is consecutive": (clip(50), [4], FIRST | {"skip_start": 3}, [(3, 4, 5, 6)]),
    "split into long parts": (clip(12), [4, 2], SPLIT | {"skip_end": 1}, [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]),
    "parts at a rate are consecutive": (clip(19, fps=24.0), [3], SPLIT | {"fps": 8}, [(0, 3, 6), (9, 12, 15)]),
    "a rate above the clip's repeats frames": (clip(4, fps=8.0), [7], FIRST | {"fps": 16}, [(0, 1, 1, 2, 2, 3, 3)]),
    "a pause repeats its frame": (VARIABLE, [9], FIRST | {"fps": 10}, [(0, 1, 2, 2, 2, 3, 3, 3, 4)]),
    "NTSC loses no frame": (clip(30, fps=30000 / 1001), [30], FIRST | {"fps": 29.97}, [tuple(range(30))]),
    "one frame only if there is no other count": (clip(50), [1, 49], FIRST, [tuple(range(49))]),
    "one frame": (clip(40), [1], {"skip_start": 2}, [(2,)]),
    "held to the smallest count above one": (clip(3), [1, 5, 9], HOLD, [(0, 1, 2, 2, 2)]),
    "held after skipping": (clip(9), [4], HOLD | {"skip_start": 6, "skip_end": 1}, [(6, 7, 7, 7)]),
}


@pytest.mark.parametrize(("info", "counts", "options", "samples"), EXAMPLES.values(), ids=EXAMPLES)
def test_the_rules_hold_in_examples(info, counts, options, samples):
    assert choose_samples(info, counts, **options) == samples


def test_negative_halves_round_up_too():
    assert [round_half_up(Fraction(n, 2)) for n in (-3, -1, 1, 3)] == [-1, 0, 1, 2]


@pytest.mark.parametrize("fps", [None, 8])
@pytest.mark.parametrize("hold", [True, False])
def test_a_still_image_needs_the_bucket_of_one_frame_and_is_never_held(fps, hold):
    options = {"fps": fps, "long_clips": "first", "hold_last_frame": hold, "skip_start": 3, "skip_end": 3}
    assert choose_samples(STILL, [49, 1], **options) == [(0,)]
    with pytest.raises(ValueError, match=r"^is a still image; add 1 to --frame_buckets$"):
        choose_samples(STILL, [49], **options)


AT_8, SHRINK = FIRST | {"fps": 8.0}, "add a smaller one to --frame_buckets, or pass --hold_last_frame"
SKIP_LESS = "lower --skip_frames_start or --skip_frames_end"
TOO_SHORT = "; the smallest frame bucket for videos has 49: "


@pytest.mark.parametrize(
    ("num_frames", "options", "frames", "advice"),
    [
        (40, {}, "40 usable frames", SHRINK),
        (1, {}, "1 usable frame", "pass --hold_last_frame"),
        (9, {"skip_start": 9} | HOLD, "0 usable frames (of 9)", SKIP_LESS),
        (94, AT_8, "30 usable frames at 8 fps (of 94 at 25 fps)", f"raise --fps, or {SHRINK}"),
        (60, {"skip_start": 10, "skip_end": 10}, "40 usable frames (of 60)", f"{SKIP_LESS}, or {SHRINK}"),
        (30, AT_8 | {"skip_end": 5}, "8 usable frames at 8 fps (of 30 at 25 fps)", SHRINK),
    ],
)
def test_the_reason_has_the_numbers_and_what_helps(num_frames, options, frames, advice):
    with pytest.raises(ValueError) as raised:
        choose_samples(clip(num_frames), [1, 49], **options)
    assert str(raised.value) == f"{frames}{TOO_SHORT}{advice}"


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (clip(100, fps=0.0), "frame rate is unknown, so it cannot be sampled at --fps"),
        (clip(3, 2e-6, (0, 40_000, 10**12)), "plays at 2e-06 fps, too slow to be sampled at --fps 8"),  # damaged
    ],
)
def test_a_rate_needs_the_rate_of_the_clip(info, reason):
    with pytest.raises(ValueError, match=reason):
        choose_samples(info, [10], fps=8, long_clips="split")
