"""Small clips of many encodings. Frames carry their number: eight vertical bars, one a bit, survive any encoder."""

import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


HEIGHT, WIDTH = 48, 80

X264_OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"}
X265_GROUPS = "keyint=12:min-keyint=12:scenecut=0:bframes=4:b-pyramid=1:pools=1:frame-threads=1:log-level=none"
ENCODINGS = {
    "single keyframe, B-frames": ("clip.mp4", {"x264-params": "keyint=infinite:scenecut=0:bframes=3"}),
    "no B-frames": ("clip.mp4", {"bf": "0", "g": "10"}),
    "closed groups": ("clip.mov", {"g": "12"}),
    "open groups": ("clip.mp4", X264_OPEN_GROUPS),
    "open groups, matroska": ("clip.mkv", X264_OPEN_GROUPS),
    "index in front": ("clip.mp4", {"movflags": "faststart", "g": "12"}),
    "fragmented": ("clip.mp4", {"movflags": "frag_keyframe+empty_moov", "g": "12"}),
    "matroska": ("clip.mkv", {"g": "12"}),
    "transport stream": ("clip.ts", {"g": "12"}),
    "odd size": ("clip.mp4", {"height": 47, "width": 79, "pixels": "yuv444p"}),
    "HEVC, closed groups": ("clip.mkv", {"codec": "libx265", "x265-params": f"open-gop=0:{X265_GROUPS}"}),
    "HEVC, open groups": ("clip.mp4", {"codec": "libx265", "x265-params": f"open-gop=1:{X265_GROUPS}"}),
    "MPEG-4 with B-frames": ("clip.mp4", {"codec": "mpeg4", "bf": "2", "g": "12"}),
    "AVI": ("clip.avi", {"codec": "mpeg4", "bf": "2", "g": "12"}),
    "VP8": ("clip.webm", {"codec": "libvpx", "deadline": "realtime", "cpu-used": "8"}),
    "VP9": ("clip.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8", "g": "12"}),
    "AV1": ("clip.mp4", {"codec": "libsvtav1", "preset": "12", "g": "12", "svtav1-params": "lp=1"}),
    "one frame": ("clip.mp4", {"frames": 1}),
}


def numbered_frame(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """An RGB frame, uint8 [H, W, 3], that shows a number below 256."""
    frame = np.full((height, width, 3), 128, np.uint8)  # a grey rim, so that odd sizes leave the bars alone
    for bit in range(8):
        frame[4:-4, 2 + bit * 9 : 11 + bit * 9] = 235 if number >> bit & 1 else 20
    return frame


def numbers_of(frames: np.ndarray) -> list[int]:
    """The number that each frame shows. [F, H, W, 3]."""
    bars = frames[:, 16:32, 4:76].mean(axis=(1, 3)).reshape(len(frames), 8, 9)[:, :, 2:7].mean(axis=2)
    return [sum(int(bar > 128) << bit for bit, bar in enumerate(row)) for row in bars]


def encode(
    path: Path,
    frames: int = 60,
    codec: str = "libx264",
    height: int = HEIGHT,
    width: int = WIDTH,
    pixels: str = "yuv420p",
    fps: Fraction | int = 25,
    times: Sequence[int] | None = None,
    **options: str,
) -> Path:
    """Write numbered frames with PyAV.

    Args:
        times: when each frame is shown, milliseconds; None: at the rate of `fps`.
        options: of the encoder, and `movflags`.
    """
    options = {"g": "250", "bf": "3", **options} if codec == "libx264" else options
    movflags = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", options=movflags) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.options = {key.replace("_", "-"): value for key, value in options.items()}
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(numbered_frame(number, height, width), format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def remuxed(clip: Path, path: Path, change: Callable[[av.Packet], None]) -> Path:
    with av.open(str(clip)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                change(packet)
                packet.stream = stream
                target.mux(packet)
    return path


def ffmpeg(*arguments: object) -> None:
    """Run imageio-ffmpeg's own binary, which knows things that PyAV does not offer."""
    import imageio_ffmpeg  # large, and missing on some machines with a GPU

    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-nostdin", *map(str, arguments)], check=True
    )


def all_frames(path: Path) -> np.ndarray:
    """The truth: every frame, as PyAV decodes them one after another."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def stream_copied_cut(clip: Path, path: Path) -> Path:
    """What `ffmpeg -ss` with `-c copy` makes: frames before the cut stay in the file, hidden by an edit list."""
    ffmpeg("-ss", "0.7", "-i", clip, "-t", "1", "-c", "copy", path)
    return path
