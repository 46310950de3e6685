"""The comparison of decoders recognizes wrong frames, and the data pages have its table."""

import re

import decoders
import numpy as np

from doc_pages import read_page


def test_frames_are_recognized_although_they_were_compressed_again():
    truth = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), np.uint8)
    blurred = (truth // 2 + 60).astype(np.uint8)
    assert decoders.count_wrong(blurred[[0, 2, 5]], [0, 2, 5], truth) == 0
    assert decoders.count_wrong(blurred[[1, 2, 4]], [0, 2, 5], truth) == 2


def test_pyav_reads_the_frames_that_ffmpeg_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr(decoders, "NUM_FRAMES", 90)
    monkeypatch.setattr(decoders, "CLIPS", {name: decoders.CLIPS[name] for name in list(decoders.CLIPS)[:1]})
    for name, path in decoders.make_clips(tmp_path).items():
        assert decoders.judge("PyAV", path, decoders.decode_all(path), repeats=1)["wrong"] == 0, name


def test_a_table_shows_what_a_decoder_did_wrong_and_its_cpu_time():
    results = {"PyAV": {"wrong": 0, "seconds": 0.5}, "decord": {"wrong": 3, "seconds": 1.0}}
    failed = {"PyAV": {"wrong": 0, "seconds": 0.5}, "decord": {"failed": "the process was killed"}}
    assert decoders.table([("a", results), ("b", failed)])[2:] == [
        "| a | 0 | 3 | 2.0 |",
        "| b | 0 | the process was killed |  |",
    ]


def test_the_data_page_has_a_row_for_every_clip():
    section = read_page("assets/docs/dataset.md").split("## Why PyAV")[1].split("\n## ")[0]
    assert re.findall(r"^\| (.*?) \| \d", section, flags=re.MULTILINE) == [*decoders.CLIPS, decoders.CUT]
