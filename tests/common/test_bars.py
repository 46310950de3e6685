"""Only long operations have bars, and log lines do not mix with them."""

import logging
import subprocess
import sys

from common.bars import tqdm
from common.logs import LineHandler, log_without_tokens
from repository import TRAINING


def test_a_log_message_during_a_bar_is_on_a_separate_line(capsys):
    logger = logging.Logger("finetune")
    logger.addHandler(LineHandler())
    with tqdm(total=2, desc="Training", delay=0) as bar:
        bar.update()
        bar.refresh()
        logger.info("about %s left", "2 h")
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "about 2 h left" in lines
    assert any(line.startswith("Training:  50%") for line in lines)


def test_in_a_file_there_are_no_short_bars_and_few_updates():
    code = (
        "import planning.plan\n"  # as the scripts import it, before any library
        "import tqdm.auto\n"
        "for _ in tqdm.auto.tqdm(range(100), desc='Loading weights'): pass\n"
        "bar = tqdm.auto.tqdm(total=100)\n"
        "print(bar.delay, bar.mininterval)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TRAINING, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("1.0 10.0\n", "")


def test_only_repeated_messages_of_libraries_are_dropped(capsys):
    log_without_tokens(logging.INFO)
    ours = logging.makeLogRecord({"name": "checkpoints", "pathname": str(TRAINING / "checkpoints.py"), "levelno": 30})
    theirs = logging.makeLogRecord({"name": "torchao.utils", "pathname": "/site/torchao/utils.py", "levelno": 30})
    for record in (ours, theirs):
        for text in ("careful", "careful", "another"):
            record.msg = f"{record.name}: {text}"
            logging.getLogger().handle(record)
    *ours, one, other = capsys.readouterr().err.splitlines()
    assert ours == ["checkpoints: careful", "checkpoints: careful", "checkpoints: another"]
    assert (one, other) == ("torchao.utils: careful", "torchao.utils: another")
