"""The page on what goes wrong says what the code does: flags exist, messages are the code's, commands are taken."""

import re

from common.run_folder import LORA_FILE
from pages import (
    broken_links,
    code_blocks,
    flags_of,
    known_flags,
    marked_blocks,
    named_flags,
    noted_calls,
    without_code,
)
from repository import ROOT, TRAINING


FILE = ROOT / "assets" / "docs" / "troubleshooting.md"
PAGE = FILE.read_text(encoding="utf-8")
BLOCKS = marked_blocks(PAGE)
COMMANDS = re.compile(r"--|=|\.(?:py|sh)\b|^(?:hf|ffmpeg) ")  # what to type, not what is printed


def test_every_message_that_the_page_quotes_is_in_the_code():
    modules = (path.read_text(encoding="utf-8") for path in sorted(TRAINING.rglob("*.py")))
    code = re.sub(r"\"\s*\n\s*f?\"", "", "\n".join(modules))  # messages of several lines
    quoted = [
        text for text in re.findall(r"`([^`\n]+)`", without_code(PAGE)) if " " in text and not COMMANDS.search(text)
    ]
    assert len(quoted) > 30
    assert [text for text in quoted if text not in code] == []


def test_every_flag_link_and_file_of_the_page_exists():
    assert named_flags(without_code(PAGE)) <= known_flags()
    assert broken_links(FILE) == []


def test_one_can_go_back_to_an_earlier_step(tmp_path, monkeypatch):
    (tmp_path / "outputs/my-lora/checkpoint-1000").mkdir(parents=True)
    (tmp_path / "outputs/my-lora/checkpoint-1000" / LORA_FILE).touch()
    (tmp_path / "prepared").mkdir()
    monkeypatch.chdir(tmp_path)
    sampled, trained = map(flags_of, noted_calls(BLOCKS["earlier step"], tmp_path))
    lora = f"outputs/my-lora/checkpoint-1000/{LORA_FILE}"
    assert sampled.settings.loras == ((lora, 1.0),)
    assert (trained.lora_weights, trained.learning_rate) == (lora, 5e-5)
    assert code_blocks(PAGE) == list(BLOCKS.values())
