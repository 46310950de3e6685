"""What preparing a clip costs is counted right, and the figures of the page are those of the code."""

import pytest
from preparation_cost import T5_XXL, count_caption, count_video, table

from doc_pages import read_page, table_rows
from make_tiny_model import TEXT_LENGTH


def test_the_pages_have_the_figures_of_the_code():
    header, *counted = table_rows("\n".join(table()))
    for page in ("assets/docs/dataset.md", "assets/docs/dataset_zh.md"):
        rows = table_rows(read_page(page))
        first = rows.index(header) + 1
        # The names of the rows are translated.
        assert [row[1:] for row in rows[first : first + len(counted)]] == [row[1:] for row in counted], page


def test_the_text_encoder_is_counted_as_by_the_formula():
    tokens, width, layers = TEXT_LENGTH, T5_XXL["d_model"], T5_XXL["num_layers"]
    linear = 4 * width * T5_XXL["num_heads"] * T5_XXL["d_kv"] + 3 * width * T5_XXL["d_ff"]
    cost = count_caption()
    assert cost.flop["forward", "linear"] == layers * 2 * tokens * linear
    assert cost.flop["forward", "attention"] == layers * 4 * tokens**2 * width
    assert cost.peak == pytest.approx(2 * (layers * linear + T5_XXL["vocab_size"] * width), rel=0.02)


def test_overlapping_tiles_are_encoded_more_than_once():
    # Of 480 x 720 pixels, tiles of 240 x 360 begin every 200 and 288 pixels: 240 + 240 + 80, 360 + 360 + 144.
    ratio = count_video(tiling=True).tflop("forward") / count_video(tiling=False).tflop("forward")
    assert ratio == pytest.approx((560 / 480) * (864 / 720), rel=1e-3)
