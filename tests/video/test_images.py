"""First frames of validation videos are loaded from disk and web, and every failure has its reason."""

import gzip
import threading
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from encoded_clips import encode, numbers_of
from video import images as validation_images
from video.controls import HIDDEN, INPAINT
from video.frames import Cut
from video.images import load_controls, load_validation_images


def picture(height=24, width=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image, image_format="PNG", **options):
    content = BytesIO()
    image.save(content, format=image_format, **options)
    return content.getvalue()


def turned_by_exif(image):
    """A PNG stored a quarter turn off, with the orientation that undoes it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    return encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif)


@pytest.fixture
def server(monkeypatch):
    """A local web server that answers with its `pages`, and otherwise with 404."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requested.append(self.path)
            if self.path == "/silent":
                self.server.closing.wait()
            elif self.path in self.server.elsewhere:
                self.send_response(302)
                self.send_header("Location", self.server.elsewhere[self.path])
                self.end_headers()
            elif self.path.startswith("/endless"):
                self.send_endlessly(in_headers=self.path.endswith("headers"))
            else:
                self.send_response(200 if self.path in self.server.pages else 404)
                self.send_header("Content-Encoding", self.server.encoding)
                self.end_headers()
                self.wfile.write(self.server.pages.get(self.path, b""))

        def send_endlessly(self, in_headers):
            self.send_response(200)
            if not in_headers:
                self.end_headers()
            self.flush_headers()
            with suppress(OSError):  # the client has gone
                while not self.server.closing.wait(0.05):
                    self.wfile.write(b"X-More: more\r\n")

        def log_message(self, *args):
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.pages, server.requested, server.closing = {}, [], threading.Event()
        server.encoding = "identity"
        server.elsewhere = {"/moved": "/image.png", "/circle": "/circle", "/to-a-file": f"file://{__file__}"}
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def test_images_come_from_disk_and_web_in_the_order_given(server, tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "turned.png").write_bytes(turned_by_exif(picture(32, 16)))
    server.pages["/image.png"] = turned_by_exif(picture())
    references = [f"{server.address}/moved", *(str(tmp_path / name) for name in ("clear.png", "turned.png"))]
    loaded = load_validation_images(references)
    for image, expected in zip(loaded, (picture(), Image.new("RGB", (16, 16), "white"), picture(32, 16)), strict=True):
        assert image.mode == "RGB"
        assert np.array_equal(image, expected)


def test_a_repeated_url_is_requested_once(server):
    server.pages["/image.png"] = encoded(picture())
    first, second = load_validation_images([f"{server.address}/image.png"] * 2)
    assert np.array_equal(first, second)
    assert server.requested == ["/image.png"]


def error_of(*references):
    with pytest.raises(UserError) as caught:
        load_validation_images(list(references))
    return str(caught.value)


def test_an_error_names_the_flag_the_image_and_the_reason(server):
    address = f"{server.address}/gone.png"
    assert error_of(address) == (
        f"--validation_images: '{address}': the server answers 404 Not Found; pass a path or an http(s) URL of a "
        "still image"
    )


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("page", "not a still image"),
        ("empty", "not a still image"),
        ("half.png", "not a readable image"),
        ("large.png", "larger than 1 MiB"),
        ("bomb.png", "compresses the image"),
        ("circle", "redirects"),
        ("to-a-file", "unsupported protocol"),
        ("silent", "no complete answer within 0.3 s"),
        ("endless-headers", "no complete answer within 0.3 s"),
        ("endless-content", "no complete answer within 0.3 s"),
    ],
)
def test_an_unusable_answer_has_its_reason(server, monkeypatch, page, reason):
    monkeypatch.setattr(validation_images, "DOWNLOAD_LIMIT", 2**20)
    if "no complete answer" in reason:
        monkeypatch.setattr(validation_images, "DOWNLOAD_TIMEOUT", 0.3)
    half, large, bomb = encoded(picture())[:200], bytes(2**20 + 1), gzip.compress(bytes(2**20))
    server.pages |= {
        "/half.png": half,
        "/large.png": large,
        "/bomb.png": bomb,
        "/page": b"<html>Log in</html>",
        "/empty": b"",
    }
    server.encoding = "gzip" if page == "bomb.png" else "identity"
    assert reason in error_of(f"{server.address}/{page}")
    assert len(server.requested) == (validation_images.MOST_REDIRECTS + 1 if page == "circle" else 1)


@pytest.mark.parametrize(
    ("address", "reason"),
    [("http://127.0.0.1:1/x.png", "cannot be reached"), ("http://", "URL"), ("http://127.0.0.1:x/y.png", "port")],
)
def test_a_url_without_a_server_is_named_with_the_reason(monkeypatch, address, reason):
    monkeypatch.setenv("NO_PROXY", "*")
    message = error_of(address)
    assert message.startswith(f"--validation_images: '{address}': ")
    assert reason in message


