"""The page on footage matches the code: its commands are parsed, its figures and messages are those of the code."""

import re
from pathlib import Path

import pytest

import make_footage
from doc_pages import flags_of, marked_blocks, noted_calls, read_page
from flags.footage import DETECTORS
from repository import ROOT, TRAINING


PAGE = read_page("assets/docs/footage.md")
BLOCKS = marked_blocks(PAGE)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("my-footage", "my-clips", "my-list", "my-prepared", "try/footage"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("my-clips/clips.csv", "my-clips/captions.jsonl", "my-list/clips.csv"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_command_of_the_way_reads_what_the_one_before_writes(folder):
    split, score, caption, prepare, train = map(flags_of, noted_calls(BLOCKS["way"], folder))
    assert (split.data_root, split.crop_bars) == ("my-footage", True)
    assert score.dataset_file == caption.dataset_file == f"{split.output_dir}/clips.csv"
    assert "duplicate" in caption.keep
    assert prepare.dataset_file == f"{split.output_dir}/captions.jsonl"
    assert prepare.data_root == split.output_dir
    assert (train.data_root, train.load_tensors) == (prepare.output_dir, True)


def test_the_list_is_captioned_where_the_footage_is(folder):
    split, caption = map(flags_of, noted_calls(BLOCKS["list"], folder))
    assert split.list and caption.data_root == split.data_root
    assert caption.dataset_file == f"{split.output_dir}/clips.csv"


def test_the_films_to_try_have_the_cuts_that_the_page_shows(folder):
    make, split = noted_calls(BLOCKS["try"], folder)
    assert (ROOT / make[0]).is_file() and flags_of(split).data_root == "try/footage"
    films, minutes = int(make[make.index("--films") + 1]), float(make[make.index("--minutes") + 1])
    shots = [make_footage.plan_film(round(minutes * 60 * make_footage.FPS), seed) for seed in range(films)]
    cuts = sum(map(len, shots)) - films
    assert f"{films} films of {minutes:g} minutes, {cuts} cuts" in PAGE
    assert f"film-00-{0:06d}-{shots[0][0].end - 2:06d}.mp4" in PAGE


def test_the_benchmark_of_the_page_exists_and_knows_its_detectors():
    (script,) = re.findall(r"benchmarks/\w+\.py", BLOCKS["benchmark"])
    assert (ROOT / script).is_file()
    assert all(re.search(rf"^{name} +\d+", PAGE, flags=re.MULTILINE) for name in DETECTORS)


def test_the_messages_of_the_page_are_in_the_code():
    code = "".join(file.read_text(encoding="utf-8") for file in TRAINING.rglob("*.py"))
    code = re.sub(r'"\s*f?"', "", code)
    messages = re.findall(r"^\| `([^`]+)` \|", PAGE.split("## Messages")[1], flags=re.MULTILINE)
    assert len(messages) == 6
    assert [message for message in messages if message not in code] == []


def test_every_block_of_the_page_is_tested_here():
    assert BLOCKS.keys() == {"way", "try", "list", "benchmark"}
