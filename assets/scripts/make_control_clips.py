"""Draw clips of shapes that move anywhere, each with a control (its silhouette, white on black), a mask and its ends.

    python assets/scripts/make_control_clips.py --output_dir control-demo/clips --count 96
    python assets/scripts/make_control_clips.py --output_dir control-demo/held-out --count 12 --seed 1

The captions do not say where the shapes are, so that only the control tells it. videos.txt, prompts.txt, controls.txt
and masks.txt list the clips; ends/ has their first and last frames, and starts/ the first ones of --start_frames. The
masks are white over the middle half of the shape's way. The same seed draws the same clips.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from PIL import Image

from clip_files import new_folder, write_lists, write_mp4
from make_base_clips import BACKGROUNDS, COLOURS, DIRECTIONS, FPS, HEIGHT, NUM_FRAMES, WIDTH
from shapes import BACKGROUNDS as BACKGROUND_RGB
from shapes import COLOURS as RGB
from shapes import MOTIONS, SHAPES, draw_shape


Place = tuple[float, float, float]  # x, y and radius in pixels


def draw_place(rng: random.Random) -> Place:
    """Return a place where a shape is completely visible."""
    radius = rng.uniform(8, 14)
    return rng.uniform(radius, WIDTH - radius), rng.uniform(radius, HEIGHT - radius), radius


def draw_straight_way(rng: random.Random) -> tuple[Place, Place]:
    """Return both ends of a way of the base model's clips, shifted sideways by up to 8 pixels."""
    ends, shift = MOTIONS[rng.choice(tuple(DIRECTIONS))], rng.uniform(-8, 8)
    aside = [shift if one == other else 0 for one, other in zip(*ends, strict=True)]
    return tuple((x * WIDTH + aside[0], y * HEIGHT + aside[1], radius * HEIGHT) for x, y, radius in ends)


def draw_mask(start: Place, end: Place) -> Image.Image:
    """Return a mask that is white on a bar over the middle half of a way, along its longer direction."""
    axis = max((0, 1), key=lambda axis: abs(end[axis] - start[axis]))
    position = np.indices((HEIGHT, WIDTH))[1 - axis]
    is_hidden = abs(position - (start[axis] + end[axis]) / 2) < abs(end[axis] - start[axis]) / 4
    return Image.fromarray(is_hidden.astype(np.uint8) * 255)


def draw_controlled_clips(
    output_dir: Path, count: int, seed: int, start_frames: int = 0, *, straight: bool = False
) -> None:
    """Draw clips that move on straight lines, and their controls; raise FileExistsError if the folder holds anything.

    Args:
        start_frames: how many first frames of each clip to write to starts/.
        straight: move only left, right, up and down, as in the clips of the base model, at their speeds.
    """
    rng, entries = random.Random(seed), []
    with new_folder(output_dir) as folder:
        for name in ("videos", "controls", "ends", *(["starts"] if start_frames else [])):
            (folder / name).mkdir()
        for number in range(count):
            shape, colour, background = rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(BACKGROUNDS)
            start, end = draw_straight_way(rng) if straight else (draw_place(rng), draw_place(rng))
            shares = [index / (NUM_FRAMES - 1) for index in range(NUM_FRAMES)]
            places = [tuple(a + (b - a) * share for a, b in zip(start, end, strict=True)) for share in shares]
            for kind, colours in (
                ("videos", (RGB[colour], BACKGROUND_RGB[background])),
                ("controls", ((255, 255, 255), (0, 0, 0))),
            ):
                frames = [draw_shape(shape, *colours, place, HEIGHT, WIDTH) for place in places]
                if kind == "videos":
                    for name, frame in (("first", frames[0]), ("last", frames[-1])):
                        Image.fromarray(frame).save(folder / f"ends/clip-{number:03d}-{name}.png")
                    if start_frames:
                        write_mp4(folder / f"starts/clip-{number:03d}.mp4", frames[:start_frames], FPS)
                write_mp4(folder / kind / f"clip-{number:03d}.mp4", frames, FPS)
            draw_mask(start, end).save(folder / f"videos/clip-{number:03d}.mask.png")
            article = "an" if colour == "orange" else "a"
            caption = f"{article} {colour} {shape} moves over a plain {background} background"
            entries.append((f"videos/clip-{number:03d}.mp4", caption))
        write_lists(folder, entries)
        for name, old, new in (("controls", "videos", "controls"), ("masks", ".mp4", ".mask.png")):
            lines = "".join(f"{video.replace(old, new)}\n" for video, _ in entries)
            (folder / f"{name}.txt").write_text(lines, encoding="utf-8")
    print(f"{output_dir}: drew {count} clips with controls")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start_frames", type=int, default=0, help="also write the first frames of each clip")
    parser.add_argument("--straight", action="store_true", help="move only left, right, up or down, at one speed")
    args = parser.parse_args()
    try:
        draw_controlled_clips(args.output_dir, args.count, args.seed, args.start_frames, straight=args.straight)
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
