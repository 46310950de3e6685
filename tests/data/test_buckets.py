"""Buckets are made, assigned and measured as `data.buckets` documents."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.buckets import Bucket, assign_bucket, count_tokens, make_buckets


def test_buckets_are_every_combination_sorted_without_repeats():
    expected = [Bucket(9, 32, 64), Bucket(9, 48, 64), Bucket(17, 32, 64), Bucket(17, 48, 64)]
    assert make_buckets([17, 9, 9], [48, 32], [64]) == expected


def test_a_bucket_prints_as_frames_height_width():
    assert str(Bucket(49, 480, 720)) == "49x480x720"


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (720, 1280, (720, 1280)),
        (1080, 1920, (720, 1280)),  # the same ratio exactly, the rest is downscaling
        (1280, 720, (1280, 720)),
        (400, 720, (320, 576)),  # the same ratio exactly; 384x720 is off by 4%
        (272, 640, (256, 576)),  # 480x1024 is nearer in ratio, but would be upscaled
        (144, 176, (320, 384)),  # all are larger: nearest ratio
        (480, 720, (480, 720)),
    ],
)
def test_sizes_go_by_ratio_without_upscaling(height, width, expected):
    sides = [256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536]
    assert assign_bucket(49, height, width, make_buckets([49], sides, sides))[1:] == expected


def test_equal_ratios_go_by_area_and_equal_areas_by_height():
    assert assign_bucket(9, 500, 750, make_buckets([9], [320, 480], [480, 720]))[1:] == (480, 720)
    tall, wide = Bucket(9, 64, 32), Bucket(9, 32, 64)
    for order in ([tall, wide], [wide, tall]):
        assert assign_bucket(9, 48, 48, order) == wide  # both as far in ratio and in area


sides = st.integers(1, 40).map(lambda n: 16 * n)
bucket_lists = st.lists(st.builds(Bucket, st.sampled_from([1, 9, 17, 49]), sides, sides), min_size=1, max_size=12)


@given(sides, sides, bucket_lists, st.randoms())
def test_the_bucket_is_one_of_the_best_in_any_order(height, width, buckets, rng):
    frames = rng.choice(buckets).num_frames
    chosen = assign_bucket(frames, height, width, buckets)
    sizes = [b for b in buckets if b.num_frames == frames]
    downscaling = [b for b in sizes if b.height <= height and b.width <= width]
    assert chosen in (downscaling or sizes)
    distance = {b: abs(math.log(b.width / b.height) - math.log(width / height)) for b in downscaling or sizes}
    assert distance[chosen] <= min(distance.values()) + 1e-8
    assert assign_bucket(frames, height, width, rng.sample(buckets, len(buckets))) == chosen


def tokens_of(bucket, patch_size_t=None):
    return count_tokens({"patch_size": 2, "patch_size_t": patch_size_t, "max_text_seq_length": 226}, bucket)


def test_published_sizes_have_the_published_numbers_of_tokens():
    assert tokens_of(Bucket(49, 480, 720)) == 226 + 17550  # CogVideoX: 13 x 30 x 45
    assert tokens_of(Bucket(81, 768, 1360), patch_size_t=2) == 226 + 44880  # CogVideoX 1.5: 11 x 48 x 85
    assert tokens_of(Bucket(1, 480, 720)) == 226 + 1350


LATENT_FRAMES = {1: 1, 4: 1, 5: 2, 8: 2, 9: 3, 12: 3, 13: 4, 16: 4, 17: 5, 80: 20, 81: 21}


@pytest.mark.parametrize(("num_frames", "latent_frames"), LATENT_FRAMES.items())
def test_tokens_follow_the_latent_frames_padded_to_full_patches(num_frames, latent_frames):
    bucket = Bucket(num_frames, 32, 48)  # 2 x 3 patches per latent frame
    assert tokens_of(bucket) == 226 + 6 * latent_frames
    assert tokens_of(bucket, patch_size_t=2) == 226 + 6 * ((latent_frames + 1) // 2)
