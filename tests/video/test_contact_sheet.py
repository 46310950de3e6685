"""The contact sheet shows frames undistorted and captions in any script, with samples from all of the plan."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.buckets import Bucket
from data.clips import Clip, ClipSample
from preparation.report import sample_for_sheet
from video import contact_sheet
from video.contact_sheet import SheetRow, draw_contact_sheet
from video.probe import VideoInfo


RED, GREEN, BLUE, WHITE = (200, 0, 0), (0, 200, 0), (0, 0, 200), (255, 255, 255)
COLORS = (RED, GREEN, BLUE)


def frame(color, height=32, width=48):
    return np.full((height, width, 3), color, np.uint8)


def pixels(*rows):
    """[H, W, 3] of a sheet."""
    return np.asarray(draw_contact_sheet(rows))


def box(sheet, color):
    """Return left, top, right and bottom (exclusive) of the pixels of a colour."""
    rows, columns = np.where((sheet == color).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_frames_are_side_by_side_at_one_height():
    small = SheetRow([frame(color, 32, 48) for color in COLORS], "small", "")
    large = SheetRow([frame(color, 480, 600) for color in COLORS], "large", "")
    one, other = pixels(small), pixels(large)
    for sheet, aspect in ((one, 48 / 32), (other, 600 / 480)):
        boxes = [box(sheet, color) for color in COLORS]
        assert {(top, bottom) for _, top, _, bottom in boxes} == {box(one, RED)[1::2]}
        for left, top, right, bottom in boxes:
            assert (right - left) / (bottom - top) == pytest.approx(aspect, rel=0.01)
        assert boxes[0][2] <= boxes[1][0] and boxes[1][2] <= boxes[2][0]


@pytest.mark.parametrize(("height", "width"), [(768, 480), (480, 720), (576, 1360), (16, 1600), (1600, 16)])
def test_frames_keep_their_aspect_ratio_within_their_cell(height, width):
    left, top, right, bottom = box(pixels(SheetRow([frame(RED, height, width)], "", "")), RED)
    assert (right - left) <= 222 and (bottom - top) <= 148
    assert (right - left) == 222 or (bottom - top) == 148
    assert abs((right - left) - (bottom - top) * width / height) <= max(1, width / height)


def test_rows_are_below_one_another_and_a_still_image_has_one_frame():
    sheet = pixels(*(SheetRow([frame(color)], "", "") for color in COLORS))
    assert sheet.shape == (44 + 3 * 172, 1200, 3)
    boxes = [box(sheet, color) for color in COLORS]
    assert boxes[0][3] < boxes[1][1] and boxes[1][3] < boxes[2][1]
    _, top, right, bottom = boxes[0]
    assert (sheet[top:bottom, right + 1 : 700] == WHITE).all()


def test_a_view_of_an_array_is_drawn_like_its_copy():
    picture = np.random.default_rng(0).integers(0, 256, (3, 32, 48), np.uint8).transpose(1, 2, 0)[:, ::-1]
    assert np.array_equal(pixels(SheetRow([picture], "", "")), pixels(SheetRow([picture.copy()], "", "")))


def test_the_sheet_is_written_as_a_png(tmp_path):
    sheet = draw_contact_sheet([SheetRow([frame(RED)], "49x480x720", "A cat.")], tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as read:
        assert read.format == "PNG"
        assert np.array_equal(np.asarray(read), np.asarray(sheet))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["sheet.png"]


def text_of(title, caption):
    """The text column of a row without its upper rule."""
    return pixels(SheetRow([], title, caption))[46:, 700:]


def test_title_and_caption_are_drawn():
    assert (text_of("title", "") != 255).any()
    assert (text_of("", "caption") != 255).any()
    assert (text_of("title", "caption") != text_of("title", "another caption")).any()


# characters(): lone surrogates and unassigned ones too
@settings(deadline=None)
@given(st.text(st.characters(), max_size=400), st.text(st.characters(), max_size=400))
def test_any_text_stays_within_its_column_and_its_row(title, caption):
    column = text_of(title, caption)
    assert (column[:, -18:] == 255).all()  # glyphs may hang over by a pixel or two
    assert (column[-8:] == 255).all()


@pytest.mark.parametrize("caption", ["word " * 5000, "x" * 50_000, "一只大灰兔。" * 5000])
def test_a_long_caption_fills_its_column_and_ends_in_an_ellipsis(caption):
    drawn, shorter = text_of("title", caption), text_of("title", caption[:2000])
    assert np.array_equal(drawn, shorter)
    assert (drawn[-40:-8] != 255).any()
    *_, last = contact_sheet._wrap(caption, 5)
    assert last.endswith("…")


def test_a_caption_that_just_fits_is_not_cut():
    assert contact_sheet._wrap("A cat on a mat.", 1) == ["A cat on a mat."]
    lines = contact_sheet._wrap("word " * 40, 5)
    assert " ".join(lines) == ("word " * 40).strip()


def test_letters_missing_in_the_font_lose_their_accents():
    caption = "Ein Käfer \N{EN DASH} naïve 2 \N{MULTIPLICATION SIGN} weiß"
    assert np.array_equal(text_of("é", caption), text_of("e", "Ein Kafer - naive 2 x weiss"))


def test_scripts_missing_in_the_font_are_boxes():
    cat, dog = text_of("", "猫"), text_of("", "犬")
    assert (cat != 255).any()
    assert np.array_equal(cat, dog)


def test_line_breaks_in_captions_are_spaces():
    assert np.array_equal(text_of("", "A cat\n\n on\ta mat."), text_of("", "A cat on a mat."))


def plan(*numbers):
    """A plan with so many samples of bucket 0, 1, ..., mixed."""
    buckets = [Bucket(9, 16 * (number + 1), 16) for number, count in enumerate(numbers) for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(buckets))
    clips = [Clip(Path(f"{number}.mp4"), "", f"list:{number}") for number in range(len(order))]
    info = VideoInfo(9, 16, 16, 8.0)
    return [ClipSample(clip, info, buckets[at], (0,) * 9) for clip, at in zip(clips, order, strict=True)]


@example([], 1)
@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 16))
def test_samples_cover_every_bucket_and_none_is_repeated(numbers, most):
    planned = plan(*numbers)
    chosen = sample_for_sheet(planned, most)
    assert len(chosen) == min(most, len(planned))
    sources = [sample.clip.source for sample in chosen]
    assert len(set(sources)) == len(sources) <= most
    assert len({sample.bucket for sample in chosen}) == min(len(numbers), most)
    assert [sample.bucket for sample in chosen] == sorted(sample.bucket for sample in chosen)
    assert chosen == sample_for_sheet(list(planned), most)


def test_larger_buckets_get_more_samples():
    counts = Counter(sample.bucket.height for sample in sample_for_sheet(plan(1, 1000, 500), 16))
    assert counts == {16: 1, 32: 10, 48: 5}


def test_samples_come_from_all_over_the_plan():
    planned = plan(100)
    assert sample_for_sheet(planned, 4) == [planned[12], planned[37], planned[62], planned[87]]


def test_with_more_buckets_than_rows_the_largest_are_shown():
    heights = [sample.bucket.height for sample in sample_for_sheet(plan(2, 9, 1, 5), 2)]
    assert heights == [32, 64]
