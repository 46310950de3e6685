"""Measure how well videos of one shape follow their controls: the overlap of the shape with the control's silhouette.

    python assets/scripts/measure_control.py --videos control-demo/generated --controls control-demo/held-out/controls

reads the videos of generate.py --compare, of the base model and of the trained one, in the order of their controls.
The overlap is the intersection over the union (IoU) of both silhouettes in a frame: 1 for an exact video. With
--last_frame, and clips as controls, only the last frames are compared.
"""

import argparse
import json
from pathlib import Path

import av
import numpy as np

from measure_model import DIFFERENT


def silhouettes(file: Path) -> np.ndarray:
    """Return where a video differs from the colour of its border, [F, H, W], bool."""
    with av.open(str(file)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)
    border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
    return np.abs(frames - np.median(border, axis=(0, 1))).sum(axis=-1) > DIFFERENT


def overlap(video: Path, control: Path, *, last_frame: bool = False) -> float:
    """Return the mean IoU over all frames of a video and its control, or that of the last one."""
    own, wanted = (silhouettes(file)[-1 if last_frame else 0 :] for file in (video, control))
    unions = (own | wanted).sum(axis=(1, 2))
    return float(np.mean((own & wanted).sum(axis=(1, 2)) / np.maximum(unions, 1)))


def measure(videos: Path, controls: Path, *, last_frame: bool = False) -> dict[str, float]:
    """Return the mean IoU of the base model's videos and of the trained one's, and the number of videos."""
    wanted = sorted(controls.glob("*.mp4"))
    base = sorted(videos.glob("*-base.mp4"))
    trained = [file.with_name(file.name.replace("-base.mp4", ".mp4")) for file in base]
    means = {
        name: round(
            float(np.mean([overlap(*pair, last_frame=last_frame) for pair in zip(files, wanted, strict=True)])), 3
        )
        for name, files in (("base", base), ("trained", trained))
    }
    return means | {"videos": len(base)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of the videos of generate.py --compare")
    parser.add_argument("--controls", type=Path, required=True, help="folder of their controls")
    parser.add_argument("--last_frame", action="store_true", help="compare only the last frames")
    parser.add_argument("--output_file", type=Path, help="where to write the numbers, as JSON")
    args = parser.parse_args()
    measured = measure(args.videos, args.controls, last_frame=args.last_frame)
    what = "of the last frame with the given one" if args.last_frame else "with the control"
    print(f"overlap {what} (IoU) of {measured['videos']} videos, 0 to 1:")
    print(f"  base model  {measured['base']:.3f}")
    print(f"  trained     {measured['trained']:.3f}")
    if args.output_file:
        args.output_file.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
