"""Frames are shown as FFmpeg's own player pipeline shows them; colours follow the published formulas."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from encoded_clips import all_frames, encode, ffmpeg, numbered_frame, numbers_of
from video import io as video
from video.display import DEINTERLACED, MIRRORED, OVER_WHITE, STRETCHED, TONE_MAPPED
from video.io import read_frames
from video.probe import probe_video


def shown_by_ffmpeg(clip: Path, filters: str = "null") -> np.ndarray:
    """Every frame, turned and mirrored by ffmpeg itself. uint8 [F, H, W, 3]."""
    folder = clip.parent / f"{clip.name} as shown"
    folder.mkdir()
    ffmpeg("-i", clip, "-vf", filters, folder / "%03d.png")
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.iterdir())])


def difference(frames, expected):
    assert frames.shape == expected.shape
    return np.abs(frames.astype(int) - expected)


ORIENTATIONS = [[*turn, *flip] for turn in ([], *(["-display_rotation", str(n)] for n in (90, 180, 270)))
                for flip in ([], ["-display_hflip"])]  # fmt: skip


@pytest.mark.parametrize("options", [*ORIENTATIONS, ["-display_vflip"], ["-display_rotation", "90", "-display_vflip"]])
def test_every_orientation_is_that_of_ffmpeg(clip_of, tmp_path, options):
    path = tmp_path / "clip.mp4"
    ffmpeg(*options, "-i", clip_of("no B-frames"), "-frames:v", "2", "-c", "copy", path)
    truth = shown_by_ffmpeg(path)
    assert difference(read_frames(path, [0, 1]), truth).max() <= 1
    info = probe_video(path)
    assert (info.height, info.width) == truth.shape[1:3]
    assert info.corrections == ((MIRRORED,) if "-display_hflip" in options or "-display_vflip" in options else ())


def gradients(path: Path, aspect: Fraction) -> Path:
    """Write two smooth pictures with pixels of an aspect ratio."""
    rows, columns = np.mgrid[:48, :80]
    picture = np.stack([rows * 4, columns * 3, rows + columns], axis=-1).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, width=80, height=48, pix_fmt="yuv420p")
        stream.codec_context.sample_aspect_ratio = aspect
        stream.options = {"crf": "1"}
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("turn", ["0", "90"])
@pytest.mark.parametrize("aspect", ["4/3", "64/45", "10/11"])
def test_pixels_become_square_before_the_picture_is_turned(tmp_path, aspect, turn):
    path = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", turn, "-i", gradients(tmp_path / "clip.mp4", Fraction(aspect)), "-c", "copy", path)
    # ffmpeg turns first, and then pixels are stretched in the other direction.
    width = f"trunc(80*{aspect}/2)*2"
    truth = shown_by_ffmpeg(path, f"scale={width}:48" if turn == "0" else f"scale=48:{width}")
    frames, info = read_frames(path, [0, 1]), probe_video(path)
    assert difference(frames, truth).mean() < 1.5
    assert (info.height, info.width, info.corrections) == (*truth.shape[1:3], (STRETCHED,))


@pytest.mark.parametrize("aspect", [Fraction(0), Fraction(401, 400), Fraction(64, 65), Fraction(100), Fraction(1, 50)])
def test_rounded_and_broken_aspect_ratios_count_as_square(tmp_path, aspect):
    path = gradients(tmp_path / "clip.mkv", aspect)
    info = probe_video(path)
    assert (info.height, info.width, info.corrections) == (48, 80, ())
    assert read_frames(path, [0]).shape == (1, 48, 80, 3)


ALPHA = {
    "png": ("clip.mov", "rgba"),
    "qtrle": ("clip.mov", "argb"),
    "apng": ("clip.apng", "rgba"),
    "prores_ks": ("clip.mov", "yuva444p10le"),
    "libvpx-vp9": ("clip.webm", "yuva420p"),
    "libvpx": ("clip.webm", "yuva420p"),
}


def with_alpha(folder: Path, codec: str, alpha: np.ndarray, num_frames: int = 3) -> Path:
    """Write the number 173 in green and red, with an alpha channel [H, W]."""
    name, pixels = ALPHA[codec]
    picture = np.dstack([numbered_frame(173) // 2 + (0, 100, 0), alpha]).astype(np.uint8)
    with av.open(str(folder / name), "w") as container:
        stream = container.add_stream(codec, rate=8, width=80, height=48, pix_fmt=pixels)
        if name.endswith("webm"):
            stream.options, stream.metadata["alpha_mode"] = {"auto-alt-ref": "0"}, "1"
        for _ in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgba")))
        container.mux(stream.encode())
    return folder / name


HALF = np.where(np.arange(80) < 40, 255, 0) * np.ones((48, 1))


@pytest.mark.parametrize("codec", ALPHA)
def test_transparent_parts_are_white_and_the_hidden_colour_never_shows(tmp_path, codec):
    path = with_alpha(tmp_path, codec, HALF)
    (frame, _) = read_frames(path, [0, 2])
    near = 8 if codec.startswith("libvpx") else 0  # lossy alpha has a soft edge
    assert (frame[:, 40 + near :] >= 254).all()
    visible = (numbered_frame(173) // 2 + (0, 100, 0))[:, : 40 - near]
    assert difference(frame[:, : 40 - near], visible).mean() < 12
    assert probe_video(path).corrections == (OVER_WHITE,)


def test_alpha_is_straight_and_mixes_with_white(tmp_path):
    (frame,) = read_frames(with_alpha(tmp_path, "png", np.full((48, 80), 51)), [0])
    colour = numbered_frame(173) // 2 + (0, 100, 0)
    assert difference(frame, 0.2 * colour + 0.8 * 255).max() <= 1


def test_the_hidden_colour_does_not_show_in_stretched_pixels(tmp_path):
    path = tmp_path / "wide.mov"
    ffmpeg("-i", with_alpha(tmp_path, "png", HALF), "-vf", "setsar=2", "-c:v", "png", "-pix_fmt", "rgba", path)
    (frame,) = read_frames(path, [0])
    assert frame.shape == (48, 160, 3)
    assert (frame[:, 82:] == 255).all()


@pytest.mark.parametrize("codec", ["png", "prores_ks"])
def test_an_unused_alpha_channel_changes_nothing(tmp_path, codec):
    path = with_alpha(tmp_path, codec, np.full((48, 80), 255))
    assert (read_frames(path, [0, 1, 2]) == all_frames(path)).all()
    assert probe_video(path).corrections == ()


def test_a_clip_that_is_transparent_throughout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is transparent in every frame; export it without an alpha channel"):
        probe_video(with_alpha(tmp_path, "qtrle", np.zeros((48, 80))))


def interlaced(path: Path, num_frames: int = 100) -> Path:
    """Write frames whose lower field is half a frame later: a bar moves behind the numbers."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=160, height=48, pix_fmt="yuv420p")
        stream.options = {"x264-params": "interlaced=1:tff=1:keyint=12:min-keyint=12:scenecut=0", "crf": "10"}
        for number in range(num_frames):
            picture = np.full((48, 160, 3), 60, np.uint8)
            picture[:, :80] = numbered_frame(number)
            for field in (0, 1):
                left = 90 + (2 * number + field) * 3 % 50
                picture[field::2, left : left + 16] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def combing(frames):
    """How much rows differ from the mean of their neighbours, where the bar moves."""
    rows = frames[:, :, 88:].astype(float)
    return np.abs(rows[:, 1:-1] - (rows[:, :-2] + rows[:, 2:]) / 2).mean()


