"""Charts count what they say they count."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pages.charts import Curve, bar_chart, bin_numbers, histogram, line_chart


@given(st.lists(st.floats(-1e6, 1e6, width=32) | st.integers(0, 300), min_size=1, max_size=200))
def test_every_number_is_in_one_bin_as_numpy_counts(values):
    bins = bin_numbers(values)
    assert sum(bins.counts) == len(values)
    assert len(bins.counts) == len(bins.labels) <= 26
    if bins.edges is not None and not bins.is_open:
        assert bins.counts == np.histogram(values, bins.edges)[0].tolist()


def test_a_few_values_that_repeat_have_a_bin_each():
    bins = bin_numbers([24, 30, 24, 29.97, 24, 30])
    assert dict(zip(bins.labels, bins.counts, strict=True)) == {"24": 3, "29.97": 1, "30": 2}
    assert bin_numbers([8.0]).labels == ["8"]


@pytest.mark.parametrize(
    ("values", "first", "last"),
    [
        (range(1, 17), "0 to 4", "15 to 19"),
        (range(9), "0 to 1", "8 to 9"),
        (range(5), "0", "4"),
        (np.linspace(0.11, 0.93, 50), "0 to 0.2", "0.8 to 1"),
        ([*range(20, 70), 100_000], "20 to 29", "60 or more"),
    ],
)
def test_bins_are_round_and_far_numbers_share_the_last(values, first, last):
    bins = bin_numbers(list(values))
    assert (bins.labels[0], bins.labels[-1]) == (first, last)


def test_a_histogram_says_its_counts_range_and_unit():
    svg = histogram([1.5, 2.5, 2.6, 2.7, 4.5, float("nan")], "Length <s>", "seconds")
    assert re.findall(r"<title>(.*?)</title>", svg) == [
        "1 to 2 seconds: 1 of 5 clips",
        "2 to 3 seconds: 3 of 5 clips",
        "3 to 4 seconds: 0 of 5 clips",
        "4 to 5 seconds: 1 of 5 clips",
    ]
    assert "Length &lt;s&gt;</strong> 1.5 to 4.5 seconds, median 2.6" in svg
    heights = [float(height) for height in re.findall(r'<rect.*?height="([\d.]+)"', svg)]
    assert np.allclose(np.array(heights) / heights[1], np.array([1, 3, 0, 1]) / 3, atol=0.01)
    assert histogram([float("nan")], "Length", "seconds") == ""


def test_a_bar_chart_compares_categories():
    chart = bar_chart({"too short": 40, "no <caption>": 10}, "Reasons")
    assert re.findall(r"width: ([\d.]+)%", chart) == ["100.0", "25.0"]
    assert "no &lt;caption&gt;" in chart
    assert bar_chart({}, "Reasons") == ""


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    paths = re.findall(r'<path class="line[^"]*" d="M([^"]*)"/>(?!</svg>)', svg)
    return [[tuple(map(float, pair.split(","))) for pair in path.split()] for path in paths]


def test_curves_are_drawn_to_scale_with_labelled_axes():
    one = Curve("<loss>", [(0, 1.0), (50, 0.5), (75, float("nan")), (100, 0.0)], has_dots=True)
    svg = line_chart([one, Curve("thin", [(0, 0.2), (100, 0.2)], is_thin=True)], "Loss", "steps", "loss")
    thin, drawn = points_of(svg)  # the thin one is behind
    assert len({y for _, y in thin}) == 1
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y0 < y1 < y2  # downwards
    assert "<title>&lt;loss&gt;, steps 50: 0.5</title>" in svg
    assert re.findall(r"</svg>([^<]*)</li>", svg) == ["&lt;loss&gt;", "thin"]
    assert re.findall(r'text-anchor="middle">(.*?)<', svg) == ["0", "20", "40", "60", "80", "100", "steps"]


def test_outliers_of_long_thin_curves_do_not_flatten_the_others():
    noisy = [(step, 1e6 if step == 7 else 1.0 + step % 2) for step in range(200)]
    (line,) = points_of(line_chart([Curve("loss", noisy, is_thin=True)], "Loss"))
    heights = sorted(y for _, y in line)
    assert heights[-1] - heights[len(heights) // 4] > 100  # most of the picture
    assert heights[0] >= 26


def test_long_curves_are_thinned_out_and_end_where_they_end():
    (line,) = points_of(line_chart([Curve("loss", [(step, step) for step in range(10_007)])], "Loss"))
    assert len(line) <= 402 and line[-1][0] == 388


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-1e-9, 1e-9], [1e9, 2e9]])
def test_any_range_has_ticks(values):
    svg = line_chart([Curve("loss", list(enumerate(values)))], "Loss")
    assert len(re.findall('text-anchor="end"', svg)) >= 2


def test_higher_values_than_the_axis_are_drawn_at_its_end():
    curves = [Curve("usual", [(0, 1.0), (9, 0.0)]), Curve("diverged", [(0, 1.0), (9, 90.0)])]
    usual, diverged = points_of(line_chart(curves, "Loss", most=1.0))
    assert usual[0][1] == diverged[0][1] < usual[1][1] - 100
    assert diverged[1][1] == 26


def test_nothing_is_drawn_without_points():
    assert line_chart([Curve("loss", [(0, float("inf"))]), Curve("none", [])], "Loss") == ""
