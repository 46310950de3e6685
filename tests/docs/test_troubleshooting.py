"""The page on problems quotes messages of the code, and its commands are accepted."""

import re

from common.run_folder import LORA_FILE
from doc_pages import flags_of, marked_blocks, noted_calls, read_page, without_code
from repository import TRAINING


PAGE = read_page("assets/docs/troubleshooting.md")
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


def test_an_earlier_step_is_sampled_and_trained_further(tmp_path, monkeypatch):
    (tmp_path / "outputs/my-lora/checkpoint-1000").mkdir(parents=True)
    (tmp_path / "outputs/my-lora/checkpoint-1000" / LORA_FILE).touch()
    (tmp_path / "prepared").mkdir()
    monkeypatch.chdir(tmp_path)
    sampled, trained = map(flags_of, noted_calls(BLOCKS["earlier step"], tmp_path))
    lora = f"outputs/my-lora/checkpoint-1000/{LORA_FILE}"
    assert sampled.settings.loras == ((lora, 1.0),)
    assert (trained.lora_weights, trained.learning_rate) == (lora, 5e-5)
    assert BLOCKS.keys() == {"earlier step"}
