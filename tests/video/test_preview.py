"""Previews are small, keep their rate, and play where H.264 does."""

from io import BytesIO

import av
import numpy as np
import pytest

from video.io import write_video
from video.preview import LONGER_SIDE, preview, write_preview


def noise(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


def test_a_large_video_becomes_small_at_its_rate(tmp_path):
    write_video(tmp_path / "a.mp4", noise(5, 240, 360), 16)
    with av.open(BytesIO(preview(tmp_path / "a.mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (LONGER_SIDE, 212, 16)
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert len(list(container.decode(stream))) == 5


def test_a_small_file_stays_and_a_new_one_is_read_again(tmp_path):
    for count in (3, 5):
        write_preview(tmp_path / "a.mp4", noise(count, 33, 49), 8)
        assert preview(tmp_path / "a.mp4") == (tmp_path / "a.mp4").read_bytes()


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"a\.mp4"):
        preview(tmp_path / "a.mp4")
