"""Parts of a page, as `pages.parts` documents them."""

from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from pages.parts import data_uri, details, facts, figure, format_number, grid, paragraph, table, warnings


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (7.0, "7"), (0.123456, "0.1235"), (29.97003, "29.97"), (1234567.8, "1,234,568"), (float("nan"), "nan")],
)
def test_numbers_are_short(number, text):
    assert format_number(number) == text


def test_columns_of_numbers_are_on_the_right():
    shown = table(["clip", "frames", "cropped"], [["a.mp4", 1500, "16%"], ["7", None, "0%"]], "Clips")
    assert '<th scope="col">clip</th><th scope="col" class="number">frames</th>' in shown
    assert '<td>a.mp4</td><td class="number">1,500</td><td class="number">16%</td>' in shown
    assert '<td>7</td><td class="number"></td><td class="number">0%</td>' in shown


def test_a_long_table_is_cut_and_says_where_all_of_it_is():
    shown = table(["clip"], [[f"{number}.mp4"] for number in range(2000)], "Clips", most=3, complete="clips.csv")
    assert shown.count("<td>") == 3
    assert "3 of 2,000 are shown; all are in clips.csv." in shown
    assert "are shown" not in table(["clip"], [["a.mp4"]], "Clips", most=1)
    assert "<td" not in table(["clip"], [], "Clips")


def test_a_picture_is_part_of_the_page():
    pixels = np.full((32, 48, 3), (200, 30, 60), dtype=np.uint8)
    for media in (pixels, Image.fromarray(pixels)):
        kind, content = data_uri(media).split(",")
        assert kind == "data:image/jpeg;base64"
        assert np.abs(np.asarray(Image.open(BytesIO(b64decode(content)))).astype(int) - pixels).max() < 8
    file = BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    assert data_uri(file.getvalue()).startswith("data:image/png;base64,")


def test_videos_play_and_pictures_do_not():
    video = figure([b"\0\0\0\x20ftypisom"] * 2, "at <b> step 100")
    assert video.count('<video src="data:video/mp4;base64,') == 2
    assert "at &lt;b&gt; step 100" in video
    assert "<img" in figure([np.zeros((2, 2, 3), dtype=np.uint8)])


def test_other_files_are_refused():
    with pytest.raises(ValueError, match="neither PNG"):
        data_uri(b"<svg onload='alert()'>")


def test_parts_contain_parts():
    shown = details("3 clips", [grid([paragraph("one"), facts([("clips", 12345)])])])
    assert '<p class="text">one</p>' in shown
    assert "<dt>clips</dt><dd>12,345</dd>" in shown
    assert warnings([]) == grid([Markup()]) == ""
    assert "<li>a &amp; b</li>" in warnings(["a & b"])


def test_flags_stay_on_one_line():
    assert paragraph("pass --fps <8>") == '<p class="text">pass <span class="flag">--fps</span> &lt;8&gt;</p>\n'
