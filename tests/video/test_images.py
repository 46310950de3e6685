"""First frames of validation videos are loaded from disk and web, and every failure has its reason."""

import gzip
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from video import images as validation_images
from video.images import load_validation_images


def picture(height=24, width=40):
    """A picture without any symmetry."""
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
                return
            if self.path in self.server.elsewhere:
                self.send_response(302)
                self.send_header("Location", self.server.elsewhere[self.path])
                self.end_headers()
                return
            if self.path.startswith("/endless"):
                self.send_endlessly(in_headers=self.path.endswith("headers"))
                return
            content = self.server.pages.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Encoding", self.server.encoding)
            self.end_headers()
            if content is not None:
                self.wfile.write(content)

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
        server.encoding, server.elsewhere = "identity", {"/moved": "/image.png", "/circle": "/circle"}
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


def test_a_missing_page_is_one_line_with_the_servers_answer(server):
    address = f"{server.address}/gone.png"
    assert error_of(address) == (
        f"--validation_images: '{address}': the server answers 404 Not Found; pass a path or an http(s) URL of a "
        "still image"
    )


def test_only_still_images_are_accepted(server, tmp_path):
    picture().save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (40, 24))])
    server.pages |= {"/page": b"<html>Please log in</html>", "/empty": b"", "/half.png": encoded(picture())[:200]}
    (tmp_path / "notes.txt").write_text("no image")
    local = [str(tmp_path / name) for name in ("notes.txt", "moving.gif")]
    for reference in (f"{server.address}/page", f"{server.address}/empty", *local):
        assert f"'{reference}': not a still image" in error_of(reference)
    assert "not a readable image" in error_of(f"{server.address}/half.png")


def test_an_image_that_is_too_large_is_not_downloaded(server, monkeypatch):
    monkeypatch.setattr(validation_images, "DOWNLOAD_LIMIT", 2**20)
    server.pages["/large.png"] = bytes(2**20 + 1)
    assert "larger than 1 MiB" in error_of(f"{server.address}/large.png")


@pytest.mark.parametrize("page", ["silent", "endless-headers", "endless-content"])
def test_the_download_has_a_time_limit_even_if_data_keeps_coming(server, monkeypatch, page):
    monkeypatch.setattr(validation_images, "DOWNLOAD_TIMEOUT", 0.3)
    assert "no complete answer within 0.3 s" in error_of(f"{server.address}/{page}")


def test_circular_redirects_end(server):
    assert "redirects" in error_of(f"{server.address}/circle")
    assert len(server.requested) == validation_images.MOST_REDIRECTS + 1


def test_a_server_cannot_redirect_to_a_local_file(server, tmp_path):
    picture().save(tmp_path / "private.png")
    server.elsewhere["/to-a-file"] = f"file://{tmp_path}/private.png"
    assert "unsupported protocol" in error_of(f"{server.address}/to-a-file")


def test_a_compressed_answer_is_not_unpacked(server):
    server.encoding = "gzip"
    server.pages["/bomb.png"] = gzip.compress(bytes(2**20))
    assert "compresses the image" in error_of(f"{server.address}/bomb.png")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:1/x.png", "cannot be reached"),
        ("http://", "URL"),
        ("http://127.0.0.1:x/y.png", "port"),
    ],
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


def test_a_deleted_file_is_named(tmp_path):
    assert "gone.png': No such file or directory;" in error_of(str(tmp_path / "gone.png"))


def test_several_problems_come_in_one_list(server, tmp_path):
    picture().save(tmp_path / "fine.png")
    (tmp_path / "notes.txt").write_text("no image")
    message = error_of(f"{server.address}/gone.png", str(tmp_path / "fine.png"), str(tmp_path / "notes.txt"))
    title, first, second = message.splitlines()
    assert title.startswith("--validation_images: 2 of 3 cannot be read")
    assert "gone.png': the server answers 404" in first
    assert "notes.txt': not a still image" in second
