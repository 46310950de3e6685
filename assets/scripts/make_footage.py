"""Draw films of many scenes with cuts at known frames, to try split_scenes.py and to measure how well it finds cuts.

    python assets/scripts/make_footage.py --output_dir demo/footage --films 2 --minutes 1

writes film-00.mp4 and so on, and scenes.csv with the first frame, end, kind and caption of every scene. Between scenes
are hard cuts. Within scenes, nothing is a cut: the camera pans and shapes move, slowly or fast, and some scenes fade
to black and back, or have a light that changes.
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clip_files import new_folder, write_mp4
from shapes import COLOURS, SHAPES


FPS = 24
SIZE = HEIGHT, WIDTH = 112, 192
KINDS = {"calm": 0.5, "fast": 0.25, "fade": 0.15, "light": 0.1}  # with their shares of all scenes
SECONDS = (1.5, 9.0)  # of a scene
SPEEDS = {"fast": (6.0, 14.0)}  # pixels a frame, of the camera and of shapes; of other kinds up to 2
BACKGROUNDS = {"sandy": (214, 186, 140), "grassy": (92, 150, 70), "misty": (186, 196, 204), "rocky": (120, 110, 104)}
BACKGROUNDS |= {"icy": (190, 224, 240), "rusty": (150, 84, 50), "deep blue": (40, 60, 120)}


@dataclass(frozen=True)
class Shot:
    """A scene of a film."""

    start: int  # its first frame in the film
    end: int
    kind: str
    caption: str
    seed: int
    background: str
    shapes: tuple[tuple[str, str], ...]  # shape and colour of each


def plan_film(num_frames: int, seed: int) -> list[Shot]:
    """Choose the scenes of a film. No scene has the background of the one before."""
    rng = np.random.default_rng(seed)
    shots, start, before = [], 0, None
    while start < num_frames:
        end = start + int(rng.uniform(*SECONDS) * FPS)
        end = num_frames if num_frames - end < SECONDS[0] * FPS else end
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        before = str(rng.choice([name for name in BACKGROUNDS if name != before]))
        shapes = tuple(
            (str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))) for _ in range(int(rng.integers(1, 4)))
        )
        things = " and ".join(f"a {colour} {shape}" for shape, colour in shapes)
        how = {"fast": "at high speed ", "fade": "in a picture that fades out and in ", "light": "in changing light "}
        caption = f"{things} moving {how.get(kind, '')}over {before} ground".replace("a orange", "an orange")
        shots.append(Shot(start, end, kind, caption, int(rng.integers(2**31)), before, shapes))
        start = end
    return shots


def draw_shot(shot: Shot) -> Iterator[np.ndarray]:
    """Draw the frames of a scene: each uint8 [HEIGHT, WIDTH, 3], RGB."""
    rng = np.random.default_rng(shot.seed)
    count = shot.end - shot.start
    ground = _ground(BACKGROUNDS[shot.background], rng)
    low, high = SPEEDS.get(shot.kind, (0.2, 2.0))
    velocity = _velocity(rng, low, high)
    movers = [
        (shape, COLOURS[colour], rng.uniform(0, SIZE[::-1]), _velocity(rng, low, high), rng.uniform(10, 26))
        for shape, colour in shot.shapes
    ]
    begin, length = rng.uniform(0.2, 0.4), rng.uniform(0.25, 0.5)  # of the fade, as shares of the scene
    for index in range(count):
        shift = np.round(velocity * index).astype(int)
        picture = Image.fromarray(np.roll(ground, shift, axis=(1, 0))[:HEIGHT, :WIDTH])
        draw = ImageDraw.Draw(picture)
        for shape, colour, place, speed, radius in movers:
            x, y = _bounced(place + speed * index, radius)
            _draw(draw, shape, colour, x, y, radius)
        frame = np.asarray(picture)
        progress = index / count
        if shot.kind == "fade":
            dip = 1 - np.clip(1 - abs(progress - begin - length / 2) / (length / 2), 0, 1)
            frame = (frame * dip).astype(np.uint8)
        elif shot.kind == "light":
            frame = (frame * (0.65 + 0.35 * np.cos(2 * np.pi * progress))).astype(np.uint8)
        yield frame


def _ground(colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Return a mottled surface, twice the size of a frame, that continues at its edges."""
    coarse = rng.normal(0, 34, (2 * HEIGHT // 16, 2 * WIDTH // 16))
    wrapped = np.pad(coarse, 2, mode="wrap")
    smooth = Image.fromarray(wrapped.astype(np.float32)).resize((2 * WIDTH + 64, 2 * HEIGHT + 64), Image.BICUBIC)
    mottled = np.asarray(smooth)[32:-32, 32:-32, None] + np.array(colour)
    return mottled.clip(0, 255).astype(np.uint8)


def _velocity(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return rng.uniform(low, high) * np.array([np.cos(angle), np.sin(angle)])


def _bounced(place: np.ndarray, radius: float) -> np.ndarray:
    """Return the place of something that bounces between the edges of the picture."""
    room = np.array([WIDTH, HEIGHT]) - radius
    return radius / 2 + np.abs((place + room) % (2 * room) - room)


def _draw(draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: float, y: float, r: float) -> None:
    if shape == "triangle":
        draw.polygon([(x, y - r), (x - 0.9 * r, y + r / 2), (x + 0.9 * r, y + r / 2)], fill=colour)
    else:
        (draw.ellipse if shape == "circle" else draw.rectangle)((x - r, y - r, x + r, y + r), fill=colour)


def make_footage(output_dir: Path, films: int, minutes: float, seed: int = 0) -> dict[str, list[Shot]]:
    """Write the films and scenes.csv; return the scenes of each film by its file name.

    Raises:
        FileExistsError: if `output_dir` holds anything.
    """
    planned = {f"film-{n:02d}.mp4": plan_film(round(minutes * 60 * FPS), seed + n) for n in range(films)}
    with new_folder(Path(output_dir)) as folder:
        for name, shots in planned.items():
            write_mp4(folder / name, (frame for shot in shots for frame in draw_shot(shot)), FPS)
        with open(folder / "scenes.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("film", "start", "end", "kind", "caption"))
            table.writerows(
                (name, shot.start, shot.end, shot.kind, shot.caption)
                for name, shots in planned.items()
                for shot in shots
            )
    return planned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    parser.add_argument("--films", type=int, default=2, help="number of films (default: 2)")
    parser.add_argument("--minutes", type=float, default=1, help="minutes of each (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first film; each has its own (default: 0)")
    args = parser.parse_args()
    try:
        planned = make_footage(args.output_dir, args.films, args.minutes, args.seed)
    except FileExistsError as error:
        parser.error(str(error))
    scenes = sum(map(len, planned.values()))
    print(f"{args.output_dir}: {len(planned)} films of {args.minutes:g} minutes, {scenes - len(planned)} cuts")


if __name__ == "__main__":
    main()
