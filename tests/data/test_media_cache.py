"""Media in rows become files as `data.media_cache` documents: atomically, losslessly, each once."""

import importlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import pytest
from fsspec import AbstractFileSystem
from PIL import Image

from clip_lists import write
from data import media_cache
from data.media_cache import first_frame_file, media_file
from data.rows import UnusableRow
from encoded_clips import all_frames


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), np.uint8)


def picture(format="PNG", size=(6, 4), colour=(255, 0, 0)):
    """An image file's bytes; a colour of four numbers is transparent."""
    buffer = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


def decoded(path):
    with av.open(str(path)) as container:
        return all_frames(path), container.streams.video[0].average_rate


def files_in(cache):
    return [path for path in cache.rglob("*") if path.is_file()]


def problem_of(value, cache, fps=None):
    with pytest.raises(UnusableRow) as raised:
        media_file(value, None, cache, fps)
    return str(raised.value)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"bytes": None, "path": "/b.mp4"}, "/b.mp4"),
        *((value, "/home/me/a.mp4") for value in ("~/a.mp4", " ~/a.mp4", {"path": "~/a.mp4"})),
        *((name, f"{{folder}}/{name.strip()}") for name in (" a.mp4\n", "~a.mp4", "~root/a.mp4", "a/~/b.mp4")),
    ],
)
def test_a_path_starts_from_the_folder_from_the_root_or_from_home(tmp_path, monkeypatch, value, path):
    monkeypatch.setenv("HOME", "/home/me")
    assert media_file(value, tmp_path, tmp_path) == Path(path.format(folder=tmp_path))


@pytest.mark.parametrize("value", ["", " ", {"bytes": None, "path": None}, {"bytes": None, "path": ""}])
def test_an_empty_path_is_none(tmp_path, value):
    assert problem_of(value, tmp_path) == "has no path"


@pytest.mark.parametrize(
    ("name", "suffix"), [("in/a.MOV", ".mov"), ("b.jpg", ".jpg"), ("c.exe", ""), ("d", ""), (None, "")]
)
def test_bytes_become_a_file_with_the_suffix_of_their_path_if_it_is_a_media_suffix(tmp_path, name, suffix):
    file = media_file({"bytes": b"content", "path": name}, None, tmp_path)
    assert (file.read_bytes(), file.suffix) == (b"content", suffix)


@pytest.mark.parametrize("value", [b"content", PIXELS, [picture()]], ids=["bytes", "decoded", "images"])
def test_the_same_media_are_written_once(tmp_path, value):
    written = media_file(value, None, tmp_path)
    time = written.stat().st_mtime_ns
    assert media_file(value, None, tmp_path) == written
    assert files_in(tmp_path) == [written]
    assert written.stat().st_mtime_ns == time


def test_other_media_or_another_rate_make_another_file(tmp_path):
    images = [picture(), picture(colour=(0, 0, 0))]
    values = [(PIXELS, None), (PIXELS, 12), (PIXELS[:4], None), (images, None), (images[::-1], None), (images, 12)]
    assert len({media_file(value, None, tmp_path, fps) for value, fps in values}) == len(values)


@pytest.mark.parametrize(("fps", "rate"), [(None, 8), (12, 12), (30000 / 1001, 29.97)])
@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_decoded_videos_are_kept_without_loss_and_with_the_same_bytes_everywhere(tmp_path, kind, fps, rate):
    first, second = (media_file(PIXELS.astype(kind), None, tmp_path / cache, fps) for cache in ("a", "b"))
    assert (first.name, first.read_bytes()) == (second.name, second.read_bytes())
    found, found_rate = decoded(first)
    assert np.array_equal(found, PIXELS)
    assert float(found_rate) == pytest.approx(rate, rel=1e-4)


def test_a_list_of_images_becomes_a_video(tmp_path):
    colours = [(255, 0, 0), (0, 128, 3), (7, 8, 9)]
    write(tmp_path / "3.png", picture(colour=colours[2]))
    images = [picture(colour=colours[0]), {"bytes": picture(colour=colours[1]), "path": None}, "3.png"]
    images.append(picture(colour=(0, 0, 0, 0)))
    frames, rate = decoded(media_file(images, tmp_path, tmp_path / "cache", 12))
    assert rate == 12
    assert frames.shape == (4, 4, 6, 3)
    assert [tuple(frame[0, 0]) for frame in frames] == [*colours, (255, 255, 255)]  # transparent parts are white


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (np.ones((1, 1, 1, 3), np.float32), "holds float32 of shape [1, 1, 1, 3]; decoded videos are"),
        (np.ones((1, 1, 1, 2), np.uint8), "holds uint8 of shape [1, 1, 1, 2]; decoded videos are"),
        (np.ones((0, 1, 1, 3), np.uint8), "holds uint8 of shape [0, 1, 1, 3]; decoded videos are"),
        (np.full((1, 1, 1, 3), 256), "holds int64 of shape [1, 1, 1, 3]; decoded videos are"),
        (np.full((1, 1, 1, 3), -1), "holds int64 of shape [1, 1, 1, 3]; decoded videos are"),
        ([], "holds no frames"),
        ([picture(), picture(size=(8, 8))], "holds frames of different sizes"),
        ([picture(), picture()[:50]], "has a frame that is not a readable image"),
        ([picture(), b"text"], "has a frame that is not a still image"),
        ([picture(), "/gone.png"], "has a frame /gone.png that cannot be read: No such file"),
        ([picture(), "/\0.png"], "has a frame /"),
        ([{"x": 5}], "has dict among its frames, not an image"),
        ({"x": 5}, "is dict, not a path"),
        ("a.mp4", "has a relative path; set the folder it starts from with --data_root"),
        (None, "has no path"),
        (7, "is int 7, not a path"),
    ],
)
def test_media_that_are_not_a_video_are_named_and_not_kept(tmp_path, value, problem):
    assert problem_of(value, tmp_path).startswith(problem)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("fps", [0.0, -8.0, float("nan"), float("inf"), "8"])
