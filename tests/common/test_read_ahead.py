"""The files of coming batches are fetched before they are drawn, within the limit of the cache."""

import os
import threading
from pathlib import Path

import pytest

from common.read_ahead import ReadAhead
from common.remote import RemotePath, at_hand, to_path


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
    batches = [[index] for index in range(len(files)) for _ in range(2)]
    return ReadAhead(batches, lambda index: [files[index]])


def test_files_are_fetched_in_order_once_each_within_the_limit(files, bucket, tmp_path):
    for number, (index,) in enumerate(batches_of(files)):
        assert index == number // 2
        bucket.wait_for(index + 1)  # a loader that overtakes the thread may have files fetched twice
        with at_hand(files[index]) as file:
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
    assert [index for (index,) in batches_of(files)] == [index for index in range(NUM_FILES) for _ in range(2)]


def test_files_on_disk_are_not_touched(tmp_path):
    assert len(list(batches_of([tmp_path / "no.mp4"] * 3))) == 6
