"""`read_frames` returns exactly the requested frames, and `reshape_frames` resizes and crops them as documented."""

import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoded_clips import ENCODINGS, all_frames, encode, ffmpeg, numbers_of, remuxed, stream_copied_cut
from repository import TRAINING
from video import io as video
from video.io import read_frames, reshape_frames, write_video
from video.probe import probe_video


def test_no_torch_is_imported_to_find_and_show_bad_data():
    script = "import video.probe, video.frames, video.io, video.contact_sheet, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=TRAINING, check=True)


WANTED = [[0], [59], [0, 1, 2, 3], list(range(0, 60, 7)), [5, 5, 5, 40, 40], [41, 3, 58, 3, 0]]


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name != "one frame"])
def test_frames_are_exact(clip_of, name):
    truth = all_frames(clip_of(name))
    assert numbers_of(truth) == list(range(60))
    for wanted in WANTED:
        frames = read_frames(clip_of(name), wanted)
        assert frames.dtype == np.uint8
        assert (frames == truth[wanted]).all()


@pytest.mark.parametrize("name", ["closed groups", "single keyframe, B-frames"])
def test_frames_of_a_stream_copied_cut_are_exact(clip_of, tmp_path, name):
    cut = stream_copied_cut(clip_of(name), tmp_path / "cut.mp4")
    truth = all_frames(cut)
    wanted = [0, 3, len(truth) - 1]
    assert (read_frames(cut, wanted) == truth[wanted]).all()
    assert video._read_from_keyframe(cut, wanted[-1:], 1) is None


def test_an_image_is_a_clip_of_one_frame(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "still.png")
    frames = read_frames(tmp_path / "still.png", [0, 0, 0])
    assert (frames == np.stack([pixels] * 3)).all()
    with pytest.raises(ValueError, match=r"still\.png: frame 3 was asked for, but it is a still image"):
        read_frames(tmp_path / "still.png", [0, 3])


@pytest.mark.parametrize(("height", "width", "shape"), [(48, 80, (24, 40)), (96, 64, (40, 27)), (48, 24, (40, 20))])
def test_frames_are_resized_to_a_longer_side_when_they_are_read(tmp_path, height, width, shape):
    clip = encode(tmp_path / "clip.mp4", frames=3, height=height, width=width)
    Image.fromarray(all_frames(clip)[2]).save(tmp_path / "still.png")
    truth = [np.asarray(Image.fromarray(frame).resize(shape[::-1], Image.BILINEAR)) for frame in all_frames(clip)]
    frames = read_frames(clip, [2, 0, 2], longer_side=40)
    assert frames.shape == (3, *shape, 3)
    assert np.abs(frames[1].astype(int) - truth[0]).mean() < 3
    assert np.array_equal(read_frames(tmp_path / "still.png", [0], longer_side=40)[0], truth[2])


def test_a_name_may_look_like_a_url_or_a_pattern(clip_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("take 2: rabbit.mp4", "rabbit %03d.mp4"):
        Path(name).write_bytes(clip_of("no B-frames").read_bytes())
        assert numbers_of(read_frames(Path(name), [7])) == [7]


@pytest.mark.parametrize("seekable", [False, True])
def test_a_frame_beyond_the_end_is_an_error_with_the_clips_name(clip_of, seekable):
    for name in ("single keyframe, B-frames", "AVI"):
        with pytest.raises(ValueError, match=r"clip\.\w+: frame 99 was asked for, but the clip ends before it"):
            read_frames(clip_of(name), [99], seekable=seekable)


@pytest.mark.parametrize("seekable", [False, True])
def test_a_clip_damaged_after_the_probe_is_named(clip_of, tmp_path, seekable):
    content = clip_of("index in front").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) * 6 // 10])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    for name in ("cut.mp4", "empty.mp4", "gone.mp4", "picture.png"):
        with pytest.raises(ValueError, match=name):
            read_frames(tmp_path / name, [0, 59], seekable=seekable)


