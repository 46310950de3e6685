"""The recommended flags keep the clips, in their shape and at the model's rate, and cannot be improved again."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from args import parse_args, parse_prepare_args
from data.buckets import cropped_share, is_upscaled, make_buckets
from data.clips import BadClip, Clip, plan_clips
from flags.data import ClipFlags
from planning.advice import recommend
from planning.describe import advise
from planning.samples import RawData
from video.probe import VideoInfo


COGVIDEOX = {"sample_frames": 49, "sample_height": 60, "sample_width": 90, "patch_size": 2}
COGVIDEOX_1_5 = {"sample_frames": 81, "sample_height": 96, "sample_width": 170, "patch_size": 2, "patch_size_t": 2}
NATIVE = "--height_buckets 480 --width_buckets 720 --frame_buckets 49"
NATIVE_1_5 = "--height_buckets 768 --width_buckets 1360 --frame_buckets 81 --max_num_frames 81"
WIDE, UPRIGHT, SQUARE = (1080, 1920), (1920, 1080), (1080, 1080)


def clip(seconds: float, fps: float, height: int = 1080, width: int = 1920) -> VideoInfo:
    return VideoInfo(round(seconds * fps), height, width, float(fps))


SHORT = [clip(3 + number / 20, (24, 30, 60)[number % 3]) for number in range(40)]  # 3 to 5 seconds
SHORT_UPRIGHT = [clip(3.5, 30, *UPRIGHT)] * 9
SHORT_AND_UPRIGHT = SHORT + SHORT_UPRIGHT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def read(folder):
    """The flags on clips that a command line means."""

    def parse(line: str) -> tuple[ClipFlags, frozenset[str]]:
        places = ["--model_id", "org/name", "--data_root", str(folder), "--output_dir", str(folder / "out")]
        settings = parse_prepare_args([*places, *line.split()])
        return settings.clips, settings.given

    return parse


def planned(infos, flags):
    clips = [Clip(f"{number}.mp4", "", "") for number in range(len(infos))]
    found = {one.video: info for one, info in zip(clips, infos, strict=True)}
    buckets = make_buckets(flags.frame_buckets, flags.height_buckets, flags.width_buckets)
    return plan_clips(
        clips,
        found,
        buckets,
        fps=flags.fps,
        long_clips=flags.long_clips,
        hold_last_frame=flags.hold_last_frame,
    )


def recommended(read, infos, line=NATIVE, config=COGVIDEOX, **options) -> str | None:
    flags, given_flags = read(line)
    return recommend(infos, flags, config, given=given_flags, **options)


def flags_in(advice: str) -> str:
    return advice.split(", add: ")[1]


@pytest.mark.parametrize(
    ("infos", "line", "config", "expected"),
    [
        (SHORT, NATIVE, COGVIDEOX, "--fps 8 --frame_buckets 17 25 33"),
        (
            SHORT_AND_UPRIGHT,
            NATIVE,
            COGVIDEOX,
            "--fps 8 --frame_buckets 17 25 33 --height_buckets 480 720 --width_buckets 480 720",
        ),
        # Launchers of training pass the size as --height and --width.
        (SHORT_UPRIGHT, "--height 480 --width 720", COGVIDEOX, "--fps 8 --frame_buckets 25 --height_buckets 720"),
        (SHORT, f"{NATIVE} --long_clips spread", COGVIDEOX, "--fps 8 --long_clips first --frame_buckets 17 25 33"),
        (SHORT, f"{NATIVE} --fps 8", COGVIDEOX, "--frame_buckets 17 25 33"),
        ([clip(7, 8)] * 3 + [clip(20, 24)], NATIVE, COGVIDEOX, "--fps 8"),
        # Upright, within the 768 x 1360 that the positions of this model cover.
        (
            SHORT_UPRIGHT,
            NATIVE_1_5,
            COGVIDEOX_1_5,
            "--fps 16 --frame_buckets 49 --height_buckets 768 --width_buckets 432",
        ),
        ([clip(5.2, 24, 720, 1280)], NATIVE_1_5, COGVIDEOX_1_5, "--height_buckets 720 --width_buckets 1280"),
        ([clip(7, 8, 360, 640)], NATIVE, COGVIDEOX, "--height_buckets 352 --width_buckets 624"),
        ([clip(7, 8, *SQUARE)], NATIVE, COGVIDEOX, "--height_buckets 576 --width_buckets 576"),
        ([clip(7, 8), VideoInfo(1, 1080, 1920, 0.0, is_image=True)], NATIVE, COGVIDEOX, "--frame_buckets 1 49"),
        # What was chosen smaller than the model's size stays so.
        (
            SHORT_AND_UPRIGHT,
            "--height_buckets 256 --width_buckets 384 --frame_buckets 17",
            COGVIDEOX,
            "--fps 8 --height_buckets 256 384 --width_buckets 256 384",
        ),
    ],
)
def test_flags_that_keep_the_clips_are_recommended_once(read, infos, line, config, expected):
    advice = recommended(read, infos, line, config)
    assert advice.startswith("to keep the clip" if len(infos) == 1 else f"to keep all {len(infos)} clips")
    assert flags_in(advice).startswith(expected)
    better = f"{line} {flags_in(advice)}"
    samples, lost = planned(infos, read(better)[0])
    assert lost == []
    assert all(cropped_share(one.info.height, one.info.width, one.bucket) <= 0.2 for one in samples)
    assert not any(is_upscaled(one.info.height, one.info.width, one.bucket) for one in samples)
    assert recommended(read, infos, better, config) is None


@pytest.mark.parametrize(
    ("infos", "line", "expected"),
    [
        ([clip(0.6, 16), clip(1.2, 16)], "--frame_buckets 16", "--fps 16 --frame_buckets 8 16"),
        ([clip(2, 24)], "--frame_buckets 81 --max_num_frames 81", "--fps 16 --frame_buckets 32"),
        ([clip(6, 24), VideoInfo(1, 1080, 1920, 0.0, is_image=True)], "--frame_buckets 80", None),
        ([clip(0.9, 16)], "--frame_buckets 49 --fps 16", "--frame_buckets 8"),
        ([clip(5, 16)], "--frame_buckets 81 --fps 16", "--frame_buckets 80"),
        ([clip(0.2, 16)], "--frame_buckets 5", None),
    ],
)
def test_a_model_that_is_sampled_only_at_8k_frames_gets_no_others(read, infos, line, expected):
    line = f"--height_buckets 768 --width_buckets 1360 --max_num_frames 81 {line}"
    advice = recommended(read, infos, line, COGVIDEOX_1_5, frames_rest=0)
    assert (advice and flags_in(advice)) == expected
    assert expected is None or recommended(read, infos, f"{line} {expected}", COGVIDEOX_1_5, frames_rest=0) is None


@pytest.mark.parametrize(
    ("controls", "config", "length"),
    [(True, COGVIDEOX_1_5, 16), (False, COGVIDEOX_1_5, 17), (True, COGVIDEOX, 9)],
)
def test_training_takes_the_recommended_lengths_with_and_without_controls(folder, controls, config, length):
    places = ["--data_root", str(folder), "--output_dir", str(folder / "out"), "--frame_buckets", "24"]
    extra = ["--save_latents_and_embeddings", "--save_control_latents"] if controls else []
    preparation = parse_prepare_args(["--model_id", "org/name", *places, *extra])
    task = "control-to-video" if controls else "text-to-video"
    training = parse_args(["--pretrained_model_name_or_path", "org/name", *places], task=task, method="lora")
    data = RawData([], [BadClip("a.mp4", "t:1", "too short", clip(1.2, 16, 480, 720))])
    for settings in (preparation, training):
        assert f"--frame_buckets {length}" in advise(data, settings, config)


@pytest.mark.parametrize(
    ("infos", "line"),
    [
        ([clip(6.5, 24)] * 3, f"{NATIVE} --fps 8"),
        ([clip(6.2, 24)], NATIVE),  # spread over 6.2 seconds: the model's rate
        ([clip(2.5, 8)], "--height_buckets 256 --width_buckets 384 --frame_buckets 17"),  # chosen smaller
        ([clip(0.5, 24)], "--frame_buckets 9 --height_buckets 480 --width_buckets 720"),  # lost at 8 frames per second
        ([VideoInfo(60, 1080, 1920, 0.0)], NATIVE),  # unknown rate
        ([clip(7, 8, 8, 8)], NATIVE),
    ],
)
def test_nothing_is_recommended_that_is_not_better(read, infos, line):
    assert recommended(read, infos, line) is None


def test_clips_that_are_lost_are_counted_with_the_reason(read):
    advice = recommended(read, [*SHORT, clip(0.9, 24)])
    assert advice.startswith(
        "to keep 40 of 41 clips at the model's 8 frames per second (the first of the others: 8 usable"
    )
    assert flags_in(advice) == "--fps 8 --frame_buckets 17 25 33"


def test_a_rate_that_loses_many_clips_is_not_recommended(read):
    infos = [clip(1, 60)] * 3 + [clip(7, 24)] * 5
    assert recommended(read, infos) is None


def test_a_model_of_one_size_keeps_it_and_its_frames(read):
    infos = [clip(5, 24, *UPRIGHT), clip(7, 24)]
    assert flags_in(recommended(read, infos, f"{NATIVE} --fps 8", is_fixed=True)) == "--fps 10"


def test_larger_samples_are_said(read):
    advice = recommended(read, [clip(7, 8), clip(7, 8, *UPRIGHT), clip(7, 8, *SQUARE)])
    assert ", cropped by at most 16%, 0 upscaled, in sizes up to 720x720, add: " in advice


sides = st.integers(1, 120).map(lambda side: 16 * side + 3)
videos = st.builds(clip, st.floats(0.2, 12), st.sampled_from([5, 8, 12, 24, 29.97, 60]), sides, sides)


# Sizes for six shapes, which the fourth recommendation still bettered.
six_shapes = [(659, 355), (1395, 1091), (1619, 835), (1395, 627), (1411, 1331), (563, 1107)]


@example([clip(1 + (sides[1] == 1331), 5, *sides) for sides in six_shapes], (NATIVE, COGVIDEOX), "")
@given(
    st.lists(videos, min_size=1, max_size=6),
    st.sampled_from([(NATIVE, COGVIDEOX), (NATIVE_1_5, COGVIDEOX_1_5), ("", COGVIDEOX)]),
    st.sampled_from(["", "--fps 8", "--hold_last_frame", "--long_clips split", "--frame_buckets 17 25"]),
)
def test_recommended_flags_lose_few_clips_and_are_final(read, infos, base, more):
    line, config = f"{base[0]} {more}", base[1]
    advice = recommended(read, infos, line, config)
    if advice is None:
        return
    better = f"{line} {flags_in(advice)}"
    _, lost = planned(infos, read(better)[0])
    assert len(lost) <= len(planned(infos, read(line)[0])[1])  # of so few clips, none
    kept = len(infos) - len(lost)
    assert advice.startswith(f"to keep {kept} of {len(infos)} clips" if lost else ("to keep all", "to keep the clip"))
    assert recommended(read, infos, better, config) is None
