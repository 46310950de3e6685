"""Draw samples whose files are in a store in an order that needs only a part of the files at a time."""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from common.remote import RemotePath, cache_limit
from prepared.index import PreparedIndex, read_note


class Files(NamedTuple):
    """The files of one kind that samples need."""

    numbers: np.ndarray  # [N], the file of each sample in a store, from 0; -1 for none in a store
    sizes: np.ndarray  # of each file, in bytes


def blocks_of(index: PreparedIndex) -> np.ndarray | None:
    """Return the blocks in which to draw prepared samples, as in `plan_blocks`: each takes a quarter of the cache."""
    if not any(isinstance(one.folder, RemotePath) for one in index.folders):
        return None
    places = [np.arange(one.table.num_rows) / one.table.num_rows for one in index.folders]
    latents, embeds = (_number_files(index, kind) for kind in ("latents", "prompt_embeds"))
    return plan_blocks(np.concatenate(places), latents, embeds, cache_limit() // 4)


def _number_files(index: PreparedIndex, kind: str) -> Files:
    numbers, sizes = [], []
    for one in index.folders:
        column = one.column(kind)
        codes = np.from_dlpack(column.indices)
        if not isinstance(one.folder, RemotePath):
            numbers.append(np.full(len(codes), -1))
            continue
        used, own = np.unique(codes, return_inverse=True)
        numbers.append(own + len(sizes))
        known = read_note(one.table, "bytes")
        names = column.dictionary.take(pa.array(used)).to_pylist()
        sizes += [known.get(name) or (one.folder / name).stat().st_size for name in names]
    return Files(np.concatenate(numbers), np.array(sizes))


def plan_blocks(places: np.ndarray, latents: Files, embeds: Files, most: int) -> np.ndarray | None:
    """Group samples that share files of a store, so that an epoch needs only a part of the files at a time.

    Args:
        places: of the samples in their data set, `[N]`, from 0 to 1.
        latents, embeds: their files; a file of latents stays in one block.
        most: bytes of the files of a block, unless one file needs more.

    Returns:
        The block of each sample, from 0, `[N]`; None if the files of all samples take at most twice `most`.
    """
    if latents.sizes.sum() + embeds.sizes.sum() <= 2 * most:
        return None
    shards, in_store = latents.numbers, latents.numbers >= 0
    # Each bucket and data set has files of its own: blocks take files from the same part of all lists.
    middles = np.bincount(shards[in_store], places[in_store]) / np.bincount(shards[in_store])
    partners = _partners(latents, embeds)
    blocks, block, held, size = np.zeros(len(middles), np.int64), 0, set(), 0
    for shard in np.argsort(middles, kind="stable").tolist():
        added = latents.sizes[shard] + embeds.sizes[list(partners[shard] - held)].sum()
        if size and size + added > most:
            block, held, size = block + 1, set(), 0
            added = latents.sizes[shard] + embeds.sizes[list(partners[shard])].sum()
        blocks[shard], size, held = block, size + added, held | partners[shard]
    return np.where(in_store, blocks[shards], (places * (block + 1)).astype(np.int64))


def _partners(latents: Files, embeds: Files) -> dict[int, set[int]]:
    """Return the files of embeddings that the samples of each file of latents need."""
    partners, count, in_store = defaultdict(set), len(embeds.sizes), latents.numbers >= 0
    for pair in np.unique(latents.numbers[in_store] * count + embeds.numbers[in_store]).tolist():
        partners[pair // count].add(pair % count)
    return partners
