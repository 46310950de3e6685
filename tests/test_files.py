import pytest

from errors import UserError
from files import replace_folder, written_whole


def test_a_file_appears_only_when_its_block_has_succeeded(tmp_path):
    target = tmp_path / "folder" / "file.txt"
    with written_whole(target) as path:
        path.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert [file.name for file in target.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("earlier")
    with pytest.raises(RuntimeError), written_whole(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_the_partial_file_keeps_the_suffix_that_writers_choose_a_format_by(tmp_path):
    with written_whole(tmp_path / "video.mp4") as path:
        assert path.suffix == ".mp4"
        path.write_bytes(b"")


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder, partial = tmp_path / "checkpoint-1", tmp_path / ".partial"
    for path, content in ((folder, "old"), (partial, "new")):
        path.mkdir()
        (path / content).write_text(content)
    replace_folder(partial, folder)
    assert [file.name for file in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_file_is_as_readable_as_any_other_whatever_the_writer_does(tmp_path):
    (tmp_path / "usual").touch()
    with written_whole(tmp_path / "file") as path:
        path.unlink()
        path.touch(mode=0o600)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/below cannot be written \(.*\); what is done is kept"),
        written_whole(tmp_path / "file" / "below") as path,
    ):
        path.write_text("x")


def test_a_disk_that_is_full_in_the_middle_is_told_in_one_line(tmp_path):
    with (
        pytest.raises(UserError, match=r"target cannot be written \(No space left on device\)"),
        written_whole(tmp_path / "target"),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
