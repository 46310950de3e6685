"""Masks are averaged over the pixels and the frames that the VAE encodes as one latent."""

import pytest
import torch

from data.buckets import Bucket
from models.encoding import encode_mask


@pytest.mark.parametrize(
    ("num_frames", "groups"),
    [(1, [[0]]), (4, [[0, 1, 2, 3]]), (8, [[0, 1, 2, 3], [4, 5, 6, 7]]), (9, [[0], [1, 2, 3, 4], [5, 6, 7, 8]])],
)
def test_a_mask_is_the_mean_of_the_pixels_and_frames_of_each_latent(num_frames, groups):
    frames = torch.randint(256, (num_frames, 1, 16, 24), generator=torch.Generator().manual_seed(0))
    mask = encode_mask(frames.expand(-1, 3, -1, -1).to(torch.uint8))
    assert mask.shape == Bucket(num_frames, 16, 24).latent_shape and mask.dtype == torch.float16
    for number, group in enumerate(groups):
        for row in range(2):
            for column in range(3):
                pixels = frames[group, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].double()
                assert mask[number, row, column].item() == pytest.approx(pixels.mean().item() / 255, abs=3e-4)
    assert torch.equal(encode_mask(torch.full((9, 3, 16, 24), 255, dtype=torch.uint8)), torch.ones(3, 2, 3).half())
