"""Measure how well videos of one shape follow their controls: the overlap of the shape with the control's silhouette.

    python assets/scripts/measure_control.py --videos control-demo/generated --controls control-demo/held-out/controls

reads the videos of generate.py --compare, of the base model and of the trained one, in the order of their controls.
The overlap is the intersection over the union (IoU) of both silhouettes in a frame: 1 for an exact video. The controls
may be clips. With --from_frame, the frames before it, which the model was given, are not compared. With --masked,
pixels are compared separately where the masks beside the clips are black (given) and white (masked).
"""

import argparse
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

from measure_model import DIFFERENT


def read_frames(file: Path) -> np.ndarray:
    """Return the frames of a video, [F, H, W, 3], int, RGB."""
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def silhouettes(file: Path) -> np.ndarray:
    """Return where a video differs from the colour of its border, [F, H, W], bool."""
    frames = read_frames(file)
    border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
    return np.abs(frames - np.median(border, axis=(0, 1))).sum(axis=-1) > DIFFERENT


def overlap(video: Path, control: Path, *, first: int = 0, masked: bool | None = None) -> float:
    """Return the mean IoU over the frames of a video and its control in which one of them shows the shape.

    Args:
        first: index of the first frame to compare; -1 for the last one only.
        masked: compare only where the mask beside the control is white, or only where it is black.
    """
    own, wanted = (silhouettes(file)[first:] for file in (video, control))
    if masked is not None:
        with Image.open(control.with_suffix(".mask.png")) as mask:
            part = (np.asarray(mask) > 127) == masked
        own, wanted = own & part, wanted & part
    unions = (own | wanted).sum(axis=(1, 2))
    return float(np.mean((own & wanted).sum(axis=(1, 2))[unions > 0] / unions[unions > 0]))


def measure(videos: Path, controls: Path, *, first: int = 0, masked: bool | None = None) -> dict[str, float]:
    """Return the mean overlap of the base model's videos and of the trained one's, and the number of videos."""
    wanted = sorted(controls.glob("*.mp4"))
    base = sorted(videos.glob("*-base.mp4"))
    trained = [file.with_name(file.name.replace("-base.mp4", ".mp4")) for file in base]
    overlaps = {
        name: [overlap(*pair, first=first, masked=masked) for pair in zip(files, wanted, strict=True)]
        for name, files in (("base", base), ("trained", trained))
    }
    return {name: round(float(np.mean(found)), 3) for name, found in overlaps.items()} | {"videos": len(base)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of the videos of generate.py --compare")
    parser.add_argument("--controls", type=Path, required=True, help="folder of their controls")
    parser.add_argument("--from_frame", type=int, default=0, help="the first to compare, from 0; -1: only the last")
    parser.add_argument("--masked", action="store_true", help="measure the given and the masked pixels separately")
    parser.add_argument("--output_file", type=Path, help="where to write the numbers, as JSON")
    args = parser.parse_args()
    if args.masked:
        parts = {"with the clip where it is given": False, "with the clip where it is masked": True}
    elif args.from_frame < 0:
        parts = {"of the last frame with the given one": None}
    else:
        parts = {f"after {args.from_frame} given frames" if args.from_frame else "with the control": None}
    measured = {}
    for part, masked in parts.items():
        found = measured[part] = measure(args.videos, args.controls, first=args.from_frame, masked=masked)
        print(f"overlap {part} (IoU) of {found['videos']} videos, 0 to 1:")
        print(f"  base model  {found['base']:.3f}")
        print(f"  trained     {found['trained']:.3f}")
    if args.output_file:
        args.output_file.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
