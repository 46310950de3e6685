"""Coloured shapes that move over plain backgrounds as their captions say: their scenes and their drawing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw


SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 30),
    "green": (40, 160, 60),
    "blue": (40, 80, 230),
    "purple": (140, 40, 160),
    "pink": (250, 150, 190),
}
BACKGROUNDS = {
    "white": (252, 252, 252),
    "black": (15, 15, 15),
    "grey": (128, 128, 128),
    "beige": (240, 228, 195),
    "light blue": (170, 215, 235),
    "dark green": (10, 70, 25),
    "navy blue": (15, 20, 95),
}
# Motion -> (x, y, radius) in the first and in the last frame; x and y as fractions of the width and
# height, the radius as a fraction of the shorter side.
MOTIONS = {
    "moves from left to right": ((0.2, 0.5, 0.18), (0.8, 0.5, 0.18)),
    "falls from top to bottom": ((0.5, 0.2, 0.18), (0.5, 0.8, 0.18)),
    "grows in the middle": ((0.5, 0.5, 0.1), (0.5, 0.5, 0.38)),
    "moves from right to left": ((0.8, 0.5, 0.18), (0.2, 0.5, 0.18)),
    "rises from bottom to top": ((0.5, 0.8, 0.18), (0.5, 0.2, 0.18)),
    "shrinks in the middle": ((0.5, 0.5, 0.38), (0.5, 0.5, 0.1)),
    "moves from the top left to the bottom right": ((0.2, 0.2, 0.15), (0.8, 0.8, 0.15)),
    "moves from the bottom left to the top right": ((0.2, 0.8, 0.15), (0.8, 0.2, 0.15)),
}
SUPERSAMPLING = 4  # draw this much larger, then average: antialiasing, and motion by quarters of a pixel
LUMA = np.array([0.299, 0.587, 0.114])  # BT.601
SEPIA = np.array([1.0, 0.84, 0.62])  # R, G, B of white
CORNERS = 0.25  # how bright the corners of old film are; the middle is 1


@dataclass(frozen=True)
class Scene:
    """The content and the caption of one clip."""

    shape: str
    colour: str
    background: str
    motion: str  # a key of MOTIONS
    height: int
    width: int
    num_frames: int
    fps: int

    @property
    def caption(self) -> str:
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape} {self.motion} over a plain {self.background} background"


def draw_shape(
    shape: str,
    colour: tuple[int, int, int],
    background: tuple[int, int, int],
    place: tuple[float, float, float],
    height: int,
    width: int,
) -> np.ndarray:
    """Draw one shape.

    Args:
        shape: one of SHAPES.
        colour, background: R, G, B, each 0 to 255.
        place: x, y and radius in pixels; the shape may be partly or completely outside.

    Returns:
        [H, W, 3], uint8, RGB.
    """
    x, y, radius = (SUPERSAMPLING * value for value in place)
    image = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), background)
    draw = ImageDraw.Draw(image)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:  # upright, its centre of gravity at (x, y)
        corners = ((x, y - radius), (x - 0.9 * radius, y + radius / 2), (x + 0.9 * radius, y + radius / 2))
        draw.polygon(corners, fill=colour)
    return np.asarray(image.reduce(SUPERSAMPLING))


def draw_frame(scene: Scene, index: int) -> np.ndarray:
    """Draw frame `index` of a scene: [H, W, 3], uint8, RGB."""
    progress = index / (scene.num_frames - 1)
    start, end = MOTIONS[scene.motion]
    x, y, radius = (a + (b - a) * progress for a, b in zip(start, end, strict=True))
    place = (x * scene.width, y * scene.height, radius * min(scene.height, scene.width))
    colours = (COLOURS[scene.colour], BACKGROUNDS[scene.background])
    return draw_shape(scene.shape, *colours, place, scene.height, scene.width)


def draw_frames(scene: Scene) -> Iterator[np.ndarray]:
    """Draw all frames of a scene in order."""
    return (draw_frame(scene, index) for index in range(scene.num_frames))


def as_old_film(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Turn frames brown and their corners dark: [H, W, 3], uint8."""
    for frame in frames:
        y, x = (np.linspace(-1, 1, size) for size in frame.shape[:2])
        light = 1 - (1 - CORNERS) * (x**2 + y[:, None] ** 2) / 2
        yield ((frame @ LUMA * light)[..., None] * SEPIA).round().astype(np.uint8)
