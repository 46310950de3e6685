"""The report shows the plan and notes unusual samples, as `planning.report` documents."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data.buckets import make_buckets
from data.clips import BadClip, Clip, plan_clips, with_each_caption
from planning.report import plan_table, write_plan
from repository import TRAINING
from video.probe import VideoInfo


BUCKETS = make_buckets([1, 9, 17], [32, 64], [32, 64])
VIDEO = VideoInfo(17, 64, 64, 8.0)


def plan(infos, captions=None, repeats=1.0, **options):
    """Samples of a clip for each of `infos`, all good."""
    captions = captions or [f"Cat {number}." for number in range(len(infos))]
    places = [(Path(f"videos/{number}.mp4"), f"videos.txt:{number + 1}") for number in range(len(infos))]
    clips = [Clip(place[0], text, place[1], repeats=repeats) for place, text in zip(places, captions, strict=True)]
    infos = {clip.video: info for clip, info in zip(clips, infos, strict=True)}
    planned, bad = plan_clips(clips, infos, BUCKETS, **options)
    assert bad == []
    return planned


def table_of(planned, **options):
    usual = {"batch_size": 1, "tokens_of": lambda bucket: 226 + bucket.height, "model_fps": 8.0}
    return str(plan_table(planned, **usual | options)).splitlines()


def notes(planned, **options):
    """The lines below the table and the length of the epoch."""
    lines = table_of(planned, **options)
    return lines[[line.startswith("an epoch is") for line in lines].index(True) + 1 :]


def test_the_plan_is_described_bucket_by_bucket():
    infos = [
        VideoInfo(34, 90, 90, 8.0),  # spread: a half of its frames is used
        VideoInfo(17, 64, 80, 8.0),  # a fifth of the width is cropped
        VideoInfo(17, 64, 64, 8.0),
        VideoInfo(10, 16, 40, 8.0),  # smaller than every bucket
        VideoInfo(1, 64, 64, 0.0, is_image=True),
    ]
    assert table_of(plan(infos), batch_size=2, model_fps=6) == [
        "bucket    samples  tokens  upscaled  cropped  clip frames  unused  batches",
        "1x64x64         1     290         0       0%            1      0%        1",
        "9x32x64         1     258         1      20%           10     10%        1",
        "17x64x64        3     290         0       0%           17     25%        2",
        "an epoch is 5 samples in 4 batches of up to 2",
    ]


@pytest.mark.parametrize(("mode", "name"), [("center", "cropped"), ("random", "cropped"), ("none", "squeezed")])
def test_the_column_of_another_aspect_depends_on_the_reshape_mode(mode, name):
    header, row, *_ = table_of(plan([VideoInfo(17, 64, 80, 8.0)]), reshape_mode=mode)
    assert header.split()[4] == name
    assert row.split()[4] == "20%"


def test_frames_of_a_split_clip_are_used_by_any_of_its_samples():
    lines = table_of(plan([VideoInfo(30, 64, 64, 8.0)], long_clips="split"))
    assert [line.split()[-2] for line in lines[:3]] == ["unused", "13%", "13%"]  # 17 + 9 of 30 frames


def test_batches_are_shared_out_over_the_ranks():
    lines = table_of(plan([VIDEO] * 9), batch_size=2, num_ranks=4)
    assert lines[-1] == "an epoch is 9 samples in 5 batches of up to 2, 2 on each of 4 ranks"


def test_an_empty_plan_is_reported():
    assert table_of([]) == ["there are no samples"]


@pytest.mark.parametrize(
    ("repeats", "count", "times"),
    [((2.5, 1), 4, "1 sample 1 times, 1 sample 2.5 times"), ((0.5, 1, 2, 4), 8, "every sample 0.5 to 4 times")],
)
def test_repeats_count_in_the_epoch(repeats, count, times):
    planned = [sample for number in repeats for sample in plan([VIDEO], repeats=number)]
    *_, length, repeated = table_of(planned)
    assert length == f"an epoch is {count} samples in {count} batches of up to 1"
    assert repeated == f"an epoch has {times}"


def test_clips_that_were_split_are_counted():
    planned = plan([VideoInfo(51, 64, 64, 8.0, sha256="a"), VideoInfo(26, 64, 64, 8.0), VIDEO], long_clips="split")
    assert notes(planned) == ["2 clips split: 5 samples"]


def test_held_frames_are_noted_with_the_worst_clip():
    planned = plan([VideoInfo(8, 64, 64, 8.0), VideoInfo(5, 64, 64, 8.0)], hold_last_frame=True)
    (note,) = notes(planned)
    assert note == "2 samples too short: the last frame is held, for up to 4 of 9 frames (1.mp4 (videos.txt:2))"


def test_clips_whose_pictures_are_corrected_are_counted():
    both = VideoInfo(40, 64, 64, 8.0, corrections=("deinterlaced", "mirrored"))
    planned = plan([both, VIDEO, VideoInfo(17, 64, 64, 8.0, corrections=("mirrored",))], long_clips="split")
    assert notes(planned)[1:] == ["corrected when decoded: 1 clip deinterlaced, 2 clips mirrored"]


def test_samples_deep_in_clips_that_cannot_seek_are_noted_with_the_command_for_it():
    infos = [VideoInfo(100, 64, 64, 8.0), VideoInfo(100, 64, 64, 8.0, seekable=True), VideoInfo(60, 64, 64, 8.0)]
    assert notes(plan(infos, long_clips="split"))[1:] == [
        "2 samples of clips that cannot seek, so that all frames before are decoded too: "
        "ffmpeg -i 0.mp4 -map 0:v:0 -c copy 0-seekable.mp4 makes H.264 and HEVC seekable"
    ]


def test_captions_that_are_cut_are_counted_and_named():
    (note,) = notes(plan([VIDEO], captions=["A cat."]), long_captions={"A cat."}, max_caption_tokens=100)
    assert note == "1 caption longer than 100 tokens: the rest is cut off: 0.mp4 (videos.txt:1)"


def test_captions_of_several_clips_and_refusals_are_counted_and_named():
    planned = plan([VIDEO] * 6, captions=["A cat.", "", "A cat.", "I cannot see.", "", "A dog."], long_clips="split")
    refusals, shared = notes(planned)
    assert refusals.startswith("1 caption in which a model refuses to answer")
    assert refusals.endswith(": 3.mp4 (videos.txt:4)")
    assert shared.startswith("1 caption used for several clips")
    assert shared.endswith(": 0.mp4 (videos.txt:1), 2.mp4 (videos.txt:3)")
    first, other = plan([VIDEO] * 2)
    several = [replace(one, clip=replace(one.clip, captions=("A cat.", "A pet."))) for one in (first, other)]
    (shared,) = [note for note in notes(list(with_each_caption(several))) if "used for several" in note]
    assert shared.startswith("2 captions used for several clips")
    assert shared.endswith(": 0.mp4 (videos.txt:1), 1.mp4 (videos.txt:2)")


def test_captions_that_the_tokenizer_cannot_read_are_counted_and_named():
    planned = plan([VIDEO] * 6, captions=["A cat.", "猫", "狗", "鸟", "鱼", "鱼"])
    note, _ = notes(planned, unknown_captions={"猫", "狗", "鸟", "鱼"})
    assert note.startswith("4 captions mostly in a script that the model's tokenizer lacks")
    assert note.endswith(": 1.mp4 (videos.txt:2), 2.mp4 (videos.txt:3), 3.mp4 (videos.txt:4) and 2 more")


def rate_notes(*infos, **options):
    return notes(plan(infos, **options))


def test_clips_faster_than_the_model_teach_slow_motion():
    assert rate_notes(VideoInfo(17, 64, 64, 24.0), VideoInfo(17, 64, 64, 30.0), VIDEO) == [
        "2 samples at 24 to 30 frames per second, the model's videos have 8: motion will be learned up to 3.8x too "
        "slow"
    ]


def test_long_clips_spread_over_few_frames_teach_fast_motion():
    # 17 frames from the first to the last of 161: 16 steps of 10 frames at 24 a second.
    assert rate_notes(VideoInfo(161, 64, 64, 24.0)) == [
        "1 sample at 2.4 frames per second, the model's videos have 8: motion will be learned up to 3.3x too fast"
    ]


@pytest.mark.parametrize(
    ("info", "options"),
    [
        (VideoInfo(17, 64, 64, 16.0), {}),  # twice as fast is near enough
        (VideoInfo(49, 64, 64, 24.0), {}),  # every third frame is shown
        (VideoInfo(100, 64, 64, 24.0), {"fps": 8.0, "long_clips": "first"}),
        (VideoInfo(17, 64, 64, 0.0), {}),  # unknown
        (VideoInfo(1, 64, 64, 0.0, is_image=True), {}),
        (VideoInfo(5, 64, 64, 8.0), {"hold_last_frame": True}),  # the frames held do not make it slower
        (VideoInfo(1, 64, 64, 24.0), {"hold_last_frame": True}),
    ],
)
def test_rates_near_the_models_are_not_noted(info, options):
    assert not any("frames per second" in note for note in rate_notes(info, **options))


def test_a_variable_rate_follows_from_the_times_of_the_chosen_frames():
    times = tuple(range(0, 500_000, 50_000)) + tuple(range(1_000_000, 8_000_000, 1_000_000))
    first = VideoInfo(17, 64, 64, 2.3, frame_times=times)  # 10 frames at 20 a second, then one a second
    assert rate_notes(first)[0].startswith("1 sample at 2.29 frames per second")  # 16 steps in 7 seconds
    assert rate_notes(first, skip_end=8)[0].startswith("1 sample at 20 frames per second")


def of_content(*contents):
    return [VideoInfo(17, 64, 64, 8.0, sha256=content) for content in contents]


def test_clips_listed_twice_are_named_in_pairs_up_to_three():
    pairs = [f"{at}.mp4 (videos.txt:{at + 1}) and {at + 4}.mp4 (videos.txt:{at + 5})" for at in range(3)]
    start = "clips listed again with the same caption, which adds weight: "
    assert notes(plan(of_content(*"abcdab"), captions="abcdab")) == [f"2 {start}{'; '.join(pairs[:2])}"]
    assert notes(plan(of_content(*"abcdabcd"), captions="abcdabcd")) == [f"4 {start}{'; '.join(pairs)}; and 1 more"]


def test_a_video_with_several_captions_is_not_a_duplicate():
    planned = plan(of_content("a", "b", "a", "a"), captions=["A cat.", "A cow.", "A dog.", "A mouse."])
    assert notes(planned) == ["1 video with several captions: 0.mp4 (videos.txt:1) and 2.mp4 (videos.txt:3)"]


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_csv_has_a_line_for_every_sample_and_every_bad_clip(tmp_path):
    infos = [VideoInfo(26, 48, 80, 30000 / 1001, corrections=("mirrored", "shown over white")), VIDEO]
    planned = plan(infos, captions=["A\ncat, äh.", "b" * 99], long_clips="split")
    write_plan(planned, [BadClip("gone.mp4", "videos.txt:9", "does not exist")], tmp_path / "plan.csv")
    first, second, third, bad = read(tmp_path / "plan.csv")
    given = {"source": "videos.txt:1", "video": str(Path("videos/0.mp4")), "caption": "A cat, äh."}
    found = {"frames": "26", "fps": "29.97", "height": "48", "width": "80", "bucket": "17x32x64", "part": "0"}
    found["corrected"] = "mirrored, shown over white"
    chosen = {"first_frame": "0", "last_frame": "16", "held": "0", "cropped": "0.167", "upscaled": "", "reason": ""}
    assert first == given | found | chosen
    columns = ("part", "bucket", "first_frame", "last_frame")
    assert [second[column] for column in columns] == ["1", "9x32x64", "17", "25"]
    assert third["caption"] == "b" * 59 + "…"
    assert (bad["source"], bad["video"], bad["reason"]) == ("videos.txt:9", "gone.mp4", "does not exist")
    assert bad["frames"] == ""


def test_the_csv_has_the_upscaling_held_frames_and_names_that_are_not_unicode(tmp_path):
    (sample,) = plan([VideoInfo(5, 16, 32, 8.0)], hold_last_frame=True)
    clip = replace(sample.clip, video=Path("b\udcff.mp4"))
    write_plan([replace(sample, clip=clip)], [], tmp_path / "plan.csv")
    (row,) = read(tmp_path / "plan.csv")
    assert (row["bucket"], row["upscaled"], row["held"], row["cropped"]) == ("9x32x64", "2", "4", "0.000")
    assert row["video"] == "b\\udcff.mp4"


def test_reporting_needs_no_torch():
    script = "import sys, planning.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=TRAINING, check=False).returncode == 0
