"""Damage to a finished folder is found by its manifest."""

from pathlib import Path

import pytest

from checkpoints.manifest import find_damage, size_of, write_manifest
from common.run_folder import MANIFEST


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "inner" / "empty").touch()
    write_manifest(tmp_path)
    return tmp_path


def test_an_unchanged_folder_is_undamaged_whatever_files_were_added(folder):
    assert find_damage(folder) is None
    assert size_of(folder) == 25_600
    (folder / "notes.txt").write_text("good one")
    assert find_damage(folder) is None


def truncate(folder: Path) -> None:
    with open(folder / "weights.bin", "r+b") as stream:
        stream.truncate(25_000)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "weights.bin").read_bytes())
    content[20_000] ^= 1
    (folder / "weights.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"inner": {"size": "x"}}}'), "inner is missing"),
        (truncate, "weights.bin has 25000 bytes of 25600"),
        (flip_a_bit, "weights.bin has changed since it was written"),
        (lambda folder: (folder / "inner" / "empty").unlink(), "inner/empty is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "it has no readable manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "it has no readable manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "it has no readable manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"x": 1}}'), "it has no readable manifest.json"),
    ],
)
def test_damage_is_described(folder, damage, words):
    damage(folder)
    assert words in find_damage(folder)
