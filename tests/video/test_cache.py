"""Facts about files are valid while the files do not change, whoever shares the cache."""

import logging
import multiprocessing
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from video.cache import FileCache, default_cache_folder, file_state


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"frames")
    return path


def rewritten(path, content):
    """Write other content with a later modification time, whatever the resolution of the disk's clock."""
    changed = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(changed + 10**9, changed + 10**9))


def test_a_fact_is_found_in_a_later_run(clip, tmp_path):
    fact = {"num_frames": 49, "fps": 30000 / 1001, "times": [0, 40000], "name": "Häschen 兎", "none": None}
    FileCache(tmp_path / "cache").put(clip, "probe 1", fact)
    assert FileCache(tmp_path / "cache").get(clip, "probe 1") == fact
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["files.sqlite"]


def test_another_kind_and_another_file_are_unknown(clip, tmp_path):
    cache = FileCache(tmp_path)
    cache.put(clip, "probe 1", {"num_frames": 49})
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    assert cache.get(clip, "probe 2") is None
    assert cache.get(copy, "probe 1") is None


@pytest.mark.parametrize("content", [b"FRAMES", b"more frames"])
def test_a_changed_file_is_unknown(clip, tmp_path, content):
    cache = FileCache(tmp_path)
    cache.put(clip, "probe 1", {"num_frames": 49})
    rewritten(clip, content)
    assert cache.get(clip, "probe 1") is None


def test_a_later_fact_replaces_an_earlier_one(clip, tmp_path):
    cache = FileCache(tmp_path)
    for num_frames in (49, 50):
        cache.put(clip, "probe 1", {"num_frames": num_frames})
    assert cache.get(clip, "probe 1") == {"num_frames": 50}


def test_a_fact_about_an_earlier_state_of_the_file_is_not_stored(clip, tmp_path):
    cache = FileCache(tmp_path)
    state = file_state(clip)
    rewritten(clip, b"other")
    cache.put(clip, "probe 1", {"num_frames": 49}, state)
    assert cache.get(clip, "probe 1") is None


def test_a_missing_file_has_no_facts(clip, tmp_path):
    cache = FileCache(tmp_path)
    cache.put(clip, "probe 1", {"num_frames": 49})
    clip.unlink()
    cache.put(tmp_path / "nowhere.mp4", "probe 1", {"num_frames": 49})
    for path in (clip, tmp_path / "nowhere.mp4", Path("a\0b")):
        assert cache.get(path, "probe 1") is None


def test_relative_and_absolute_paths_are_one_file(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = FileCache(Path("cache"))
    cache.put(Path("clip.mp4"), "probe 1", {"num_frames": 49})
    assert cache.get(clip, "probe 1") == {"num_frames": 49}


def test_a_name_need_not_be_valid_text(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    path.write_bytes(b"frames")
    cache = FileCache(tmp_path / "cache")
    cache.put(path, "probe 1", {"num_frames": 49})
    assert cache.get(path, "probe 1") == {"num_frames": 49}


# Several at once


def put_all(folder, paths, first):
    cache = FileCache(folder)
    for number in (*range(first, len(paths)), *range(first)):
        cache.put(paths[number], "probe 1", {"num_frames": number})


def test_processes_share_a_cache(tmp_path):
    paths = [tmp_path / f"{number}.mp4" for number in range(60)]
    for path in paths:
        path.write_bytes(b"frames")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=put_all, args=(tmp_path / "cache", paths, first)) for first in (0, 20, 40)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache = FileCache(tmp_path / "cache")
    assert [cache.get(path, "probe 1") for path in paths] == [{"num_frames": number} for number in range(60)]


def test_threads_share_a_cache(clip, tmp_path):
    cache = FileCache(tmp_path)
    kinds = [f"kind {number}" for number in range(100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda kind: cache.put(clip, kind, {"kind": kind}), kinds))
        assert list(pool.map(lambda kind: cache.get(clip, kind), kinds)) == [{"kind": kind} for kind in kinds]


# Failures


def assert_given_up(cache, clip, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            cache.put(clip, "probe 1", {"num_frames": 49})
            assert cache.get(clip, "probe 1") is None
    (record,) = caplog.records
    assert str(cache.file) in record.getMessage()


@pytest.mark.parametrize("damage", [lambda content: b"not a database" * 300, lambda content: content[:-4096]])
def test_a_damaged_cache_is_not_used(clip, tmp_path, caplog, damage):
    FileCache(tmp_path).put(clip, "probe 1", {"num_frames": 49})
    cache = FileCache(tmp_path)
    cache.file.write_bytes(damage(cache.file.read_bytes()))
    assert_given_up(cache, clip, caplog)


def test_a_damaged_fact_is_unknown(clip, tmp_path, caplog):
    FileCache(tmp_path).put(clip, "probe 1", {"num_frames": 49})
    cache = FileCache(tmp_path)
    with sqlite3.connect(cache.file) as connection:
        connection.execute("UPDATE facts SET value = '{\"num_fra'")
    connection.close()
    assert cache.get(clip, "probe 1") is None
    assert str(cache.file) in caplog.text


def test_a_locked_cache_is_not_used(clip, tmp_path, caplog):
    FileCache(tmp_path).put(clip, "probe 1", {"num_frames": 48})
    cache = FileCache(tmp_path, wait_seconds=0.01)
    other = sqlite3.connect(cache.file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert_given_up(cache, clip, caplog)
    other.close()


def test_without_a_folder_the_cache_is_not_used(clip, caplog):
    assert_given_up(FileCache(clip / "cache"), clip, caplog)


# Its folder


@pytest.mark.parametrize(
    ("chosen", "caches", "folder"),
    [
        ("/scratch/facts", "/var/caches", "/scratch/facts"),
        ("~/facts", None, "/home/user/facts"),
        (None, "/var/caches", "/var/caches/cogvideox-factory"),
        ("", "", "/home/user/.cache/cogvideox-factory"),
        (None, None, "/home/user/.cache/cogvideox-factory"),
    ],
)
def test_the_default_folder_follows_the_environment(chosen, caches, folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    for name, value in (("COGVIDEOX_FACTORY_CACHE", chosen), ("XDG_CACHE_HOME", caches)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert default_cache_folder() == Path(folder)
