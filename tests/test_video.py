"""Clips are probed, chosen from, read and resized as `video` promises.

Test clips carry their frame number in the picture: eight vertical bars, one a bit, which survive any encoder.
"""

import math
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import video
from errors import UserError
from video import VideoInfo, choose_frames, probe_video, probe_videos, read_frames, reshape_frames, usable_frames


HEIGHT, WIDTH = 48, 80


def numbered_frame(number, height=HEIGHT, width=WIDTH):
    frame = np.full((height, width, 3), 128, np.uint8)  # a grey rim, so that odd sizes leave the bars alone
    for bit in range(8):
        frame[4:-4, 2 + bit * 9 : 11 + bit * 9] = 235 if number >> bit & 1 else 20
    return frame


def numbers_of(frames):
    bars = frames[:, 16:32, 4:76].mean(axis=(1, 3)).reshape(len(frames), 8, 9)[:, :, 2:7].mean(axis=2)
    return [sum(int(bar > 128) << bit for bit, bar in enumerate(row)) for row in bars]


def encode(path, frames=60, codec="libx264", height=HEIGHT, width=WIDTH, pixels="yuv420p", fps=25, **options):
    options = {"g": "250", "bf": "3", **options} if codec == "libx264" else options
    movflags = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", options=movflags) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.options = {key.replace("_", "-"): value for key, value in options.items()}
        stream.codec_context.thread_count = 1
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(numbered_frame(number, height, width), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def ffmpeg(*arguments):
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-nostdin", *map(str, arguments)], check=True
    )