def test_interlaced_frames_are_deinterlaced_one_by_one(tmp_path):
    path = interlaced(tmp_path / "clip.mp4")
    info, combed = probe_video(path), all_frames(path)
    frames = read_frames(path, range(100))
    assert (info.num_frames, info.corrections) == (100, (DEINTERLACED,))
    assert numbers_of(frames[:, :, :80]) == list(range(100))
    assert combing(frames) < combing(combed) / 4
    # Versions of FFmpeg differ in the outer rows of a frame without neighbour.
    assert difference(frames, shown_by_ffmpeg(path, "bwdif=mode=send_frame"))[1:-1].max() <= 2


def test_a_deinterlaced_frame_is_the_same_wherever_decoding_starts(tmp_path):
    path = interlaced(tmp_path / "clip.mp4")
    frames = read_frames(path, range(100))
    assert probe_video(path).seekable
    for index in (0, 1, 50, 71, 72, 73, 84, 99):  # 72 and 84 are keyframes
        assert (read_frames(path, [index], seekable=True)[0] == frames[index]).all()
    assert video._read_from_keyframe(path, [73], 1) is not None


def test_progressive_frames_of_a_mixed_clip_are_untouched(tmp_path):
    parts = [encode(tmp_path / "a.ts", frames=20, width=160), interlaced(tmp_path / "b.ts", 20)]
    path = tmp_path / "mixed.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    stored, frames = all_frames(path), read_frames(path, range(40))
    assert (frames[:20] == stored[:20]).all()
    assert combing(frames[20:]) < combing(stored[20:]) / 4
    assert probe_video(path).corrections == (DEINTERLACED,)


def test_an_interlaced_clip_that_changes_its_size_is_named(tmp_path):
    parts = [interlaced(tmp_path / "a.ts", 20), encode(tmp_path / "b.ts", frames=20, width=96)]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(ValueError, match=r"joined\.ts: changes its size .* 160x48 yuv420p to 96x48 yuv420p"):
        read_frames(tmp_path / "joined.ts", [3, 30])


# Signal values [0, 1] of light in nits, by SMPTE ST 2084 and ITU-R BT.2100 (HLG on a display of 1000 nits).


