"""The page of a run says what happened, plays its videos, and nothing in it can act."""

import os
import re
import time
from base64 import b64decode
from datetime import datetime
from pathlib import Path
from shutil import copy

import numpy as np
import pytest

from browser import PLAYS, visit
from common.run_folder import STRENGTHS_FOLDER, TARGETS_FOLDER
from doc_pages import noted_calls, value_of
from drawn_runs import CAPTION, PROMPT, noted, write_run
from results import run_videos
from results.run_page import choose_steps, render_run, write_run_page
from results.run_record import read_run


def page_of(folder: Path) -> str:
    return render_run(read_run(folder), folder)


LEARNED = {0: 1.0, 10: 0.9, 20: 0.82, 30: 0.77, 40: 0.74, 50: 0.73}
OVERFITTED = {5 * i: loss for i, loss in enumerate((1.0, 0.92, 0.87, 0.85, 0.85, 0.88, 0.93, 1.0, 1.09, 1.2, 1.33))}
DIVERGED = {0: 1.0, 10: 3.0, 20: 3.5, 30: 3.6, 40: 3.7, 50: 3.8}


@pytest.mark.parametrize(
    ("validation", "losses", "kind", "title"),
    [
        (LEARNED, np.linspace(1, 0.7, 50), "good", "It learned."),
        (OVERFITTED, np.linspace(1, 0.3, 50), "bad", "It learned up to step 15, then overfitted."),
        (
            LEARNED | {60: 0.74, 70: 0.74, 80: 0.74},
            [1.0] * 50,
            "unsure",
            "It learned up to step 50, and no more since.",
        ),
        (DIVERGED, np.linspace(1, 4, 50), "bad", "It did not learn: the training diverged."),
        (OVERFITTED, [1.0] * 50, "bad", "It learned up to step 15, then got worse."),
        ({0: float("nan")}, [1.0] * 50, "bad", "It did not learn: the training diverged."),
        ({}, np.linspace(1, 0.3, 50), "unsure", "Whether it learned is unknown."),
        ({0: 1.0}, [1.0], "unsure", "It is too early to say."),
    ],
)
def test_the_page_says_plainly_what_became_of_a_run(tmp_path, validation, losses, kind, title):
    page = page_of(write_run(tmp_path, validation, list(losses)))
    assert f'<p class="verdict {kind}"><strong>{title}</strong>' in page


def test_skipped_steps_and_warnings_are_listed_with_their_clips_and_the_reason_of_a_failure(tmp_path):
    skipped = [noted(7, skipped=7, what="loss", clips="a.mp4, b.mp4")]
    notes = [noted(state="running"), *skipped, noted(8, warning="the disk is almost full")]
    page = page_of(write_run(tmp_path, notes=[*notes, noted(9, state="failed", why="10 steps in a row")], facts={}))
    assert '<td class="number">7</td><td>loss</td><td>a.mp4, b.mp4</td>' in page
    assert "The run failed: 10 steps in a row" in page
    assert page.count("the disk is almost full") == 2  # at the top, and in the list
    assert "It did not learn: the training diverged." in page


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("running", "40 of 100 steps at {news}, about 3 min left without validations"),
        ("stopped", "stopped after 40 of 100 steps; it can be continued"),
        ("finished", "finished: 40 of 100 steps"),
    ],
)
def test_progress_and_time_left(tmp_path, state, said):
    folder = write_run(tmp_path, notes=[noted(state="running"), noted(state=state)], facts={})
    said = said.format(news=f"{read_run(folder).updated:%Y-%m-%d %H:%M}")
    assert f'<progress max="1" value="0.4" aria-label="{said}">' in page_of(folder)


@pytest.mark.parametrize("minutes", [19, 21])  # the longest interval between logged steps is 2
def test_a_run_without_news_was_probably_killed(tmp_path, minutes):
    write_run(tmp_path, notes=[noted(state="running")], facts={"start": ["python", "train.py"]}, video_steps=(40,))
    news = time.time() - 60 * minutes
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        os.utime(file, (news, news))
    page, since = page_of(tmp_path), f"{datetime.fromtimestamp(news):%Y-%m-%d %H:%M}"
    killed = f"40 of 100 steps; no news since {since}: it was probably killed; the command below continues it"
    assert (f'aria-label="{killed}"' in page, " left without" not in page) == (minutes > 20, minutes > 20)


def test_commands_are_those_of_the_run_with_the_present_name_of_its_folder(tmp_path):
    sample = ["python", "generate.py", "--lora", "old", "--prompt", "it's a rabbit"]
    facts = {"output_dir": "old", "sample": sample, "start": ["python", "train.py"], "publish": ["hf", "old"]}
    folder = write_run(tmp_path / "new place", {0: 1, 20: 0.5, 40: 0.9}, facts=facts)
    for weights in (folder, folder / "validation" / "step-20"):
        weights.mkdir(parents=True, exist_ok=True)
        (weights / "pytorch_lora_weights.safetensors").touch()
    commands = re.findall(r"<code>(.*?)</code>", page_of(folder).replace("&#39;", "'"), flags=re.DOTALL)
    commands = [re.sub(r"<[^>]*>", "", command).replace("&#34;", '"') for command in commands]
    assert f"python train.py --config '{folder}/config.yaml' --output_dir '{folder}'" in commands[0]
    assert f"--lora '{folder}' --prompt" in commands[1] and commands[1].endswith(" --compare")
    *sampled, shown = noted_calls(commands[2], tmp_path)
    places = [(value_of(call, "--lora_scale"), value_of(call, "--output_file")) for call in sampled]
    assert places == [(scale, f"{folder}/validation/strengths/{scale}.mp4") for scale in ("0.5", "1", "1.5")]
    assert shown[1:] == [str(folder)]
    assert f"--lora '{folder}/validation/step-20'" in commands[3]
    assert commands[4] == f"hf '{folder}'"


