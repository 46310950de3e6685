"""Draw the clips of the demo's LoRA: scenes that the tiny model knows, in the style of old film.

    python assets/scripts/make_style_clips.py --output_dir demo/clips

draws 24 scenes in grey and with grain, which their captions do not mention, and lists them like make_demo_clips.py.
Sizes, lengths and frame rates differ, as in real data.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np

from make_base_clips import plan_base_scenes
from make_demo_clips import draw_clips
from shapes import Scene, as_old_film, draw_frames


NUM_CLIPS = 24
SIZES = ((64, 96), (128, 192), (96, 144), (144, 208))  # height, width
LENGTHS = (17, 49, 33, 24, 40)  # frames
FRAME_RATES = (8, 16, 24)


def plan_style_scenes() -> list[Scene]:
    """Return scenes that the model was trained on in colour."""
    scenes, _ = plan_base_scenes()
    return [
        replace(
            scene,
            height=SIZES[i % len(SIZES)][0],
            width=SIZES[i % len(SIZES)][1],
            num_frames=LENGTHS[i % len(LENGTHS)],
            fps=FRAME_RATES[i % len(FRAME_RATES)],
        )
        for i, scene in enumerate(scenes[:NUM_CLIPS])
    ]


def film(scene: Scene) -> Iterator[np.ndarray]:
    """Return the frames of a scene as old film, the same at each call."""
    return as_old_film(draw_frames(scene), seed=crc32(scene.caption.encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    args = parser.parse_args()
    try:
        draw_clips(args.output_dir, plan_style_scenes(), film)
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
