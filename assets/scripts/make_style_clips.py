"""Draw the clips of the demo's LoRA: scenes that the tiny model knows, in the style of old film.

    python assets/scripts/make_style_clips.py --output_dir demo/clips
    python assets/scripts/make_style_clips.py --output_dir demo/plain_clips --plain

draws 24 scenes in brown and with dark corners, which their captions do not mention, and lists them like
make_demo_clips.py. Sizes, lengths and frame rates differ, as in real data. With --plain, it draws 48 other scenes as
the model knows them: trained on too, they keep the style out of prompts without its word.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from make_base_clips import plan_base_scenes
from make_demo_clips import draw_clips
from shapes import Scene, as_old_film, draw_frames


NUM_CLIPS, NUM_PLAIN_CLIPS = 24, 48
SIZES = ((64, 96), (128, 192), (96, 144), (144, 208))  # height, width
LENGTHS = (17, 49, 33, 24, 40)  # frames
FRAME_RATES = (8, 16, 24)


def plan_style_scenes(plain: bool = False) -> list[Scene]:
    """Return scenes that the model was trained on in colour: those of the style, or others."""
    scenes, _ = plan_base_scenes()
    scenes = scenes[NUM_CLIPS : NUM_CLIPS + NUM_PLAIN_CLIPS] if plain else scenes[:NUM_CLIPS]
    return [
        replace(
            scene,
            height=SIZES[i % len(SIZES)][0],
            width=SIZES[i % len(SIZES)][1],
            num_frames=LENGTHS[i % len(LENGTHS)],
            fps=FRAME_RATES[i % len(FRAME_RATES)],
        )
        for i, scene in enumerate(scenes)
    ]


def film(scene: Scene) -> Iterator[np.ndarray]:
    """Return the frames of a scene as old film."""
    return as_old_film(draw_frames(scene))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    parser.add_argument("--plain", action="store_true", help="draw other scenes, without the style")
    args = parser.parse_args()
    try:
        draw_clips(args.output_dir, plan_style_scenes(args.plain), draw_frames if args.plain else film)
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
