"""The page on scores shows what score_clips.py and --keep do with the drawn clips."""

import csv
import re

import pytest

import score_clips
from cli.conditions import parse_condition
from doc_pages import flags_of, marked_blocks, noted_calls, read_page, script_flags, script_of, table_rows
from footage.score_table import COLUMNS
from make_demo_clips import make_demo_clips
from planning.plan import plan_raw_clips


PAGE = read_page("assets/docs/scores.md")
BLOCKS = marked_blocks(PAGE)
OUTPUTS = [text for language, text in re.findall(r"```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL) if not language]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text)]


def assert_alike(text: str, shown: str) -> None:
    """Compare texts, whose numbers may differ by a twentieth."""
    assert re.sub(r"[\d.e-]+", "0", text) == re.sub(r"[\d.e-]+", "0", shown)
    assert numbers(text) == pytest.approx(numbers(shown), rel=0.05)


def test_the_commands_print_and_write_what_the_page_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_demo_clips(tmp_path / "try/clips")
    (tmp_path / "try/model").mkdir()
    (tmp_path / "try/model/model_index.json").touch()
    _, scored = noted_calls(BLOCKS["score"], tmp_path)
    capsys.readouterr()
    score_clips.main([*script_flags(scored), "--num_workers", "1"])
    wrote, command = capsys.readouterr().out.splitlines()
    assert wrote == OUTPUTS[0].splitlines()[0]
    assert command.endswith(OUTPUTS[0].splitlines()[1].removeprefix("python training/"))
    with open("try/clips/scores.csv", encoding="utf-8", newline="") as file:
        written = {row["video"]: row for row in csv.DictReader(file)}
    for row in csv.DictReader(OUTPUTS[1].splitlines()):
        assert_alike(",".join(written[row["video"]][name] for name in row), ",".join(row.values()))

    _, prepared = noted_calls(BLOCKS["keep"], tmp_path)
    settings = flags_of(prepared).settings
    data = plan_raw_clips(settings.sources, settings.clips)
    listed = [f"  {clip}" for clip in data.dropped]
    assert_alike("\n".join(listed), "\n".join(OUTPUTS[2].splitlines()[1 : 1 + len(listed)]))
    assert OUTPUTS[2].splitlines()[0] == f"{len(listed)} of the clips are dropped by --keep:"
    assert BLOCKS.keys() == {"score", "keep"}
    assert script_of(prepared) == "prepare_dataset.py"


def test_the_page_explains_every_column_and_its_conditions_can_be_read():
    rows = [cells for cells in table_rows(PAGE) if len(cells) == 4]
    explained = re.findall(r"`(\w+)`", " ".join(cells[0] for cells in rows))
    assert explained == [name for name in COLUMNS if name not in ("video", "start_frame", "end_frame", "sha256")]
    for condition in filter(None, (cells[3].strip("`") for cells in rows[1:])):
        assert parse_condition(condition).names.keys() <= set(explained)
