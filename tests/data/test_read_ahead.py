"""The files of coming batches are fetched before they are drawn, within the limit of the cache."""

import os
import threading
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from common.remote import RemotePath, at_hand, to_path
from data.buckets import Bucket
from data.read_ahead import ReadAhead, plan_blocks
from data.sampler import BucketBatchSampler, Draw


BUCKET = Bucket(17, 64, 96)
SIZE = 100_000
NUM_FILES = 12
LIMIT = 8 * SIZE


@pytest.fixture
def files(bucket, monkeypatch) -> list[RemotePath]:
    monkeypatch.setenv("COGVIDEOX_FACTORY_CACHE_LIMIT_GB", str(LIMIT / 1e9))
    for number in range(NUM_FILES):
        bucket.put(f"{number}.bin", os.urandom(SIZE))
    return [to_path(f"{bucket.url}/{number}.bin") for number in range(NUM_FILES)]


def batches_of(files: list[Path]) -> ReadAhead:
    """One file a batch, each for two batches."""
    batches = [[Draw(index, 0)] for index in range(len(files)) for _ in range(2)]
    return ReadAhead(batches, lambda draw: [files[draw.index]])


def test_files_are_fetched_in_order_once_each_within_the_limit(files, bucket, tmp_path):
    for number, (draw,) in enumerate(batches_of(files)):
        assert draw.index == number // 2
        with at_hand(files[draw.index]) as file:
            assert len(file.read_bytes()) == SIZE
        assert sum(one.stat().st_size for one in (tmp_path / "cache/fetched").glob("[!l]*/*.bin")) <= LIMIT
    assert bucket.fetched() == [file.name for file in files]


def test_the_thread_stays_ahead_by_a_quarter_of_the_cache_and_ends_with_the_loader(files, bucket):
    batches = iter(batches_of(files))
    next(batches)
    (reader,) = (thread for thread in threading.enumerate() if thread.name == "read-ahead")
    bucket.wait_for(4)  # two files are a quarter of the cache; one more is begun before that is known
    batches.close()
    reader.join(10)
    assert not reader.is_alive()
    assert bucket.fetched() == [file.name for file in files[:4]]


def test_a_file_that_cannot_be_fetched_is_left_to_its_reader(files, bucket):
    bucket.delete("1.bin")
    bucket.store.faults["2.bin"] = ["503"] * 4
    assert [draw.index for (draw,) in batches_of(files)] == [index for index in range(NUM_FILES) for _ in range(2)]


def test_files_on_disk_are_not_touched(tmp_path):
    assert len(list(batches_of([tmp_path / "no.mp4"] * 3))) == 6


def places(num_samples: int) -> np.ndarray:
    return np.arange(num_samples) / num_samples


def shards_of(num_samples: int, per_shard: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    files = np.arange(num_samples) // per_shard
    return files, np.full(files.max() + 1, size)


def test_data_larger_than_the_cache_is_drawn_in_blocks_each_shard_in_one_stretch_of_an_epoch():
    latents, latent_bytes = shards_of(6000, 100, 300)
    embeds, embed_bytes = shards_of(6000, 300, 200)
    most = 2000
    blocks = plan_blocks(places(6000), [latents, embeds], [latent_bytes, embed_bytes], most)
    for block in range(blocks.max() + 1):
        used = [set(files[blocks == block].tolist()) for files in (latents, embeds)]
        assert len(used[0]) * 300 + len(used[1]) * 200 <= most
    sampler = BucketBatchSampler([BUCKET] * 6000, 4, seed=1, blocks=blocks)
    sampler.total_batches = sampler.batches_per_epoch
    order = [draw.index for batch in sampler for draw in batch]
    assert sorted(order) == list(range(6000))
    stretches = [shard for shard, _ in groupby(blocks[order])]
    assert len(stretches) <= 2 * (blocks.max() + 1)  # a batch may have samples of two blocks
    assert stretches != sorted(stretches)
    in_first = latents[order[:300]]
    assert len(set(in_first.tolist())) > 3  # samples of a block are shuffled


def test_blocks_take_shards_of_all_buckets_from_the_same_part_of_the_list():
    rows = np.arange(4000)
    bucket, place = rows % 2, rows // 2
    latents = place // 100 + 20 * bucket  # each bucket has shards of its own
    blocks = plan_blocks(places(4000), [latents, rows // 200], [np.full(40, 100), np.full(20, 100)], 600)
    assert blocks.max() > 3
    assert all({*bucket[blocks == block]} == {0, 1} for block in range(blocks.max() + 1))


def test_data_that_the_cache_holds_and_data_on_disk_need_no_blocks():
    files, sizes = shards_of(100, 10, 10)
    assert plan_blocks(places(100), [files, files], [sizes, sizes], 100) is None
    on_disk = np.full(100, -1)
    joined = [np.concatenate([files, on_disk])] * 2
    blocks = plan_blocks(np.tile(places(100), 2), joined, [sizes, sizes], 40)
    assert {*blocks[100:]} == {*range(blocks.max() + 1)}  # they are spread over the epoch
