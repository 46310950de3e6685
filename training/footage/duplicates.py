"""Find near-duplicates among clips by their perceptual hashes."""

from itertools import count

import numpy as np


def group_duplicates(hashes: np.ndarray, most_bits: int) -> np.ndarray:
    """Return the group of each clip, int [N]: clips of a group are connected by pairs that are nearly equal.

    Only clips that agree in one of `most_bits` + 1 parts of their bits are compared, and those of one group not again:
    two clips that differ in `most_bits` agree in at least one part. 100,000 clips take seconds.

    Args:
        hashes: uint64 [N, K], of K frames of each clip.
        most_bits: of the 64 K of two clips that may differ.
    """
    hashes, places = np.unique(hashes, axis=0, return_inverse=True)
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    groups = np.arange(len(hashes))
    for part in np.array_split(bits, most_bits + 1, axis=1) if most_bits else ():
        keys = np.unique(np.packbits(part, axis=1), axis=0, return_inverse=True)[1].ravel()
        is_complete = False
        while not is_complete:
            pairs, is_complete = _near_pairs(hashes, keys, groups, most_bits)
            groups = _join(groups, pairs)
    return groups[places.ravel()]


def _near_pairs(hashes: np.ndarray, keys: np.ndarray, groups: np.ndarray, most_bits: int) -> tuple[np.ndarray, bool]:
    """Return nearly equal pairs of one key and two groups, int [2, P], and whether these are all.

    It stops after N pairs, because they join groups, whose members then need not be compared.
    """
    order = np.lexsort((groups, keys))
    keys, groups = keys[order], groups[order]
    is_last = np.append((keys[1:] != keys[:-1]) | (groups[1:] != groups[:-1]), True)
    ends = np.flatnonzero(is_last) + 1
    starts = np.arange(len(keys))
    ends = ends[np.searchsorted(ends, starts, "right")]  # the place after those of the same key and group
    found, num_found = [], 0
    for shift in count():
        others = np.minimum(ends + shift, len(keys) - 1)
        in_run = (ends + shift < len(keys)) & (keys[others] == keys[starts])
        starts, ends, others = starts[in_run], ends[in_run], others[in_run]
        if not len(starts) or num_found > len(keys):
            return np.concatenate([np.empty((2, 0), int), *found], axis=1), not len(starts)
        pairs = order[np.stack([starts, others])]
        distances = np.bitwise_count(hashes[pairs[0]] ^ hashes[pairs[1]]).sum(axis=1)
        found.append(pairs[:, distances <= most_bits])
        num_found += found[-1].shape[1]


def _join(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the groups, int [N], after those of each pair, int [2, P], became one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = groups[pairs]
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(len(groups), len(groups)))
    return connected_components(graph, directed=False)[1][groups]
