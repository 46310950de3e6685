"""Samples are drawn in blocks that the cache can hold."""

import json
from itertools import groupby
from pathlib import Path

import numpy as np

from common.remote import to_path
from data.buckets import Bucket
from data.sampler import BucketBatchSampler
from planning.blocks import Files, blocks_of, plan_blocks
from prepared.index import IndexedFolder, PreparedIndex, make_table


BUCKET = Bucket(17, 64, 96)


def places(num_samples: int) -> np.ndarray:
    return np.arange(num_samples) / num_samples


def shards_of(num_samples: int, per_shard: int, size: int) -> Files:
    files = np.arange(num_samples) // per_shard
    return Files(files, np.full(files.max() + 1, size))


def test_data_larger_than_the_cache_is_drawn_in_blocks_each_shard_in_one_stretch_of_an_epoch():
    latents, embeds = shards_of(6000, 100, 300), shards_of(6000, 300, 200)
    most = 2000
    blocks = plan_blocks(places(6000), latents, embeds, most)
    for block in range(blocks.max() + 1):
        used = [set(files[blocks == block].tolist()) for files, _ in (latents, embeds)]
        assert len(used[0]) * 300 + len(used[1]) * 200 <= most
    sampler = BucketBatchSampler([BUCKET] * 6000, 4, seed=1, blocks=blocks)
    sampler.total_batches = sampler.batches_per_epoch
    order = [draw.index for batch in sampler for draw in batch]
    assert sorted(order) == list(range(6000))
    stretches = [shard for shard, _ in groupby(blocks[order])]
    assert len(stretches) <= 2 * (blocks.max() + 1)  # a batch may have samples of two blocks
    assert stretches != sorted(stretches)
    in_first = latents.numbers[order[:300]]
    assert len(set(in_first.tolist())) > 3  # samples of a block are shuffled


def test_blocks_take_shards_of_all_buckets_from_the_same_part_of_the_list():
    rows = np.arange(4000)
    bucket, place = rows % 2, rows // 2
    latents = place // 100 + 20 * bucket  # each bucket has shards of its own
    blocks = plan_blocks(places(4000), Files(latents, np.full(40, 100)), shards_of(4000, 200, 100), 600)
    assert blocks.max() > 3
    assert all({*bucket[blocks == block]} == {0, 1} for block in range(blocks.max() + 1))


def test_data_that_the_cache_holds_and_data_on_disk_need_no_blocks():
    files = shards_of(100, 10, 10)
    assert plan_blocks(places(100), files, files, 100) is None
    joined = Files(np.concatenate([files.numbers, np.full(100, -1)]), files.sizes)
    blocks = plan_blocks(np.tile(places(100), 2), joined, joined, 40)
    assert {*blocks[100:]} == {*range(blocks.max() + 1)}  # they are spread over the epoch


def index_of(folder: Path, num_samples: int, per_shard: int) -> IndexedFolder:
    """A prepared folder of shards of a megabyte, which need not exist."""
    places = [(row // per_shard, row // 50) for row in range(num_samples)]
    shards = [(f"latents/{one}.safetensors", f"prompt_embeds/{other}.safetensors") for one, other in places]
    facts = {"image_latents": None, "caption_key": "key", "num_frames": 17, "height": 64, "width": 96, "repeats": 1.0}
    table = make_table(
        {"name": f"{row}", "latents": a, "prompt_embeds": b} | facts for row, (a, b) in enumerate(shards)
    )
    known = {name: 10**6 for pair in shards for name in pair}
    return IndexedFolder(folder, table.replace_schema_metadata({"bytes": json.dumps(known)}))


def test_only_prepared_data_in_stores_that_the_cache_cannot_hold_is_drawn_in_blocks(monkeypatch, tmp_path):
    monkeypatch.setenv("COGVIDEOX_FACTORY_CACHE_LIMIT_GB", "0.02")  # 5 shards a block
    on_disk, small, large = (
        index_of(folder, count, 10)
        for folder, count in ((tmp_path, 1000), (to_path("s3://b/small"), 50), (to_path("s3://b/large"), 1000))
    )
    assert blocks_of(PreparedIndex([on_disk])) is None
    assert blocks_of(PreparedIndex([small])) is None
    blocks = blocks_of(PreparedIndex([large, on_disk]))
    assert len(blocks) == 2000 and blocks.max() > 20
    shards = np.arange(1000) // 10
    assert all(len(set(blocks[:1000][shards == shard].tolist())) == 1 for shard in range(100))
