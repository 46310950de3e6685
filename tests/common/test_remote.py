"""Paths in a real object store, and the cache that they are read through."""

import os
import pickle
import threading
from pathlib import Path

import pytest

from common import remote
from common.files import atomic_write
from common.remote import RemotePath, at_hand, limit_cache, listed_below, to_path
from common.stores import StoreError


MB = 10**6


@pytest.fixture
def megabytes(bucket, monkeypatch) -> list[RemotePath]:
    """Four files of a megabyte, and a cache for three and a half."""
    monkeypatch.setenv("COGVIDEOX_FACTORY_CACHE_LIMIT_GB", "0.0035")
    for name in "abcd":
        bucket.put(f"{name}.bin", os.urandom(MB))
    return [to_path(f"{bucket.url}/{name}.bin") for name in "abcd"]


def use(path: Path) -> None:
    with at_hand(path) as file:
        file.read_bytes()


def cached(paths: list[RemotePath]) -> str:
    return "".join(path.stem for path in paths if remote._cached_file(path).exists())


def test_a_path_in_a_store_behaves_like_a_path_and_prints_as_its_url():
    path = to_path("s3://bucket/clips/") / "deep/a.mp4"
    assert str(path) == f"{path}" == os.fspath(path) == "s3://bucket/clips/deep/a.mp4"
    assert (path.name, path.suffix, str(path.parent)) == ("a.mp4", ".mp4", "s3://bucket/clips/deep")
    assert str(path.relative_to(to_path("s3://bucket/clips"))) == "deep/a.mp4"
    assert pickle.loads(pickle.dumps(path)) == path == path.absolute() == path.resolve()
    assert type(to_path("clips")) is type(Path("clips"))


@pytest.mark.parametrize(
    ("url", "is_below"),
    [
        ("s3://bucket/clips/a.mp4", True),
        ("s3://bucket/clips/../a.mp4", False),
        ("s3://bucket/clips-of-others/a.mp4", False),
        ("s3://other/clips/a.mp4", False),
        ("https://bucket/clips/a.mp4", False),
    ],
)
def test_a_listed_url_must_be_below_one_that_was_typed(url, is_below):
    found = listed_below(url, [None, Path("s3:/other/clips"), to_path("s3://bucket/clips")])
    assert (found is not None) == is_below


def test_a_file_is_fetched_once_and_again_when_it_has_changed(bucket):
    bucket.put("list.txt", "one")
    path = to_path(f"{bucket.url}/list.txt")
    assert path.read_text() == path.read_bytes().decode() == "one"
    assert bucket.fetched() == ["list.txt"]
    bucket.put("list.txt", "two")
    assert path.read_text() == "two"
    bucket.delete("list.txt")
    with pytest.raises(FileNotFoundError):
        path.read_text()


def test_many_readers_share_one_transfer(bucket):
    bucket.put("a.bin", os.urandom(MB))
    threads = [threading.Thread(target=use, args=[to_path(f"{bucket.url}/a.bin")]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bucket.fetched() == ["a.bin"]


def test_the_cache_keeps_its_limit_and_what_was_used_last(megabytes):
    a, b, c, d = megabytes
    for path in (a, b, c, a, d):
        use(path)
    assert cached(megabytes) == "acd"


def test_a_file_that_is_read_stays_in_the_cache(megabytes):
    a, b, c, d = megabytes
    with at_hand(a) as file:
        for path in (b, c, d):
            use(path)
        assert file.stat().st_size == MB
        assert cached(megabytes) == "acd"


def test_what_a_killed_process_left_is_removed_first(megabytes):
    a, b, c, _ = megabytes
    use(a)
    left = remote._cached_file(a).with_name(".0123.partial")
    left.write_bytes(bytes(MB))
    os.utime(left, (0, 0))
    for path in (b, c):
        use(path)
    assert (cached(megabytes), left.exists()) == ("abc", False)


def test_a_file_larger_than_the_cache_is_refused(megabytes):
    limit_cache(0.0005)
    with pytest.raises(StoreError, match=r"a\.bin is larger than the 0\.0005 GB of the cache; raise --cache_limit_gb"):
        use(megabytes[0])


def test_a_file_is_written_to_a_store_when_it_is_complete(bucket, tmp_path):
    target = to_path(f"{bucket.url}/out/x.txt")
    with pytest.raises(ZeroDivisionError), atomic_write(target) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert not target.exists()
    with atomic_write(target) as partial:
        partial.write_text("whole")
    assert target.exists() and bucket.get("out/x.txt") == b"whole"
    assert not any(file.is_file() for file in (tmp_path / "cache/outgoing").rglob("*"))
    target.unlink()
    assert not target.exists()