def test_a_proxy_that_cannot_be_used_is_named_with_the_reason(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")  # which needs an optional package
    with pytest.raises(UserError, match=r"^--validation_images: 'http://127\.0\.0\.2/x\.png': \S+"):
        load_validation_images(["http://127.0.0.2/x.png"])


def test_a_file_that_is_not_a_still_image_has_its_reason(tmp_path):
    picture().save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (40, 24))])
    (tmp_path / "notes.txt").write_text("no image")
    for name, reason in (("notes.txt", "not a still"), ("moving.gif", "not a still"), ("gone.png", "No such file")):
        assert f"{name}': {reason}" in error_of(str(tmp_path / name))


def test_controls_are_cut_cropped_and_computed_like_those_of_clips(tmp_path):
    file = str(encode(tmp_path / "a.mp4", 33))
    (control,) = load_controls([file], (9, 48, 80), None)
    assert numbers_of(np.stack([np.asarray(one) for one in control])) == list(range(0, 33, 4))
    (first,) = load_controls([file], (9, 48, 80), None, cut=Cut(fps=25.0))
    assert numbers_of(np.stack([np.asarray(one) for one in first])) == list(range(9))
    (smaller,) = load_controls([file], (9, 32, 32), "canny")
    assert smaller[0].size == (32, 32) and set(np.unique(smaller[0])) <= {0, 255}
    short, missing = str(encode(tmp_path / "b.mp4", 40)), str(tmp_path / "c.mp4")
    with pytest.raises(UserError, match="--control: 3 of 3 cannot be used for videos of 49 frames") as caught:
        load_controls([file, short, missing], (49, 32, 32), None, "--control")
    assert all(words in str(caught.value) for words in ("has 33 usable frames; pass", "has 40", "does not exist"))
    still, skipped = tmp_path / "d.png", Cut(fps=12.5, skip_frames_end=8)
    picture().save(still)
    short = r"has 13 usable frames at 12\.5 fps \(of 33 at 25 fps\)"
    for wrong, reason in ((still, "is a still image, not a video"), (file, short)):
        with pytest.raises(UserError, match=f"{reason}(; pass a longer one)?$"):
            load_controls([str(wrong)], (17, 32, 32), None, cut=skipped)
    (held,) = load_controls([file], (17, 48, 80), None, cut=replace(skipped, hold_last_frame=True))
    assert numbers_of(np.stack([np.asarray(one) for one in held])) == [*range(0, 25, 2), 24, 24, 24, 24]


def test_inpainting_controls_are_grey_where_the_mask_beside_the_clip_is_white(tmp_path):
    file = str(encode(tmp_path / "a.mp4", 33))
    (tmp_path / "a.mask.txt").write_text("a note")
    with pytest.raises(UserError, match=r"has no mask beside it; add a\.mask\.mp4 or a\.mask\.png$"):
        load_controls([file], (9, 32, 32), INPAINT)
    mask = np.zeros((48, 80), np.uint8)
    mask[:, :40] = 1
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    with pytest.raises(UserError, match=r"nothing to fill, because its mask .*a\.mask\.png is nowhere white"):
        load_controls([file], (9, 48, 48), INPAINT)
    mask[:, :40] = 255
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    (plain,), (control,) = (load_controls([file], (9, 48, 48), kind) for kind in (None, INPAINT))
    for frame, before in zip(control, plain, strict=True):
        assert (np.asarray(frame)[:, :24] == HIDDEN).all()  # the middle of the clip is kept, where the mask's edge is
        assert np.array_equal(np.asarray(frame)[:, 24:], np.asarray(before)[:, 24:])
    encode(tmp_path / "a.mask.mp4", 32)
    with pytest.raises(UserError, match=r"has several masks beside it, a\.mask\.mp4, a\.mask\.png; keep one$"):
        load_controls([file], (9, 48, 48), INPAINT)
    (tmp_path / "a.mask.png").unlink()
    with pytest.raises(UserError, match=r"its mask .*a\.mask\.mp4: has 32 frames, its clip 33"):
        load_controls([file], (9, 48, 48), INPAINT)


def test_several_problems_are_one_list(server, tmp_path):
    picture().save(tmp_path / "fine.png")
    (tmp_path / "notes.txt").write_text("no image")
    message = error_of(f"{server.address}/gone.png", str(tmp_path / "fine.png"), str(tmp_path / "notes.txt"))
    title, first, second = message.splitlines()
    assert title.startswith("--validation_images: 2 of 3 cannot be read")
    assert "gone.png': the server answers 404" in first
    assert "notes.txt': not a still image" in second
