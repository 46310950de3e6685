"""Compare PyAV, as this toolkit reads clips with it, with decord: which frames they return, and their CPU time.

    PYTHONPATH=training python benchmarks/decoders.py    # a minute; prints the table of assets/docs/dataset.md

The truth is ffmpeg's own decoding of the complete clip, one frame after another. Each decoder is then asked for 49
frames spread over the clip, on one thread. A frame is wrong if another frame of the truth looks more like it.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from apart import run_apart

from video.io import read_frames
from video.probe import probe_video


HEIGHT, WIDTH, NUM_FRAMES, NUM_READ = 360, 640, 300, 49
X264 = "keyint={}:min-keyint=30:scenecut=0:bframes=3:b-adapt=0:open-gop={}"
CLIPS = {
    "H.264, closed groups": ("closed.mp4", ["-c:v", "libx264", "-x264-params", X264.format(30, 0)]),
    "H.264, one keyframe, B-frames": ("one.mp4", ["-c:v", "libx264", "-x264-params", X264.format("infinite", 0)]),
    "H.264, open groups": ("open.mp4", ["-c:v", "libx264", "-x264-params", X264.format(30, 1)]),
    "HEVC, open groups": (
        "hevc.mp4",
        ["-c:v", "libx265", "-x265-params", "keyint=30:scenecut=0:bframes=4:open-gop=1:log-level=none"],
    ),
    "H.264 in MPEG-TS": ("stream.ts", ["-c:v", "libx264", "-x264-params", X264.format(30, 0)]),
    "MPEG-4 with B-frames": ("part2.mp4", ["-c:v", "mpeg4", "-q:v", "4", "-bf", "2", "-g", "30"]),
    "MPEG-4 in AVI": ("part2.avi", ["-c:v", "mpeg4", "-q:v", "4", "-bf", "2", "-g", "30"]),
}
CUT = "H.264, stream-copied cut"  # what `ffmpeg -ss ... -c copy` writes: hidden frames before the cut
READERS = ("PyAV", "decord")


def main() -> None:
    """Make the clips, read them with both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="readings; the fastest counts (default: %(default)s)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in make_clips(Path(folder)).items():
            truth = decode_all(path)
            rows.append((name, {who: run_apart(judge, who, path, truth, args.repeats, seconds=60) for who in READERS}))
    print("\n".join(table(rows)))


def make_clips(folder: Path) -> dict[str, Path]:
    """Encode moving test pictures in each way; return the files by name."""
    pictures = ["-f", "lavfi", "-i", f"testsrc2=size={WIDTH}x{HEIGHT}:rate=25", "-frames:v", str(NUM_FRAMES)]
    clips = {name: folder / file for name, (file, _) in CLIPS.items()}
    for path, (_, options) in zip(clips.values(), CLIPS.values(), strict=True):
        ffmpeg(*pictures, *options, "-pix_fmt", "yuv420p", path)
    clips[CUT] = folder / "cut.mp4"
    ffmpeg("-ss", "1.7", "-i", clips["H.264, closed groups"], "-t", "8", "-c", "copy", clips[CUT])
    return clips


def ffmpeg(*arguments: object) -> bytes:
    """Run imageio-ffmpeg's binary; return what it writes to its output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def decode_all(path: Path) -> np.ndarray:
    """Return all frames as ffmpeg decodes them, uint8 [F, H, W, 3]."""
    pixels = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(pixels, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)


def judge(who: str, path: Path, truth: np.ndarray, repeats: int) -> dict[str, Any]:
    """Read frames spread over a clip; return how many are wrong, and the CPU seconds of the fastest reading."""
    indices = np.linspace(0, len(truth) - 1, NUM_READ).round().astype(int).tolist()
    read = reader(who, path)
    times = []
    for _ in range(repeats):
        started = time.process_time()
        frames = read(indices)
        times.append(time.process_time() - started)
    return {"wrong": count_wrong(frames, indices, truth), "seconds": min(times)}


def reader(who: str, path: Path) -> Callable[[list[int]], np.ndarray]:
    """Return a function that opens a clip and returns frames by their numbers."""
    if who == "PyAV":
        seekable = probe_video(path).seekable
        return lambda indices: read_frames(path, indices, num_threads=1, seekable=seekable)
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return lambda indices: decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()


def count_wrong(frames: np.ndarray, indices: list[int], truth: np.ndarray) -> int:
    """Return how many frames look more like another frame of the truth than like that of their number."""
    seen, small = (pictures[:, ::4, ::4].astype(np.float32) for pictures in (frames, truth))
    nearest = [int(np.abs(small - picture).mean(axis=(1, 2, 3)).argmin()) for picture in seen]
    return sum(found != index for found, index in zip(nearest, indices, strict=True))


def table(rows: list[tuple[str, dict[str, dict[str, Any]]]]) -> list[str]:
    """Return the lines of the table, with decord's CPU time in PyAV's."""
    lines = [f"| {NUM_READ} frames of | wrong: PyAV | wrong: decord | CPU time: decord / PyAV |", "|---|---|---|---|"]
    for name, results in rows:
        wrong = [str(results[who].get("wrong", results[who].get("failed"))) for who in READERS]
        pyav, decord = (results[who].get("seconds") for who in READERS)
        lines.append(f"| {name} | {' | '.join(wrong)} | {f'{decord / pyav:.1f}' if pyav and decord else ''} |")
    return lines


if __name__ == "__main__":
    main()