def test_a_clip_that_changes_its_size_is_named(tmp_path):
    parts = [encode(tmp_path / f"{width}.ts", frames=20, width=width) for width in (80, 96)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert len(read_frames(path, range(15))) == 15
    with pytest.raises(ValueError, match=r"joined\.ts: changes its size from 80x48 to 96x48"):
        read_frames(path, [0, 30])


SEEKABLE = ["no B-frames", "closed groups", "index in front", "fragmented", "matroska", "VP9", "AV1"]
SEEKABLE += ["HEVC, closed groups", "HEVC, open groups"]


def assert_exact_or_none(clip, num_frames):
    """Read each of the first frames from a keyframe and compare it with the clip decoded from the start."""
    truth = all_frames(clip)
    for index in range(num_frames):
        frames = video._read_from_keyframe(clip, [index], 1)
        assert frames is None or (frames[0] == truth[index]).all()


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_frame_read_from_a_keyframe_is_the_one_read_from_the_start(clip_of, name):
    assert_exact_or_none(clip_of(name), 1 if name == "one frame" else 60)


@pytest.mark.parametrize("name", SEEKABLE)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_several_frames_over_several_groups_are_read_from_a_keyframe(clip_of, name, num_threads):
    truth = all_frames(clip_of(name))
    wanted = [33, 34, 41, 55, 59]
    assert probe_video(clip_of(name)).seekable
    assert (video._read_from_keyframe(clip_of(name), wanted, num_threads) == truth[wanted]).all()


@pytest.mark.parametrize("name", ["open groups", "open groups, matroska", "single keyframe, B-frames", "one frame"])
def test_a_clip_whose_only_clean_start_is_the_first_frame_is_not_read_from_a_keyframe(clip_of, name):
    last = 0 if name == "one frame" else 59
    assert video._read_from_keyframe(clip_of(name), [last], 1) is None


def long_clip(path):
    return encode(path, frames=150, **{"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3"})


def test_frames_deep_in_a_seekable_clip_are_exact(tmp_path):
    clip = long_clip(tmp_path / "long.mp4")
    truth = all_frames(clip)
    assert numbers_of(truth) == list(range(150))
    for wanted in ([100], [149, 101, 101], list(range(70, 119))):
        assert (read_frames(clip, wanted, seekable=True) == truth[wanted]).all()


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_rotated_clip_is_probed_and_read_as_displayed(tmp_path, degrees):
    path = tmp_path / "rotated.mp4"
    ffmpeg("-display_rotation", degrees, "-i", long_clip(tmp_path / "long.mp4"), "-c", "copy", path)
    truth = np.rot90(all_frames(path), degrees // 90, axes=(1, 2))
    info = probe_video(path)
    assert (info.num_frames, info.height, info.width, info.rotation) == (*truth.shape[:3], degrees)
    for wanted in ([0, 7, 59], [130]):  # from the start, from a keyframe
        assert (read_frames(path, wanted, seekable=True) == truth[wanted]).all()
    assert video._read_from_keyframe(path, [130], 1) is not None


def test_keyframe_flags_are_not_trusted(clip_of, tmp_path):
    def flag(packet):
        packet.is_keyframe = True

    clip = remuxed(clip_of("HEVC, open groups"), tmp_path / "lying.mp4", flag)
    with av.open(str(clip)) as container:
        assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    assert_exact_or_none(clip, 60)


def test_time_stamps_in_decoding_order_are_not_trusted(tmp_path):
    def forget_the_order_of_display(packet):
        packet.pts = packet.dts = packet.dts + 1024  # from 0 on

    clip = remuxed(long_clip(tmp_path / "long.mp4"), tmp_path / "unordered.mkv", forget_the_order_of_display)
    with av.open(str(clip)) as container:
        shown = [frame.pts for frame in container.decode(video=0)]
    assert shown != sorted(shown)
    truth = all_frames(clip)
    for index in range(90, 150):
        assert (read_frames(clip, [index], seekable=True)[0] == truth[index]).all()


def test_a_time_stamp_out_of_order_does_not_shift_the_frames(clip_of, tmp_path):
    def show_one_at_the_end(packet):
        packet.pts = 60_000 if packet.pts == 200 else packet.pts

    clip = remuxed(clip_of("VP9"), tmp_path / "late.webm", show_one_at_the_end)
    assert numbers_of(all_frames(clip)) == list(range(60))
    assert_exact_or_none(clip, 59)


def test_gradual_refresh_is_not_a_clean_start(tmp_path):
    options = {"x264-params": "intra-refresh=1:keyint=20:scenecut=0:bframes=0:ref=1"}
    clip = encode(tmp_path / "refresh.mp4", frames=150, **options)
    truth = all_frames(clip)
    for index in range(90, 150, 7):
        assert video._read_from_keyframe(clip, [index], 1) is None
        assert (read_frames(clip, [index], seekable=True)[0] == truth[index]).all()


def test_a_damaged_clip_has_the_same_frames_as_without_seeking(tmp_path):
    content = bytearray(long_clip(tmp_path / "long.mp4").read_bytes())
    with av.open(str(tmp_path / "long.mp4")) as container:
        entries = container.streams.video[0].index_entries
        keyframe = [entry for entry in entries if entry.is_keyframe][9]
    middle, end = keyframe.pos + keyframe.size // 2, keyframe.pos + keyframe.size
    content[middle:end] = bytes(end - middle)
    (tmp_path / "damaged.mp4").write_bytes(content)
    wanted = list(range(108, 149))  # from the damaged keyframe on
    frames = read_frames(tmp_path / "damaged.mp4", wanted, seekable=True)
    assert (frames == read_frames(tmp_path / "damaged.mp4", wanted)).all()


def moving_gradients(frames):
    """Return smooth pictures that all differ."""
    rows, columns, times = np.meshgrid(np.arange(48), np.arange(80), np.arange(frames), indexing="ij")
    colours = np.stack([40 + 3 * rows + times, 20 + 2 * columns + times, 10 * times + rows // 2], axis=-1)
    return colours.transpose(2, 0, 1, 3).astype(np.uint8)


@pytest.mark.parametrize("as_pictures", [True, False])
@pytest.mark.parametrize(("frames", "fps"), [(17, 8), (1, 8), (5, Fraction(30000, 1001))])
def test_a_written_video_is_read_back(tmp_path, frames, fps, as_pictures):
    written = moving_gradients(frames)
    path = tmp_path / "a: b"  # no suffix, and like a URL
    write_video(path, [Image.fromarray(frame) for frame in written] if as_pictures else list(written), fps)
    info = probe_video(path)
    assert (info.num_frames, info.height, info.width) == (frames, 48, 80)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.codec_context.name) == (fps, "h264")
        assert (container.format.name.split(",")[1], stream.codec_context.pix_fmt) == ("mp4", "yuv420p")
    read = read_frames(path, range(frames))
    assert np.abs(read.astype(int) - written).mean() < 2.5


def test_a_video_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file or directory"):
        write_video(tmp_path / "missing" / "x.mp4", list(moving_gradients(1)), 8)


def noise_video(height, width, frames=3):
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def pillow_resized(frames, height, width):
    """Resize with Pillow, whose bilinear filter is antialiased too."""
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) for image in images])


@pytest.mark.parametrize(
    ("size", "resized"), [((48, 48),) * 2, ((48, 48), (48, 80)), ((30, 80), (48, 80)), ((120, 100), (120, 200))]
)
def test_none_distorts_and_center_covers_and_keeps_the_middle(size, resized):
    frames = noise_video(96, 160)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    expected = pillow_resized(frames, *resized)[:, top : top + size[0], left : left + size[1]]
    reshaped = reshape_frames(frames, *size, "none" if size == resized else "center", random.Random(0))
    assert reshaped.dtype == torch.uint8
    difference = np.abs(reshaped.permute(0, 2, 3, 1).numpy().astype(int) - expected.astype(int))
    assert difference.max() <= 1  # two ways of rounding


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
def test_every_size_becomes_the_target_size(height, width, target_height, target_width, mode):
    frames = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    reshaped = reshape_frames(frames, target_height, target_width, mode, random.Random(0))
    assert reshaped.shape == (2, 3, target_height, target_width)


def test_frames_of_the_target_size_are_not_copied():
    frames = noise_video(24, 32)
    for mode in ("center", "random", "none"):
        assert reshape_frames(frames, 24, 32, mode, random.Random(0)).data_ptr() == frames.data_ptr()
