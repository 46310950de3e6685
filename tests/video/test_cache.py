"""Facts about files are valid while the files do not change, whoever shares the cache."""

import multiprocessing
import os
import sqlite3
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from common.remote import default_cache_folder
from video import cache as cache_module
from video.cache import FileCache


FACT = {"num_frames": 49}


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"frames")
    return path


def put(cache, path, fact=FACT, kind="probe 1"):
    assert cache.find(path, kind, lambda examined: fact if examined == path else None) == fact


def known(cache, path, kind="probe 1"):
    def examine(path):
        raise LookupError

    with suppress(LookupError):
        return cache.find(path, kind, examine)


def rewrite(path, content):
    """Write other content with a later modification time, whatever the resolution of the disk's clock."""
    changed = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(changed + 10**9, changed + 10**9))


def test_a_fact_is_found_in_a_later_run(clip, tmp_path):
    fact = {"num_frames": 49, "fps": 30000 / 1001, "times": [0, 40000], "name": "Häschen 兎", "none": None}
    put(FileCache(tmp_path / "cache"), clip, fact)
    assert known(FileCache(tmp_path / "cache"), clip) == fact
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["files.sqlite"]


def test_another_kind_and_another_file_are_unknown(clip, tmp_path):
    cache = FileCache(tmp_path)
    put(cache, clip)
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    assert known(cache, clip, "probe 2") is None
    assert known(cache, copy) is None


@pytest.mark.parametrize("content", [b"FRAMES", b"more frames"])
def test_a_changed_file_is_unknown_and_its_new_fact_replaces_the_old(clip, tmp_path, content):
    cache = FileCache(tmp_path)
    put(cache, clip)
    rewrite(clip, content)
    assert known(cache, clip) is None
    put(cache, clip, {"num_frames": 50})
    assert known(cache, clip) == {"num_frames": 50}


def test_a_fact_about_a_file_that_changed_meanwhile_is_not_stored(clip, tmp_path):
    def examine(path):
        rewrite(path, b"other")
        return FACT

    cache = FileCache(tmp_path)
    assert cache.find(clip, "probe 1", examine) == FACT
    assert known(cache, clip) is None


def test_a_missing_file_has_no_facts(clip, tmp_path):
    cache = FileCache(tmp_path)
    put(cache, clip)
    clip.unlink()
    put(cache, tmp_path / "nowhere.mp4")
    for path in (clip, tmp_path / "nowhere.mp4", Path("a\0b")):
        assert known(cache, path) is None


def test_relative_and_absolute_paths_are_one_file(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = FileCache(Path("cache"))
    put(cache, Path("clip.mp4"))
    assert known(cache, clip) == FACT


def test_a_name_need_not_be_valid_text(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    path.write_bytes(b"frames")
    cache = FileCache(tmp_path / "cache")
    put(cache, path)
    assert known(cache, path) == FACT


def put_all(folder, paths, first):
    cache = FileCache(folder)
    for number in (*range(first, len(paths)), *range(first)):
        put(cache, paths[number], {"num_frames": number})


def test_processes_share_a_cache(tmp_path):
    paths = [tmp_path / f"{number}.mp4" for number in range(60)]
    for path in paths:
        path.write_bytes(b"frames")
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        list(pool.map(partial(put_all, tmp_path / "cache", paths), (0, 20, 40)))
    cache = FileCache(tmp_path / "cache")
    assert [known(cache, path) for path in paths] == [{"num_frames": number} for number in range(60)]


def test_threads_share_a_cache(clip, tmp_path):
    cache = FileCache(tmp_path)
    kinds = [f"kind {number}" for number in range(100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda kind: put(cache, clip, {"kind": kind}, kind), kinds))
        assert list(pool.map(lambda kind: known(cache, clip, kind), kinds)) == [{"kind": kind} for kind in kinds]


def assert_given_up(cache, clip, caplog):
    for _ in range(3):
        put(cache, clip)
        assert known(cache, clip) is None
    (record,) = caplog.records
    assert str(cache.file) in record.getMessage()


def damage_facts(file):
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE facts SET value = '{\"num_fra'")
    connection.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"not a database" * 300),
        lambda file: os.truncate(file, file.stat().st_size - 4096),
        damage_facts,
    ],
)
def test_a_damaged_cache_is_not_used(clip, tmp_path, caplog, damage):
    put(FileCache(tmp_path), clip)
    cache = FileCache(tmp_path)
    damage(cache.file)
    assert_given_up(cache, clip, caplog)


def test_a_locked_cache_is_not_used(clip, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(cache_module, "_WAIT_SECONDS", 0.01)
    cache = FileCache(tmp_path)
    put(FileCache(tmp_path), clip)
    other = sqlite3.connect(cache.file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert_given_up(cache, clip, caplog)
    other.close()


def test_without_a_folder_the_cache_is_not_used(clip, caplog):
    assert_given_up(FileCache(clip / "cache"), clip, caplog)


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
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert default_cache_folder() == Path(folder)
