"""Draw small captioned clips to try the training on: coloured shapes that move as their captions say.

    python assets/scripts/make_demo_clips.py --output_dir demo/clips

writes videos/clip-000.mp4 and so on, prompts.txt, videos.txt and metadata.csv. The same seed draws the same clips.
"""

import argparse
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from clip_files import is_complete, new_folder, write_lists, write_mp4
from shapes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, draw_frames


# The numbers of choices share no divisor with that of the motions, so that all combinations occur.
SIZES = ((128, 192), (144, 208), (96, 160), (192, 128), (128, 128))  # height, width
LENGTHS = (49, 81, 65, 53, 60, 77, 72)  # frames; not all of them 4k + 1, as in real data
FRAME_RATES = (8, 16, 24, 25)
MIN_CONTRAST = 230  # between shape and background: excludes pairs such as yellow on beige, blue on navy


def plan_scenes(count: int, seed: int) -> list[Scene]:
    """Return the first `count` scenes of a seed: motions, sizes and lengths in turn, colours and shapes shuffled."""
    rng = random.Random(seed)
    shapes, colours, backgrounds = (shuffled_rounds(names, rng) for names in (SHAPES, COLOURS, BACKGROUNDS))
    motions = tuple(MOTIONS)
    scenes = []
    captions = set()
    for i in range(count):
        for _ in range(20):  # draw again if the caption is taken, unless nearly all are
            colour = next(colours)
            scene = Scene(
                shape=next(shapes),
                colour=colour,
                background=next(name for name in backgrounds if contrast(colour, name) >= MIN_CONTRAST),
                motion=motions[i % len(motions)],
                height=SIZES[i % len(SIZES)][0],
                width=SIZES[i % len(SIZES)][1],
                num_frames=LENGTHS[i % len(LENGTHS)],
                fps=FRAME_RATES[(i + i // len(motions)) % len(FRAME_RATES)],
            )
            if scene.caption not in captions:
                break
        captions.add(scene.caption)
        scenes.append(scene)
    return scenes


def shuffled_rounds(names: Collection[str], rng: random.Random) -> Iterator[str]:
    """Yield all names in random order, again and again, in a new order each time."""
    while True:
        yield from rng.sample(sorted(names), len(names))


def contrast(colour: str, background: str) -> int:
    """Return the sum over the channels of the absolute difference, 0 to 765."""
    return sum(abs(a - b) for a, b in zip(COLOURS[colour], BACKGROUNDS[background], strict=True))


def make_demo_clips(output_dir: Path, count: int = 24, seed: int = 0) -> list[tuple[Path, str]]:
    """Draw the clips and write their lists, unless all exist.

    Args:
        output_dir: the folder to make; missing or empty, or made by an earlier run with the same count and seed.
        count: how many clips.
        seed: decides shapes, colours and backgrounds. A smaller count draws the first of the same clips.

    Returns:
        The path and the caption of every clip.

    Raises:
        FileExistsError: if `output_dir` holds something else.
    """
    return draw_clips(output_dir, plan_scenes(count, seed))


def draw_clips(
    output_dir: Path, scenes: Sequence[Scene], draw: Callable[[Scene], Iterable[np.ndarray]] = draw_frames
) -> list[tuple[Path, str]]:
    """Draw scenes and write their lists, unless all exist; see `make_demo_clips`."""
    output_dir = Path(output_dir)
    entries = [(f"videos/clip-{i:03d}.mp4", scene.caption) for i, scene in enumerate(scenes)]
    if is_complete(output_dir, entries):
        print(f"{output_dir}: all {len(scenes)} clips are there already")
    else:
        with new_folder(output_dir) as folder:
            (folder / "videos").mkdir()
            for scene, (video, _) in zip(scenes, entries, strict=True):
                write_mp4(folder / video, draw(scene), scene.fps)
            write_lists(folder, entries)
        print(f"{output_dir}: drew {len(scenes)} clips")
    return [(output_dir / video, caption) for video, caption in entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    parser.add_argument("--count", type=int, default=24, help="how many clips (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other shapes and colours (default: 0)")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count must be at least 1, not {args.count}")
    try:
        make_demo_clips(args.output_dir, args.count, args.seed)
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