def test_strengths_that_were_sampled_are_beside_the_base_model(tmp_path):
    folder = write_run(tmp_path, facts={}, video_steps=(0, 40))
    (video,) = folder.glob("validation/step-40/*.mp4")
    (folder / STRENGTHS_FOLDER).mkdir()
    for name in ("1.5", "0.5", "mine"):
        copy(video, folder / STRENGTHS_FOLDER / f"{name}.mp4")
    row = page_of(folder).split("at several strengths of the LoRA</h3>")[1]
    names = ["base model", "strength 0.5", "strength 1.5"]
    assert re.findall(r"<figcaption><strong>(.*?)</strong>", row)[:3] == names and "mine" not in row


def test_few_steps_are_shown_with_the_first_the_last_and_the_best():
    assert choose_steps([0, 10, 20], None) == [0, 10, 20]
    chosen = choose_steps(list(range(0, 1001, 10)), 370)
    assert len(chosen) == 7 and {0, 370, 1000} <= set(chosen)


def test_large_videos_are_embedded_small_up_to_a_limit_and_all_are_linked(tmp_path, monkeypatch):
    folder = write_run(tmp_path, facts={}, video_steps=(0, 20, 40), size=(192, 400))
    full = folder / "validation/step-40/00-00-script-alert-x-script-a-red-circle.mp4"
    videos = re.findall(r'<video src="data:video/mp4;base64,([^"]*)"', page_of(folder))
    assert len(videos) == 4
    assert all(len(b64decode(video)) < full.stat().st_size / 2 for video in videos)
    monkeypatch.setattr(run_videos, "MOST_BYTES", len(b64decode(videos[-1])))
    page = page_of(folder)
    assert re.findall(r'aria-label="([^:"]*)', page[page.index("<video") :])[0] == "step 40"  # the most important one
    assert page.count("<video") == 1
    assert page.count('href="validation/step-') == 3


def test_controls_are_beside_their_videos_also_if_a_prompt_has_several(tmp_path):
    write_run(tmp_path, facts={}, video_steps=(0, 40))
    for step in (0, 40):
        file = tmp_path / f"validation/step-{step}/00-00-script-alert-x-script-a-red-circle.mp4"
        copy(file, file.with_name(file.name.replace("00-00", "01-00")))
    copy(file, tmp_path / TARGETS_FOLDER / "00-control.mp4")
    controls = [{"file": f"{TARGETS_FOLDER}/00-control.mp4"}, {"missing": "the disk was full"}]
    videos = [{"prompt": PROMPT, "target": {}, "control": control} for control in controls]
    first, second = page_of(write_run(tmp_path, facts={"videos": videos})).split("</h3>")[-2:]
    names = ["control", "before training", "step 40"]
    assert all(re.findall(r"<figcaption><strong>(.*?)</strong>", row)[:3] == names for row in (first, second))
    assert first.count("<video") == 3 and second.count("<video") == 2 and "the disk was full" in second
    assert "a red circle (prompt 2)" in first  # the title of the second row


def test_the_page_is_plain_and_its_videos_play_in_a_browser(browser, tmp_path):
    notes = [noted(state="running"), noted(3, skipped=3, what="loss", clips=PROMPT), noted(4, warning=PROMPT)]
    folder = write_run(tmp_path, notes=notes, facts={"summary": {"data": PROMPT}}, video_steps=(0, 20, 40))
    page = write_run_page(folder)
    assert "<script" not in page.read_text(encoding="utf-8")
    for width, scheme in ((1200, "light"), (390, "dark")):
        with visit(browser, page, width=width, scheme=scheme) as opened:
            assert opened.value("document.documentElement.scrollWidth") == width  # nothing leaves a phone's screen
            assert opened.page.get_by_text(PROMPT).count() >= 3
            assert opened.page.get_by_text(CAPTION).is_visible()
            opened.page.locator("video").first.scroll_into_view_if_needed()
            opened.page.locator("video").first.evaluate(PLAYS)
            assert opened.page.locator("video").count() == 4
            assert opened.errors == [] and opened.requests == [page.as_uri()]


def test_curves_are_drawn_in_the_charts_that_have_them(tmp_path):
    titles = re.findall(r'class="chart">\s*<figcaption><strong>(.*?)</strong>', page_of(write_run(tmp_path)))
    assert titles == ["Loss", "Validation loss by timestep", "Throughput", "Time of a step", "Peak memory so far"]
