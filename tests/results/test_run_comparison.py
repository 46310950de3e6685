"""Several runs on one page: what differs, which one is best, and their last videos."""

import re

import pytest

from browser import PLAYS, visit
from drawn_runs import PROMPT, write_run
from results.run_comparison import differing_settings, name_runs, render_comparison
from results.run_page import write_run_page
from results.run_record import read_run


def compared(tmp_path, *facts, **options):
    return [read_run(write_run(tmp_path / f"run-{i}", facts=one, **options)) for i, one in enumerate(facts)]


def flags(**values):
    return {"flags": {"rank": 8, "output_dir": str(values), **values}}


def test_only_settings_that_differ_are_in_the_table_and_name_the_runs(tmp_path):
    records = compared(
        tmp_path, flags(learning_rate=1e-4), flags(learning_rate=1e-3), flags(learning_rate=1e-3, seed=7)
    )
    differing = differing_settings(records)
    assert differing == {"learning_rate": [1e-4, 1e-3, 1e-3], "seed": [None, None, 7]}
    names = ["learning_rate 0.0001, seed -", "learning_rate 0.001, seed -", "learning_rate 0.001, seed 7"]
    assert name_runs(records, differing) == names
    page = render_comparison(records, tmp_path)
    assert "<td>learning_rate</td><td>0.0001</td>" in page
    assert "<td>rank</td>" not in page


def test_runs_that_settings_do_not_tell_apart_are_named_by_their_folders(tmp_path):
    records = compared(tmp_path, flags(), flags())
    assert name_runs(records, differing_settings(records)) == ["run-0", "run-1"]


MEASURED = {"clips": "2 samples (ab)", "noise levels": {"0": [0.5], "1": [0.8]}, "base model": "5b"}


def test_the_run_with_the_lowest_loss_is_named(tmp_path):
    records = compared(tmp_path, {"measured": MEASURED})
    records += [read_run(write_run(tmp_path / "better", {0: 1.0, 20: 0.4, 40: 0.3}, facts={"measured": MEASURED}))]
    records += [read_run(write_run(tmp_path / "without", {}, facts={"measured": None}))]
    page = render_comparison(records, tmp_path)
    assert "Lowest validation loss: better</strong> 0.3000 at step 40." in page and "not comparable" not in page


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"measured": MEASURED | {"noise levels": {"0": [0.2, 0.5], "1": [0.8]}}}, "differs in noise levels"),
        ({"measured": MEASURED | {"base model": "2b", "clips": "2 samples (cd)"}}, "differs in clips, base model"),
        ({"held_out": "of an earlier version"}, "was not recorded for all runs"),
    ],
)
def test_losses_that_were_not_measured_alike_are_not_ranked(tmp_path, facts, why):
    page = render_comparison(compared(tmp_path, {"measured": MEASURED}, facts), tmp_path)
    assert "validation losses are not comparable: what they measure" in page and why in page
    assert "Lowest validation loss" not in page


def test_losses_of_earlier_versions_are_not_ranked(tmp_path):
    page = render_comparison(compared(tmp_path, {}, {}), tmp_path)
    assert "not comparable" in page and "Lowest validation loss" not in page


def test_the_last_videos_play_side_by_side_in_a_browser(browser, tmp_path):
    records = compared(tmp_path, flags(seed=1), flags(seed=2), video_steps=(0, 40))
    write_run_page(records[0].folder)
    page = tmp_path / "comparison.html"
    page.write_text(render_comparison(records, tmp_path), encoding="utf-8")
    with visit(browser, page, width=390) as opened:
        assert opened.value("document.documentElement.scrollWidth") == 390
        assert opened.page.get_by_role("region", name=PROMPT).locator("video").count() == 3  # the target, and two runs
        opened.page.locator("video").first.scroll_into_view_if_needed()
        opened.page.locator("video").first.evaluate(PLAYS)
        opened.page.get_by_role("link", name="seed 1", exact=True).click()
        assert "Run: run-0" in opened.page.title()
        assert opened.errors == []


def test_each_run_is_a_curve_in_every_chart(tmp_path):
    page = render_comparison(compared(tmp_path, flags(seed=1), flags(seed=2), flags(seed=3)), tmp_path)
    charts = re.findall(r'<figure class="chart">.*?</figure>', page, flags=re.DOTALL)
    assert [len(re.findall(r"<li>", chart)) for chart in charts] == [3, 3, 3]
