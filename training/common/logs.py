"""Logging: line by line, without tokens, repeated messages of libraries only once."""

import logging
import os
import sys
from pathlib import Path

from common.bars import tqdm
from common.hub_token import TOOLKIT, without_tokens
from common.ranks import launch_rank


def log_without_tokens(level: int) -> None:
    """Log to stderr without tokens, from this level on."""
    logging.basicConfig(level=level, format="%(message)s", handlers=[LineHandler()], force=True)


class LineHandler(logging.Handler):
    """Writes records and tracebacks to stderr without tokens, above active progress bars."""

    def __init__(self) -> None:
        super().__init__()
        self.process = os.getpid()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop repeated messages of libraries; those of the toolkit pass every time."""
        message = record.getMessage()
        is_new = message not in self.said or TOOLKIT in Path(record.pathname).parents
        self.said.add(message)
        return is_new

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            text = without_tokens(self.format(record))
            if os.getpid() == self.process:
                tqdm.write(text, file=sys.stderr)
            else:  # a data worker, possibly forked while the bars were locked
                sys.stderr.write(f"{text}\n")
        except Exception:  # logging's convention for records that cannot be written
            self.handleError(record)


def start_logging() -> None:
    """Log the messages of the main process, and the errors of the others, to stderr."""
    from huggingface_hub.serialization import _torch as hub_serialization

    log_without_tokens(logging.INFO if launch_rank() == 0 else logging.ERROR)
    for chatty in ("accelerate", "httpx", "huggingface_hub", "torchao", "PIL", "DeepSpeed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    hub_serialization.logger.setLevel(logging.WARNING)  # named by its file, not by its package