def pq_signal(nits):
    light = (np.asarray(nits) / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * light) / (1 + 2392 / 128 * light)) ** (2523 / 32)


def hlg_signal(nits):
    display = np.asarray(nits) / 1000
    luminance = display @ (0.2627, 0.6780, 0.0593)
    scene = display * luminance[..., None] ** (1 / 1.2 - 1)
    a, b = 0.17883277, 0.28466892
    upper = a * np.log(np.maximum(12 * scene - b, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


def bt2446_a(nits):
    """ITU-R BT.2446, method A, for grey: from 1000 to 100 nits. Returns the SDR signal, 0 to 255."""
    light = np.log1p(12.26 * (np.asarray(nits) / 1000) ** (1 / 2.4)) / np.log(13.26)
    middle = -1.1510 * light**2 + 2.7811 * light - 0.6302
    compressed = np.select([light <= 0.7399, light < 0.9909], [1.0770 * light, middle], 0.5 * light + 0.5)
    return 255 * (5.697**compressed - 1) / 4.697


def bt2020_clip(path: Path, signal: np.ndarray, transfer: str) -> Path:
    """Write patches of RGB signals [N, 3] as lossless HEVC of 10 bits in BT.2020, made for a display of 1000 nits."""
    red, green, blue = signal.T
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    planes = 64 + 876 * luma, 512 + 896 * (blue - luma) / 1.8814, 512 + 896 * (red - luma) / 1.4746
    planes = np.stack(planes).round().astype("<u2")[:, None, :]
    raw = path.with_suffix(".yuv")
    raw.write_bytes(planes.repeat(32, axis=1).repeat(32, axis=2).tobytes())
    light = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1)"
    parameters = f"log-level=none:lossless=1:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    size = f"{32 * len(signal)}x32"
    source = ["-f", "rawvideo", "-pix_fmt", "yuv444p10le", "-s", size, "-i", raw]
    ffmpeg(*source, "-c:v", "libx265", "-x265-params", f"{parameters}:master-display={light}", path)
    return path


@pytest.mark.parametrize(("transfer", "signal_of"), [("smpte2084", pq_signal), ("arib-std-b67", hlg_signal)])
def test_high_dynamic_range_is_tone_mapped(tmp_path, transfer, signal_of):
    nits = np.array([0.1, 1, 10, 26, 100, 203, 400, 1000])
    # BT.709's yellow-red of 50 nits, in BT.2020's primaries (ITU-R BT.2087).
    to_bt2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    skin = 50 * np.array(to_bt2020) @ (1, 0.4, 0.2)
    path = bt2020_clip(tmp_path / "clip.mp4", signal_of(np.vstack([nits[:, None].repeat(3, 1), skin])), transfer)
    *greys, (red, green, blue) = read_frames(path, [0])[0, 16, 16::32].astype(int)
    assert np.abs(greys - bt2446_a(nits)[:, None]).max() <= 10
    # The hue stays: it would be paler and redder without the conversion of primaries.
    hue = (green - blue) / (red - blue)
    expected = np.array((1, 0.4, 0.2)) ** (1 / 2.4)
    assert hue == pytest.approx((expected[1] - expected[2]) / (expected[0] - expected[2]), abs=0.05)
    assert probe_video(path).corrections == (TONE_MAPPED,)


MATRICES = {"bt601": (0.299, 0.114, "smpte170m"), "bt709": (0.2126, 0.0722, "bt709")}


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_colours_follow_the_matrix_and_the_range_of_the_clip(tmp_path, matrix, full_range):
    of_red, of_blue, name = MATRICES[matrix]
    rng = np.random.default_rng(0)
    yuv = np.stack([rng.integers(60, 200, 12), *rng.integers(100, 156, (2, 12))], axis=-1)
    low, luma, chroma = (0, 255, 255) if full_range else (16, 219, 224)
    y, u, v = (yuv[:, 0] - low) / luma, (yuv[:, 1] - 128) / chroma, (yuv[:, 2] - 128) / chroma
    red, blue = y + 2 * (1 - of_red) * v, y + 2 * (1 - of_blue) * u
    expected = 255 * np.stack([red, (y - of_red * red - of_blue * blue) / (1 - of_red - of_blue), blue], axis=-1)
    raw, path = tmp_path / "clip.yuv", tmp_path / "clip.mp4"
    raw.write_bytes(yuv.T[:, None, :].repeat(16, 1).repeat(16, 2).astype(np.uint8).tobytes())
    source = ["-f", "rawvideo", "-pix_fmt", "yuv444p", "-s", "192x16", "-i", raw]
    tags = f"setparams=colorspace={name}:range={'pc' if full_range else 'tv'}"
    ffmpeg(*source, "-vf", tags, "-c:v", "libx264", "-qp", "0", path)
    assert np.abs(read_frames(path, [0])[0, 8, 8::16] - expected.clip(0, 255)).max() <= 2
    assert probe_video(path).corrections == ()
