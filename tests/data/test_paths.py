"""Listed paths cannot lead out of the folders that the user named; links in these folders can."""

from pathlib import Path

import pytest

from data.paths import stays_inside


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of clips that has a link to another folder, and is itself a link."""
    (tmp_path / "real/videos").mkdir(parents=True)
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "real")
    (tmp_path / "real/linked").symlink_to(tmp_path / "elsewhere/deep")
    return tmp_path / "data"


# A link in the folder is its owner's; {real} is the same folder under another name.
INSIDE = """
    a.mp4 videos/a.mp4 ..a/b..mp4 videos/../a.mp4 linked/a.mp4 {root}/a.mp4 {root}/linked/a.mp4 {real}/a.mp4
    ../data/a.mp4 .
"""
# Above a link is the folder above the one linked to.
OUTSIDE = """
    ../a.mp4 videos/../../a.mp4 linked/../a.mp4 /a.mp4 / {root}-more/a.mp4 {root}/../a.mp4
    {parent}/elsewhere/deep/a.mp4
"""


@pytest.mark.parametrize("listed", INSIDE.split())
def test_a_path_in_the_folder_is_inside(root, listed):
    assert stays_inside(listed.format(root=root, real=root.resolve()), root, [root])


@pytest.mark.parametrize("listed", [*OUTSIDE.split(), "../\0"])
def test_a_path_elsewhere_is_not_inside(root, listed):
    assert not stays_inside(listed.format(root=root, parent=root.parent), root, [root])


def test_a_path_may_be_in_any_of_several_folders(root, tmp_path):
    folders = [root, tmp_path / "elsewhere"]
    assert stays_inside(f"{tmp_path}/elsewhere/a.mp4", root, folders)
    assert stays_inside("linked/../a.mp4", root, folders)
    assert not stays_inside(f"{tmp_path}/a.mp4", root, folders)
    assert stays_inside(f"{tmp_path}/a.mp4", None, [tmp_path])
    assert not stays_inside(f"{tmp_path}/a.mp4", None, [])


def test_relative_folders_start_from_the_working_directory(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    assert stays_inside(f"{root}/a.mp4", Path("data"), [Path("data")])
    assert stays_inside("../data/a.mp4", Path("data"), [Path("data")])
    assert not stays_inside("../a.mp4", Path("data"), [Path("data")])
