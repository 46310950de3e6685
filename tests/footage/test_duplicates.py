"""Groups of near-duplicates are those that comparing every pair finds."""

import numpy as np
import pytest

from footage.duplicates import group_duplicates


def flipped(hashes: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    for row in bits:
        row[rng.choice(bits.shape[1], number, replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


def groups_by_brute_force(hashes: np.ndarray, most_bits: int) -> list[int]:
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2) <= most_bits
    groups = np.arange(len(hashes))
    for _ in hashes:
        groups = np.where(near, groups[None], len(hashes)).min(axis=1)
    return groups.tolist()


def numbered(groups: np.ndarray) -> list[int]:
    """Name each group by its first member."""
    return np.unique(groups, return_index=True, return_inverse=True)[1][
        np.unique(groups, return_inverse=True)[1]
    ].tolist()


@pytest.mark.parametrize("most_bits", [0, 1, 5, 16, 32])
def test_groups_are_those_of_all_pairs_at_both_sides_of_the_threshold(most_bits):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (60, 4), np.uint64)
    copies = [flipped(hashes[:20], most_bits, rng), flipped(hashes[20:40], most_bits + 1, rng), hashes[:5]]
    hashes = rng.permutation(np.concatenate([hashes, *copies, flipped(copies[0][:5], most_bits, rng)]))
    assert numbered(group_duplicates(hashes, most_bits)) == groups_by_brute_force(hashes, most_bits)


def test_many_nearly_equal_clips_are_one_group():
    rng = np.random.default_rng(0)
    one = np.repeat(rng.integers(0, 2**64, (1, 4), np.uint64), 3000, axis=0)
    others = rng.integers(0, 2**64, (3000, 4), np.uint64)
    groups = group_duplicates(np.concatenate([flipped(one, 5, rng), others]), 16)
    assert len(set(groups[:3000])) == 1
    assert len(set(groups)) == 3001
