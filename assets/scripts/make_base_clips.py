"""Draw the clips that the tiny model is trained on: every colour, shape, direction and background.

    python assets/scripts/make_base_clips.py --output_dir base/clips

draws 260 of the 288 scenes, listed as make_demo_clips.py does; the others are held out to measure the model.
"""

import argparse
import random
from itertools import product
from pathlib import Path

from make_demo_clips import draw_clips
from shapes import SHAPES, Scene


COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
BACKGROUNDS = ("white", "black", "grey", "light blue")
DIRECTIONS = {  # motion -> direction on the picture (x, y), y downwards
    "moves from left to right": (1, 0),
    "moves from right to left": (-1, 0),
    "falls from top to bottom": (0, 1),
    "rises from bottom to top": (0, -1),
}
HEIGHT, WIDTH, NUM_FRAMES, FPS = 64, 96, 17, 8
NUM_HELD_OUT = 28


def plan_base_scenes() -> tuple[list[Scene], list[Scene]]:
    """Return the scenes to train on and the held-out ones, always the same."""
    scenes = [
        Scene(shape, colour, background, motion, HEIGHT, WIDTH, NUM_FRAMES, FPS)
        for colour, shape, motion, background in product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)
    ]
    random.Random(0).shuffle(scenes)
    return scenes[NUM_HELD_OUT:], scenes[:NUM_HELD_OUT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    args = parser.parse_args()
    try:
        draw_clips(args.output_dir, plan_base_scenes()[0])
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