def all_frames(path):
    """The truth: every frame, as PyAV decodes them one after another."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


X264_OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"}
ENCODINGS = {
    "single keyframe, B-frames": ("clip.mp4", {"x264-params": "keyint=infinite:scenecut=0:bframes=3"}),
    "no B-frames": ("clip.mp4", {"bf": "0", "g": "10"}),
    "closed groups": ("clip.mov", {"g": "12"}),
    "open groups": ("clip.mp4", X264_OPEN_GROUPS),
    "index in front": ("clip.mp4", {"movflags": "faststart"}),
    "fragmented": ("clip.mp4", {"movflags": "frag_keyframe+empty_moov", "g": "12"}),
    "matroska": ("clip.mkv", {"g": "12"}),
    "transport stream": ("clip.ts", {"g": "12"}),
    "odd size": ("clip.mp4", {"height": 47, "width": 79, "pixels": "yuv444p"}),
    "MPEG-4 with B-frames": ("clip.mp4", {"codec": "mpeg4", "bf": "2", "g": "12"}),
    "AVI": ("clip.avi", {"codec": "mpeg4", "bf": "2", "g": "12"}),
    "VP8": ("clip.webm", {"codec": "libvpx", "deadline": "realtime", "cpu-used": "8"}),
    "AV1": ("clip.mp4", {"codec": "libsvtav1", "preset": "12", "svtav1-params": "lp=1"}),
    "one frame": ("clip.mp4", {"frames": 1}),
}


@pytest.fixture(scope="module")
def clip_of(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            file, options = ENCODINGS[name]
            made[name] = encode(tmp_path_factory.mktemp("clips") / file, **options)
        return made[name]

    return make


@pytest.fixture(scope="module", params=["closed groups", "single keyframe, B-frames"])
def stream_copied_cut(request, clip_of, tmp_path_factory):
    """What `ffmpeg -ss` with `-c copy` makes: frames before the cut stay in the file, hidden by an edit list."""
    path = tmp_path_factory.mktemp("cut") / "cut.mp4"
    ffmpeg("-ss", "0.7", "-i", clip_of(request.param), "-t", "1", "-c", "copy", path)
    return path


# The probe


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_probe_agrees_with_decoding_everything(clip_of, name):
    truth = all_frames(clip_of(name))
    assert probe_video(clip_of(name)) == VideoInfo(*truth.shape[:3], fps=25.0)


def test_frames_hidden_by_an_edit_list_are_not_counted(stream_copied_cut):
    with av.open(str(stream_copied_cut)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    truth = all_frames(stream_copied_cut)
    assert len(truth) < len(packets)
    assert probe_video(stream_copied_cut).num_frames == len(truth)


def test_packets_without_a_picture_are_not_counted(clip_of, tmp_path):
    clip = clip_of("AV1")
    with av.open(str(clip)) as container:
        last = max(container.streams.video[0].index_entries, key=lambda entry: entry.pos)
    filling = last.size - 5
    padding = b"\x12\0" + bytes([0x7A, filling & 0x7F | 0x80, filling >> 7]) + bytes(filling)  # valid, and no picture
    content = clip.read_bytes()
    path = tmp_path / "padded.mp4"
    path.write_bytes(content[: last.pos] + padding + content[last.pos + last.size :])
    assert len(all_frames(path)) < 60
    assert probe_video(path).num_frames == len(all_frames(path))


def test_the_rate_is_exact_for_ntsc(tmp_path):
    clip = encode(tmp_path / "ntsc.mp4", frames=5, fps=Fraction(30000, 1001))
    assert probe_video(clip).fps == 30000 / 1001


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_rotated_clip_is_probed_and_read_as_displayed(clip_of, tmp_path, degrees):
    path = tmp_path / "rotated.mp4"
    ffmpeg("-display_rotation", degrees, "-i", clip_of("single keyframe, B-frames"), "-c", "copy", path)
    truth = np.rot90(all_frames(path), degrees // 90, axes=(1, 2))
    info = probe_video(path)
    assert (info.num_frames, info.height, info.width) == truth.shape[:3]
    wanted = [0, 7, 59]
    assert (read_frames(path, wanted) == truth[wanted]).all()


def test_files_that_are_no_video_are_named_by_reason(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(5000))
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.2", tmp_path / "sound.mp4")
    reasons = {
        "empty.mp4": r"^file is empty \(0 bytes\)$",
        "noise.mp4": r"^not a readable video: Invalid data",
        "sound.mp4": r"^has no video stream$",
        "nowhere.mp4": r"^does not exist$",
        ".": r"^is not a file$",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            probe_video(tmp_path / name)


def test_the_cover_picture_of_a_song_is_no_video(tmp_path):
    Image.fromarray(numbered_frame(1)).save(tmp_path / "cover.png")
    inputs = ["-f", "lavfi", "-i", "sine=d=0.2", "-i", tmp_path / "cover.png", "-map", "0", "-map", "1"]
    ffmpeg(*inputs, "-c:v", "copy", "-disposition:v", "attached_pic", tmp_path / "song.m4a")
    with pytest.raises(ValueError, match="has no video stream"):
        probe_video(tmp_path / "song.m4a")


def frame_ends(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return sorted(entry.pos + entry.size for entry in stream.index_entries)


def test_a_file_cut_off_after_its_index_is_truncated(clip_of, tmp_path):
    whole = clip_of("index in front")
    content, ends = whole.read_bytes(), frame_ends(whole)
    for size in (len(content) * 6 // 10, ends[-1] - 3, ends[40]):  # the last: exactly between two frames
        path = tmp_path / "cut.mp4"
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"^is truncated or damaged: 60 frames are listed but only \d+ decode"):
            probe_video(path)


def test_a_file_cut_off_before_its_index_is_not_readable(clip_of, tmp_path):
    content = clip_of("closed groups").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a readable video"):
        probe_video(tmp_path / "cut.mp4")


def test_a_tail_of_zeros_is_damage(clip_of, tmp_path):
    content = clip_of("index in front").read_bytes()
    keep = len(content) * 6 // 10
    (tmp_path / "holes.mp4").write_bytes(content[:keep] + bytes(len(content) - keep))
    with pytest.raises(ValueError, match="truncated or damaged: 60 frames are listed"):
        probe_video(tmp_path / "holes.mp4")


def test_all_bad_clips_come_in_one_error(clip_of, tmp_path):
    empty, noise, good = tmp_path / "empty.mp4", tmp_path / "noise.mp4", clip_of("no B-frames")
    empty.touch()
    noise.write_bytes(b"noise" * 100)
    with pytest.raises(UserError) as raised:
        probe_videos([empty, good, noise, good], num_threads=2)
    assert str(raised.value).splitlines() == [
        "2 of 3 clips cannot be used:",
        f"  {empty}: file is empty (0 bytes)",
        f"  {noise}: not a readable video: Invalid data found when processing input",
    ]


def test_each_clip_is_probed_once_and_returned_in_order(clip_of):
    first, second = clip_of("no B-frames"), clip_of("matroska")
    infos = probe_videos([second, first, second])
    assert list(infos) == [second, first]
    assert infos[first] == probe_video(first)


def test_no_torch_is_imported_to_find_bad_data():
    script = "import clips, video, buckets, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=Path(video.__file__).parent, check=True)


# Reading


WANTED = [[0], [59], [0, 1, 2, 3], list(range(0, 60, 7)), [5, 5, 5, 40, 40], [41, 3, 58, 3, 0]]


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name != "one frame"])
def test_frames_are_those_asked_for_pixel_by_pixel(clip_of, name):
    truth = all_frames(clip_of(name))
    assert numbers_of(truth) == list(range(60))
    for wanted in WANTED:
        frames = read_frames(clip_of(name), wanted)
        assert frames.dtype == np.uint8
        assert numbers_of(frames) == wanted
        assert (frames == truth[wanted]).all()


def test_frames_of_a_stream_copied_cut_are_those_asked_for(stream_copied_cut):
    truth = all_frames(stream_copied_cut)
    wanted = [0, 3, len(truth) - 1]
    assert (read_frames(stream_copied_cut, wanted) == truth[wanted]).all()


def test_a_frame_beyond_the_end_is_an_error_that_names_the_clip(clip_of):
    for name in ("single keyframe, B-frames", "AVI"):
        with pytest.raises(ValueError, match=r"clip\.\w+: frame 60 was asked for, but the clip ends before it"):
            read_frames(clip_of(name), [0, 60])


@pytest.mark.parametrize("indices", [[], [-1, 3]])
def test_no_frames_and_negative_frames_cannot_be_asked_for(clip_of, indices):
    with pytest.raises(ValueError, match="not a list of numbers from 0"):
        read_frames(clip_of("no B-frames"), indices)


def test_a_clip_that_went_bad_after_the_probe_is_named(clip_of, tmp_path):
    content = clip_of("index in front").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) * 6 // 10])
    (tmp_path / "empty.mp4").touch()
    for name in ("cut.mp4", "empty.mp4", "gone.mp4"):
        with pytest.raises(ValueError, match=name):
            read_frames(tmp_path / name, [0, 59])


# The choice of frames


@st.composite
def clips_and_skips(draw):
    frames = draw(st.integers(1, 400))
    return frames, draw(st.integers(0, frames)), draw(st.integers(0, frames))


rates = st.sampled_from([1, 7.5, 8, 10, 12, 15, 16, 24000 / 1001, 24, 25, 29.97, 30000 / 1001, 30, 50, 60])


@given(clips_and_skips(), st.integers(1, 100))
def test_frames_spread_evenly_from_the_first_to_the_last(clip, count):
    frames, skip_start, skip_end = clip
    usable = usable_frames(VideoInfo(frames, 1, 1, 25.0), skip_start=skip_start, skip_end=skip_end)
    assert usable == len(range(skip_start, frames - skip_end))
    if count > usable:
        with pytest.raises(ValueError, match=f"{usable} are usable"):
            choose_frames(frames, count, skip_start=skip_start, skip_end=skip_end)
        return
    indices = choose_frames(frames, count, skip_start=skip_start, skip_end=skip_end)
    assert len(indices) == count
    assert indices[0] == skip_start
    assert indices == sorted(set(indices))
    if count > 1:
        assert indices[-1] == frames - skip_end - 1
        spacing = Fraction(usable - 1, count - 1)
        assert all(abs(index - skip_start - i * spacing) <= Fraction(1, 2) for i, index in enumerate(indices))


@given(clips_and_skips(), rates, rates)
def test_frames_at_a_rate_are_the_nearest_in_time_and_none_more_would_fit(clip, clip_fps, fps):
    frames, skip_start, skip_end = clip
    info = VideoInfo(frames, 1, 1, clip_fps)
    usable = usable_frames(info, skip_start=skip_start, skip_end=skip_end, fps=fps)
    skips = {"skip_start": skip_start, "skip_end": skip_end, "clip_fps": clip_fps, "fps": fps}
    with pytest.raises(ValueError, match="cannot choose"):
        choose_frames(frames, usable + 1, **skips)
    if usable == 0:
        assert skip_start + skip_end >= frames
        return
    indices = choose_frames(frames, usable, **skips)
    assert choose_frames(frames, 1, **skips) == [skip_start]
    assert set(indices) <= set(range(skip_start, frames - skip_end))
    assert indices == (sorted(set(indices)) if fps <= clip_fps else sorted(indices))
    for i, index in enumerate(indices):
        assert abs((index - skip_start) / clip_fps - i / fps) <= 0.5 / clip_fps + 1e-6
    assert math.floor(usable * clip_fps / fps + 0.5 + 1e-6) > frames - skip_end - skip_start - 1


def test_halves_round_up():
    assert choose_frames(100, 5, clip_fps=25, fps=10) == [0, 3, 5, 8, 10]
    assert choose_frames(6, 3) == [0, 3, 5]


def test_a_second_of_ntsc_film_at_its_nominal_rate_loses_no_frame():
    info = VideoInfo(30, 1, 1, 29.97002997002997)
    assert usable_frames(info, fps=29.97) == 30


def test_a_rate_needs_the_rate_of_the_clip():
    for clip_fps in (None, 0.0):
        with pytest.raises(ValueError, match="frame rate is unknown"):
            choose_frames(100, 10, clip_fps=clip_fps, fps=8)


def test_fewer_than_one_frame_cannot_be_chosen():
    with pytest.raises(ValueError, match="cannot choose 0 frames"):
        choose_frames(100, 0)


# Size


def noise_video(height, width, frames=3):
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def pillow_resized(frames, height, width):
    """Pillow's bilinear filter widens with the scale too, and knows nothing of torch."""
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) for image in images])


