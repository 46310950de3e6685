"""A run keeps its page up to date and says how it ended; nothing of that can end it."""

import logging
import os
import re
from datetime import datetime

import pytest

import cogvideox_text_to_video_lora
from common.errors import UserError
from common.run_folder import FACTS_FILE, LORA_FILE, METRICS_FILE, NOTES_FILE, REPORT_FILE
from common.text_files import read_rows
from drawn_runs import noted, write_rows, write_run
from planning.held_out import FEWEST_PASSES
from results.run_record import read_run
from run.report import RunReport
from tiny_runs import SIZE, train
from validation.schedule import QUANTILES
from video.io import read_frames


@pytest.fixture
def report(tmp_path):
    """Make the report of a run whose numbers are in the folder already."""
    write_run(tmp_path)
    trackers = []

    def make(started: int = 0, describe=lambda: {"total_steps": 100}) -> RunReport:
        return RunReport(tmp_path, describe, trackers, started)

    return make


def page(folder):
    return (folder / REPORT_FILE).read_text(encoding="utf-8")


def test_a_trained_run_has_a_page_with_its_data_versions_and_the_clip_that_it_aims_at(
    tiny_models, prepared_demo, demo_clips, tmp_path, fresh_accelerator
):
    prompt = (demo_clips / "prompts.txt").read_text().splitlines()[4]
    flags = ["--load_tensors", "--rank", "4", "--max_train_steps", "2", "--report_to", "none", "--no-validate_first"]
    flags += ["--validation_prompt", f"{prompt} slowly", "--num_inference_steps", "1", "--validation_fraction", "0.1"]
    train(cogvideox_text_to_video_lora, tiny_models("5b"), prepared_demo(*SIZE), tmp_path, *flags)
    record = read_run(tmp_path)
    assert record.state["state"] == "finished" and record.total_steps == record.step == 2
    (video,) = record.facts["videos"]
    assert video["target"]["caption"] == prompt and video["target"]["clip"].endswith("clip-004.mp4")
    assert len(read_frames(tmp_path / video["target"]["file"], range(17))) == 17
    assert re.fullmatch(r"[0-9a-f]{12}(, with changes)?", record.facts["revision"])
    assert record.facts["measured"]["clips"].startswith("2 samples (") and record.facts["measured"]["task"]["name"]
    levels = [level for levels in record.facts["measured"]["noise levels"].values() for level in levels]
    assert len(levels) == FEWEST_PASSES and set(levels) < set(QUANTILES)
    assert str(tiny_models("5b")) in record.facts["measured"]["base model"]
    assert record.flags["frame_buckets"] == [17] and record.flags["rank"] == 4
    assert "It has hardly learned yet." in page(tmp_path) and page(tmp_path).count("<video") == 2
    assert f"{tmp_path}/config.yaml --output_dir {tmp_path} " in re.sub(r"</?span[^>]*>", "", page(tmp_path))
    assert (tmp_path / "validation" / "step-2" / LORA_FILE).is_file()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "finished: 40 of 100 steps"),
        (SystemExit(75), "stopped after 40 of 100 steps; it can be continued"),
        (UserError("10 steps\nin a row"), "The run failed: 10 steps"),
        (RuntimeError("<b>"), "The run failed: &lt;b&gt;"),
    ],
)
def test_the_page_says_how_the_run_ended(report, tmp_path, error, said):
    try:
        with report():
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    assert said in page(tmp_path)
    assert not any("NoteHandler" in str(handler) for handler in logging.getLogger().handlers)


def test_the_page_is_rewritten_when_it_is_old_and_names_warnings_with_their_step(report, tmp_path, monkeypatch):
    with report() as running:
        running.log({"loss": 1.0}, step=1)
        (tmp_path / REPORT_FILE).unlink()
        logging.getLogger("any").warning("warning: the disk is full")
        running.log({"loss": 1.0}, step=2)
        assert not (tmp_path / REPORT_FILE).exists()
        monkeypatch.setattr(running, "next_at", 0.0)
        running.log({"loss": 1.0}, step=3)
        assert "the disk is full" in page(tmp_path) and "40 of 100 steps" in page(tmp_path)
    assert [note["step"] for note in read_rows(tmp_path / NOTES_FILE) if "warning" in note] == [1]


def test_a_resumed_run_continues_the_notes_up_to_its_checkpoint(report, tmp_path):
    notes = [noted(state="running"), noted(5, skipped=5), noted(15, skipped=15)]
    write_rows(tmp_path / NOTES_FILE, [*notes, noted(17, 4, state="failed", why="no"), noted(10, 6, state="running")])
    killed = datetime.fromisoformat(noted(minute=9)["time"]).timestamp()
    for name in (NOTES_FILE, METRICS_FILE):
        os.utime(tmp_path / name, (killed, killed))
    with report(started=10):
        pass
    notes = list(read_rows(tmp_path / NOTES_FILE))
    told = [note.get("skipped") or note.get("state") for note in notes]
    assert told == ["running", 5, "failed", "running", None, "running", "finished"]
    assert (4 + 3) * 60 <= read_run(tmp_path).seconds < (4 + 3) * 60 + 30


def test_a_page_that_cannot_be_written_is_one_warning(report, tmp_path, caplog):
    (tmp_path / REPORT_FILE).mkdir()

    def fail():
        raise KeyError("no such column")

    with report(describe=fail) as running:
        running.update(at_once=True)
    assert [message for message in caplog.messages if "cannot be kept up to date" in message] == [
        f"warning: {tmp_path / REPORT_FILE} cannot be kept up to date (KeyError: 'no such column')"
    ]
    assert not (tmp_path / FACTS_FILE).exists()
