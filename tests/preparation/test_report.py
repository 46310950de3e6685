"""The page of a preparation says what is in the data, and is usable in a browser."""

import re
import shlex
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from args import parse_prepare_args
from browser import visit
from cli.schema import flag_values
from data.buckets import Bucket
from data.clips import BadClip, Clip, ClipSample
from models.source import ModelSource
from planning.samples import RawData
from preparation.report import render_report, write_report
from video.contact_sheet import SheetRow
from video.probe import VideoInfo


SCRIPT = "<script>document.title = 'changed'</script> A cat & a dog."
INFO = VideoInfo(48, 64, 96, 24.0)


def sample(number: int, caption: str = "A cat.", info: VideoInfo = INFO, **metadata: str) -> ClipSample:
    clip = Clip(Path(f"videos/{number}.mp4"), caption, f"videos.txt:{number}", metadata=metadata)
    return ClipSample(clip, info, Bucket(9, 64, 96), tuple(range(0, 27, 3)))


@pytest.fixture(scope="module")
def source(tiny_models) -> ModelSource:
    return ModelSource(str(tiny_models("5b")))


@pytest.fixture
def flags(source, tmp_path) -> list[str]:
    (tmp_path / "my clips").mkdir()
    places = [
        "--model_id",
        source.path,
        "--data_root",
        str(tmp_path / "my clips"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    return [*places, "--frame_buckets", "9", "17", "--height_buckets", "64", "--width_buckets", "96", "--fps", "8"]


@pytest.fixture
def render(source, flags):
    """Return the page of samples and skipped clips."""

    def render(samples, bad=(), shown=()):
        return render_report(parse_prepare_args(flags), RawData(samples, bad), source, shown, complete="all.csv")

    return render


def facts_of(page: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def bars_of(page: str, title: str) -> dict[str, int]:
    """Return the counts of a histogram by the label of their bar."""
    figure = re.search(rf"<strong>{title}</strong>.*?</figure>", page, flags=re.DOTALL)
    bars = re.findall(r"<title>(.*?): ([\d,]+) of ", figure.group()) if figure else []
    return {label: int(count.replace(",", "")) for label, count in bars}


def test_clips_that_keep_dropped_are_counted_among_the_skipped_ones(source, flags):
    dropped = [BadClip("b.mp4", "videos.txt:2", "dropped by --keep: motion is 0.1")]
    data = RawData([sample(1, motion="2.5")], dropped=dropped)
    page = render_report(parse_prepare_args(flags), data, source, (), complete="all.csv")
    assert facts_of(page)["clips skipped"] == "1"
    assert ": motion is 0.1</td>" in page
    assert bars_of(page, "motion") == {"2.5": 1}


def test_clips_are_counted_once_and_samples_each(render):
    split = sample(1)
    later = ClipSample(split.clip, INFO, Bucket(17, 64, 96), tuple(range(27, 44)), part=1)
    bad = [BadClip("videos/1.mp4", "videos.txt:1", "is damaged"), BadClip("x.mp4", "videos.txt:9", "does not exist")]
    facts = facts_of(render([split, later, sample(2, "A dog.")], bad))
    assert facts == {
        "clips listed": "3",
        "clips used": "2",
        "clips skipped": "1",
        "samples": "3",
        "total length": "0 min 4 s",
        "distinct captions": "2",
    }


def test_histograms_include_clips_that_only_the_flags_make_unusable(render):
    long = VideoInfo(300, 128, 64, 30.0)
    still = VideoInfo(1, 64, 64, 0.0, is_image=True)
    page = render(
        [sample(1), sample(2), sample(3), sample(4, info=still)],
        [BadClip("a.mp4", "", "too long", long), BadClip("b.mp4", "", "does not exist")],
    )
    assert bars_of(page, "Length") == {"2 seconds": 3, "10 seconds": 1}
    assert bars_of(page, "Height") == {"64 pixels": 4, "128 pixels": 1}
    assert bars_of(page, "Frame rate of the clips") == {"24 frames per second": 3, "30 frames per second": 1}
    assert bars_of(page, "Frame rate of the samples") == {"8 frames per second": 3}


def test_captions_are_measured_in_tokens(render, source):
    captions = ["A cat."] * 3 + ["A cat jumps over the wall."] * 3
    tokenizer = AutoTokenizer.from_pretrained(source.path, subfolder="tokenizer")
    lengths = [len(tokenizer(caption)["input_ids"]) for caption in captions]
    page = render([sample(number, caption) for number, caption in enumerate(captions)])
    assert bars_of(page, "Length of the captions") == {f"{length} tokens": 3 for length in lengths}


def test_columns_of_numbers_are_shown_as_histograms(render):
    scores = [{"motion": f"{number % 2 / 2}", "author": "me", "sharp": "high"} for number in range(6)]
    page = render([sample(number, **score) for number, score in enumerate(scores)])
    assert bars_of(page, "motion") == {"0": 3, "0.5": 3}
    assert "<strong>author" not in page
    assert "<strong>sharp" not in page


def test_every_skipped_clip_has_its_reason_and_equal_reasons_are_counted(render):
    bad = [
        BadClip(f"videos/{number}.mp4", f"videos.txt:{number}", f"{number} usable frames (of 9); pass --fps {number}")
        for number in range(10, 40)
    ]
    page = render([sample(1)], [*bad, BadClip("x.mp4", "videos.txt:9", "does not exist")])
    text = unescape(re.sub(r"<span.*?>|</span>", "", page))
    assert all(f"<td>{clip.what}</td><td>{clip.reason}</td><td>{clip.source}</td>" in text for clip in bad)
    counts = re.findall(r'<th scope="row">(.*?)</th>.*?<td class="number">(\d+)</td>', page)
    assert counts == [("N usable frames", "30"), ("does not exist", "1")]


def test_the_page_of_a_large_data_set_stays_small(render):
    noise = np.random.default_rng(0).integers(0, 256, (480, 720, 3), dtype=np.uint8)
    shown = [SheetRow([noise] * 3, "49x480x720", "word " * 10_000)] * 16
    bad = [BadClip(f"videos/{number}.mp4", "videos.txt", "is damaged: " + "x" * 200) for number in range(5000)]
    page = render([sample(number, f"Cat {number}.") for number in range(5000)], bad, shown)
    assert len(page.encode()) < 5_000_000
    assert "500 of 5,000 are shown; all are in all.csv." in page


def test_the_command_on_the_page_has_the_flags_of_the_run(render, flags):
    flags += ["--save_latents_and_embeddings", "--id_token", "BURROW $1", "--random_flip", "0.5"]
    (command,) = re.findall(r"<code>(python.*?)</code>", render([sample(1)]), flags=re.DOTALL)
    words = shlex.split(unescape(re.sub(r"<.*?>", "", command)).replace("\\\n", ""))
    assert words[1].endswith("prepare_dataset.py")
    assert flag_values(parse_prepare_args(words[2:])) == flag_values(parse_prepare_args(flags))


def test_the_plans_notes_and_recommended_flags_are_on_the_page(render):
    same, still = VideoInfo(48, 64, 96, 24.0, sha256="a"), VideoInfo(1, 64, 96, 0.0, is_image=True)
    page = render([sample(1, info=same), sample(2, info=same)], [BadClip("a.png", "", "is a still image", still)])
    assert "1 clip listed again with the same caption" in page
    assert "Recommended, to keep all 3 clips" in page


def test_a_page_that_cannot_be_written_is_a_warning(source, flags, tmp_path, capsys):
    settings = parse_prepare_args(flags)
    (tmp_path / "out").write_text("a file where the folder should be")
    write_report(settings, RawData([sample(1)]), source, (), complete="all.csv")
    assert f"warning: cannot write {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().err


def test_the_page_works_in_a_browser(browser, render, tmp_path):
    row = SheetRow([np.full((64, 96, 3), shade, dtype=np.uint8) for shade in (0, 99, 200)], "9x64x96 · a.mp4", SCRIPT)
    bad = [BadClip(f"videos/{'long-' * 40}{number}.mp4", "videos.txt:1", SCRIPT) for number in range(30)]
    file = tmp_path / "report.html"
    file.write_text(render([sample(1, SCRIPT)], bad, [row] * 4), encoding="utf-8")
    papers = set()
    for width, scheme in ((1200, "light"), (360, "dark")):
        with visit(browser, file, width=width, scheme=scheme) as opened:
            assert opened.errors == []
            assert opened.requests == [file.as_uri()]
            assert opened.page.title() == "Data set: out"
            assert opened.value("document.documentElement.scrollWidth") <= width
            assert opened.value("[...document.images].every((image) => image.naturalWidth === 96)")
            papers.add(opened.value("getComputedStyle(document.body).backgroundColor"))
            opened.page.keyboard.press("Tab")
            opened.page.keyboard.press("Enter")
            opened.page.wait_for_url("**#section-1")
            opened.page.locator("summary").first.press("Enter")
            assert opened.page.get_by_role("cell", name="document.title").count() == 30
    assert len(papers) == 2
