"""Controls show the edges, the brightness or the coarse content of a frame."""

import numpy as np
import pytest

from video.controls import HIDDEN, INPAINT, KINDS, TILES, compute_control


@pytest.fixture
def frames() -> np.ndarray:
    """A red square on blue, which moves a pixel to the right."""
    frames = np.zeros((2, 48, 96, 3), np.uint8)
    frames[..., 2] = 200
    for number, frame in enumerate(frames):
        frame[12:36, 30 + number : 54 + number] = (220, 30, 10)
    return frames


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != INPAINT])
def test_every_kind_keeps_size_and_type(frames, kind):
    control = compute_control(frames, kind)
    assert (control.shape, control.dtype) == (frames.shape, np.uint8)


def test_canny_is_white_on_the_outline_of_the_square_and_black_elsewhere(frames):
    control = compute_control(frames, "canny")
    assert set(np.unique(control)) == {0, 255}
    for number, edges in enumerate(control[..., 0] > 0):
        rows, columns = np.nonzero(edges)
        assert abs(rows.min() - 12) <= 1 and abs(rows.max() - 35) <= 1
        assert abs(columns.min() - 30 - number) <= 1 and abs(columns.max() - 53 - number) <= 1
        assert not edges[16:32, 36:50].any()


def test_grey_is_the_luma_in_three_equal_channels(frames):
    control = compute_control(frames, "grey").astype(int)
    assert np.abs(control - (frames @ [0.299, 0.587, 0.114])[..., None]).max() < 1


def test_tiles_have_one_colour_each_the_mean_of_the_frame_there(frames):
    size = 48 // TILES
    tiles = compute_control(frames, "tile").reshape(2, TILES, size, 2 * TILES, size, 3)
    means = frames.reshape(tiles.shape).mean(axis=(2, 4), keepdims=True)
    assert np.abs(tiles - means).max() <= 1


def test_blur_keeps_the_mean_and_lowers_the_contrast_of_edges(frames):
    control = compute_control(frames, "blur").astype(int)
    assert abs(control.mean() - frames.mean()) < 1
    steepest = [np.abs(np.diff(one.astype(int), axis=2)).max() for one in (control, frames)]
    assert steepest[0] < 0.5 * steepest[1]


def test_an_inpainting_control_is_the_frame_with_grey_where_its_mask_is_white(frames):
    masks = np.zeros_like(frames)
    masks[0, :20], masks[1, :, 40:], masks[:, 40:] = 255, 250, 9  # a codec may darken white and lighten black
    control = compute_control(frames, INPAINT, masks)
    expected = frames.copy()
    expected[0, :20], expected[1, :40, 40:] = HIDDEN, HIDDEN
    assert np.array_equal(control, expected) and control.dtype == np.uint8