def test_a_rate_that_is_not_a_number_in_range_is_named(tmp_path, fps):
    assert "in its fps column; a rate is a number" in problem_of(PIXELS, tmp_path, fps)


@pytest.mark.parametrize("value", [None, "", " ", []])
def test_a_first_frame_may_be_missing(tmp_path, value):
    assert first_frame_file(value, None, tmp_path) is None


@pytest.mark.parametrize("value", [picture(), [{"bytes": picture()}], np.asarray(Image.open(io.BytesIO(picture())))])
def test_a_first_frame_may_be_encoded_in_a_list_of_one_or_decoded(tmp_path, value):
    image = Image.open(first_frame_file(value, None, tmp_path))
    assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", (6, 4), (255, 0, 0))


def test_a_problem_of_a_first_frame_names_the_image(tmp_path):
    with pytest.raises(UnusableRow, match=r"^its image is int 5, not a path$"):
        first_frame_file(5, None, tmp_path)
    with pytest.raises(UnusableRow, match=r"^has 2 images instead of one$"):
        first_frame_file([picture(), picture()], None, tmp_path)


class Hub(AbstractFileSystem):
    protocol = "hf"
    files: ClassVar[dict[str, bytes]] = {}

    def _open(self, path, mode="rb", **options):
        try:
            return io.BytesIO(self.files[path])
        except KeyError as error:
            raise FileNotFoundError(path) from error


@pytest.fixture
def hub(monkeypatch) -> dict[str, bytes]:
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "hf", Hub)
    monkeypatch.setattr(Hub, "files", {})
    return Hub.files


def test_a_file_on_the_hub_is_fetched_once(hub, tmp_path):
    hub["datasets/o/n@main/a.mp4"] = b"content"
    value = {"bytes": None, "path": "hf://datasets/o/n@main/a.mp4"}
    fetched = media_file(value, None, tmp_path, within=[])
    hub.clear()
    assert media_file(value, None, tmp_path, within=[]) == fetched
    assert fetched.suffix == ".mp4"
    assert fetched.read_bytes() == b"content"


@pytest.mark.parametrize(
    ("name", "limits", "reason"),
    [
        ("a.mp4", {"FETCH_LIMIT": 2**20}, "larger than 1 MiB"),
        ("a.mp4", {"FETCH_TIMEOUT": -1.0}, "not complete within -1 s"),
        ("gone.mp4", {}, "datasets/o/n@main/gone.mp4"),
    ],
)
def test_a_file_that_cannot_be_fetched_is_named_and_not_kept(hub, tmp_path, monkeypatch, name, limits, reason):
    for limit, value in limits.items():
        monkeypatch.setattr(media_cache, limit, value)
    hub["datasets/o/n@main/a.mp4"] = bytes(2**20 + 1)
    assert problem_of({"path": f"hf://datasets/o/n@main/{name}"}, tmp_path) == f"cannot be fetched: {reason}"
    assert files_in(tmp_path) == []


LINKS = """
    http://127.0.0.1:1/a.mp4 https://huggingface.co.evil.org/a.mp4 file:///etc/hostname local:///etc/hostname
    memory://a.mp4 zip://a.mp4::http://127.0.0.1:1/clips.zip simplecache::file:///etc/hostname
    filecache://a::hf://datasets/o/n/a.zip
"""


@pytest.mark.parametrize("link", LINKS.split())
def test_links_of_a_table_contact_no_server_but_the_hub(tmp_path, link):
    for within in ([], None):
        with pytest.raises(UnusableRow, match=r"^is (a URL; download the file|an unsupported kind of link)"):
            media_file({"path": link}, None, tmp_path, within=within)


def test_frames_and_archives_of_a_row_stay_in_the_data_root(tmp_path):
    for folder in ("data", "elsewhere"):
        write(tmp_path / folder / "frame.png", picture())
        with zipfile.ZipFile(tmp_path / folder / "clips.zip", "w") as archive:
            archive.writestr("a.mp4", folder)
    data, cache = tmp_path / "data", tmp_path / "cache"
    for place in ("", f"{data}/"):
        archive = media_file({"path": f"zip://a.mp4::{place}clips.zip"}, data, cache, within=[data])
        assert archive.read_text() == "data"
        assert media_file([f"{place}frame.png"], data, cache, within=[data]).exists()
    for place in ("../elsewhere", f"{tmp_path}/elsewhere"):
        for value in ({"path": f"zip://a.mp4::{place}/clips.zip"}, ["frame.png", {"path": f"{place}/frame.png"}]):
            with pytest.raises(UnusableRow, match=f"lies outside of {data}"):
                media_file(value, data, cache, within=[data])


def test_processes_that_fill_one_cache_at_once_agree(tmp_path):
    code = (
        "import sys; from pathlib import Path; import numpy as np; from data.media_cache import media_file;"
        "videos = [np.full((2, 8, 8, 3), value, np.uint8) for value in range(50)];"
        "print(*(media_file(video, None, Path(sys.argv[1])) for video in videos))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    first, second = (process.communicate()[0].split() for process in started)
    assert first == second
    assert sorted(map(str, files_in(tmp_path))) == sorted(first)
    assert all((decoded(Path(path))[0] == value).all() for value, path in enumerate(first))
