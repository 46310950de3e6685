"""Measures have the values of their definitions on pictures that are made for it."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from footage import measures


def noise(height: int, width: int, cell: int = 8, seed: int = 0) -> np.ndarray:
    """Smooth grey noise, uint8 [H, W]."""
    cells = np.random.default_rng(seed).integers(0, 256, (height // cell, width // cell), np.uint8)
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("height", "width", "fps"), [(144, 256, 8), (144, 256, 25), (288, 512, 8), (192, 128, 30)])
def test_motion_is_the_speed_of_a_pan_whatever_the_size_and_rate(height, width, fps):
    pixels = 3 * max(height, width) // 256
    picture = noise(height, width + 8)
    pan = picture[None, :, :width], picture[None, :, pixels : width + pixels]
    speed = 100 * pixels * fps / np.hypot(height, width)
    assert measures.motion(*pan, [1 / fps]) == pytest.approx(speed, rel=0.1)


def test_motion_is_the_median_which_a_cut_does_not_change():
    moving, other = noise(144, 264), noise(144, 256, seed=1)
    before, after = moving[:, :256], moving[:, 3:259]
    measured = measures.motion(np.stack([before] * 3), np.stack([after, other, after]), [1 / 8] * 3)
    assert measured == pytest.approx(100 * 3 * 8 / np.hypot(144, 256), rel=0.1)


def test_still_counts_the_pairs_without_a_visible_change():
    picture = noise(144, 256)
    grainy = picture + np.random.default_rng(1).integers(-3, 4, picture.shape)
    moved = picture.copy()
    moved[60:80, 60:80] = 0  # a mouth that moves in a picture that stands still
    after = np.stack([picture, np.clip(grainy, 0, 255).astype(np.uint8), moved, noise(144, 256, seed=1)])
    assert measures.still(np.stack([picture] * 4), after) == 0.5


def test_sharpness_is_the_variance_of_the_laplacian():
    stripes = np.tile(np.array([0, 0, 100, 100], np.uint8), (32, 8))  # second derivatives: +100, -100 in turn
    assert measures.sharpness(stripes[None]) == pytest.approx(100**2, rel=0.1)
    picture = Image.fromarray(noise(144, 256))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(2)))
    assert measures.sharpness(blurred[None]) < measures.sharpness(np.asarray(picture)[None]) / 2


def test_light_is_counted_in_pixels_and_frames():
    frames = np.zeros((4, 10, 20), np.uint8)
    frames[1], frames[2, :5], frames[3] = 255, 128, 25
    assert measures.exposure(frames) == (255 + 64 + 25) / 4
    assert measures.clipping(frames) == (1 + 1 + 0.5 + 0) / 4
    assert measures.black(frames) == 0.5  # the first and the last
    frames[0, :3, 0] = 200  # 1.5% of the picture may be bright
    assert measures.black(frames) == 0.5


def test_luma_weighs_colours():
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    frames[0, 0, 0], frames[0, 0, 1], frames[0, 1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert measures.to_luma(frames)[0].tolist() == [[76, 150], [29, 0]]  # BT.601: 0.299, 0.587, 0.114


def test_the_perceptual_hash_survives_smaller_and_darker_pictures():
    picture = Image.fromarray(noise(144, 256, 16)).convert("RGB")
    variants = [picture.resize((128, 72)), picture.point(lambda value: value * 0.8), picture.rotate(180)]
    hashes = [measures.perceptual_hash(np.asarray(one)) for one in (picture, *variants)]
    smaller, darker, turned = ((hashes[0] ^ other).bit_count() for other in hashes[1:])
    assert max(smaller, darker) <= 4 < 20 < turned
    assert max(hashes) < 2**64
