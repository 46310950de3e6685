"""The flags of split_scenes.py."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import AnyPath, FolderPath, NonNegativeInt, PositiveFloat, PositiveInt


# Detectors of PySceneDetect, each with its threshold; 3, its own for adaptive, misses cuts between fast scenes.
DETECTORS = {"adaptive": 2.5, "content": 27.0}
CLIPS_TABLE = "clips.csv"


@dataclass(frozen=True)
class FootageFlags:
    """The footage, and where its clips go."""

    data_root: AnyPath | None = flag(None, "Required. Folder of footage, with its subfolders, or one video.")
    output_dir: FolderPath | None = flag(
        None, f"Required. Folder of the clips, their table {CLIPS_TABLE} and contact sheets; outside --data_root."
    )
    on_bad_clip: str = flag(
        "error",
        "For footage that cannot be read: error lists all of it and stops; skip lists it in skipped_clips.csv.",
        choices=("error", "skip"),
    )
    num_workers: PositiveInt = flag(1, "Processes, each with a file at a time; they share the CPU cores.")


@dataclass(frozen=True)
class SceneFlags:
    """How footage becomes clips: fixed for an output folder."""

    detector: str = flag(
        "adaptive",
        "How cuts are found: content compares neighboring frames, adaptive compares their difference with that of the "
        "frames around them, which ignores fast motion.",
        choices=tuple(DETECTORS),
    )
    threshold: PositiveFloat | None = flag(
        None,
        "Difference from which a frame begins another scene; lower it if cuts are missed. content: mean difference of "
        "hue, saturation and value, up to 255. adaptive: multiple of the mean difference of the frames around it.",
        shown=", ".join(f"{name} {value:g}" for name, value in DETECTORS.items()),
    )
    min_seconds: PositiveFloat = flag(
        2.5,
        "Skip shorter scenes. At the models' 8 frames per second, 17 frames are 2.1 seconds and 49 are 6.1.",
        metavar="S",
    )
    max_seconds: PositiveFloat = flag(
        10.0, "Split longer scenes into equal parts of at most this length; at least twice --min_seconds.", metavar="S"
    )
    margin_frames: NonNegativeInt = flag(
        2, "Frames to drop on both sides of every cut, where films are often blended or blurred."
    )
    crop_bars: bool = flag(False, "Crop black bars: rows and columns at the edges that are black in all of a scene.")
    list: bool = flag(
        False,
        f"Write no clips: {CLIPS_TABLE} lists the frames of each in its file, for --dataset_file. Saves disk space, "
        "but reading a clip takes longer.",
    )