def assert_close(frames, expected):
    assert frames.dtype == torch.uint8
    difference = np.abs(frames.permute(0, 2, 3, 1).numpy().astype(int) - expected.astype(int))
    assert difference.max() <= 1  # two ways of rounding


def test_none_resizes_whatever_the_aspect_ratio():
    frames = noise_video(96, 160)
    assert_close(reshape_frames(frames, 48, 48, "none", random.Random(0)), pillow_resized(frames, 48, 48))


@pytest.mark.parametrize(("size", "cover"), [((48, 48), (48, 80)), ((30, 80), (48, 80)), ((120, 100), (120, 200))])
def test_center_covers_and_keeps_the_middle(size, cover):
    frames = noise_video(96, 160)
    top, left = (cover[0] - size[0]) // 2, (cover[1] - size[1]) // 2
    expected = pillow_resized(frames, *cover)[:, top : top + size[0], left : left + size[1]]
    assert_close(reshape_frames(frames, *size, "center", random.Random(0)), expected)


def test_random_crops_one_place_for_all_frames_and_reaches_the_edges():
    frames = noise_video(20, 26)
    places = set()
    for seed in range(60):
        crop = reshape_frames(frames, 20, 20, "random", random.Random(seed))
        (left,) = [left for left in range(7) if torch.equal(frames[..., left : left + 20], crop)]
        places.add(left)
    assert places == set(range(7))


@given(*[st.integers(8, 60)] * 4, st.sampled_from(["center", "random", "none"]))
@settings(deadline=None, max_examples=150)
def test_every_size_becomes_the_size_asked_for(height, width, target_height, target_width, mode):
    frames = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    reshaped = reshape_frames(frames, target_height, target_width, mode, random.Random(0))
    assert reshaped.shape == (2, 3, target_height, target_width)


def test_frames_of_the_right_size_stay_untouched():
    frames = noise_video(24, 32)
    for mode in ("center", "random", "none"):
        assert reshape_frames(frames, 24, 32, mode, random.Random(0)).data_ptr() == frames.data_ptr()


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="must be center, random or none"):
        reshape_frames(noise_video(8, 8), 8, 8, "centre", random.Random(0))


def test_a_flip_mirrors_left_and_right():
    frames = noise_video(8, 10)
    assert (video.flip_frames(frames).numpy() == frames.numpy()[..., ::-1]).all()
