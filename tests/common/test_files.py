import os

import pytest

from common.errors import UserError
from common.files import atomic_write, path_of_script, refresh_names, remove_partials, replace_folder
from repository import ROOT


def test_a_file_appears_only_when_its_block_has_succeeded(tmp_path):
    target = tmp_path / "folder" / "file.txt"
    with atomic_write(target) as path:
        assert path.suffix == ".txt"
        path.write_text("complete")
        assert not target.exists()
    assert target.read_text() == "complete"
    assert [file.name for file in target.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("earlier")
    with pytest.raises(RuntimeError), atomic_write(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    target = tmp_path / "file.txt"
    with atomic_write(target) as one, atomic_write(target) as other:
        one.write_text("one")
        other.write_text("other")
    assert target.read_text() == "one"  # the last to finish
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_a_refresh_changes_every_folder_and_leaves_nothing(tmp_path):
    folders = [tmp_path, tmp_path / "latents", tmp_path / "latents" / "below"]
    folders[-1].mkdir(parents=True)
    (tmp_path / "latents" / "shard").touch()
    for folder in folders:
        os.utime(folder, (1, 1))
    refresh_names(tmp_path)
    assert all(folder.stat().st_mtime > 1 for folder in folders)
    assert {path.name for path in tmp_path.rglob("*")} == {"latents", "below", "shard"}


@pytest.mark.parametrize("earlier", [None, "file", "folder"])
def test_a_folder_replaces_what_was_there(tmp_path, earlier):
    folder, partial = tmp_path / "checkpoint-1", tmp_path / ".partial"
    partial.mkdir()
    (partial / "new").touch()
    if earlier == "folder":
        folder.mkdir()
        (folder / "old").touch()
    elif earlier == "file":
        folder.touch()
    replace_folder(partial, folder)
    assert list(tmp_path.rglob("*")) == [folder, folder / "new"]


def test_a_file_has_the_usual_permissions_whatever_the_writer_does(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "file") as path:
        path.unlink()
        path.touch(mode=0o600)
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial/weights").touch(mode=0o600)
    replace_folder(tmp_path / ".partial", tmp_path / "folder")
    for written in ("file", "folder/weights"):
        assert (tmp_path / written).stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize(
    ("name", "reason"), [("file/below", r".*\); finished work is kept"), ("target", "No space left on device")]
)
def test_an_unwritable_place_and_a_full_disk_are_one_line(tmp_path, name, reason):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=rf"{name} cannot be written \({reason}"),
        atomic_write(tmp_path / name),
        open("/dev/full", "w") as full,
    ):
        full.write("x")


def test_only_the_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / f".{'0' * 16}.partial.loss.png").touch()
    for name in ("loss.png", ".hidden", "a.partial.b"):
        (tmp_path / name).touch()
    remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.partial.b", "loss.png"]


def test_a_script_is_named_so_that_it_starts_from_the_current_folder(tmp_path, monkeypatch):
    for folder, name in ((ROOT, "training/generate.py"), (tmp_path, str(ROOT / "training/generate.py"))):
        monkeypatch.chdir(folder)
        assert path_of_script("generate.py") == name
