"""Logging: line by line, without tokens, repeated messages of libraries only once."""

import logging
import os
import sys
from pathlib import Path

from common.bars import tqdm
from common.hub_token import TOOLKIT, without_tokens
from common.ranks import launch_rank


class TokenFreeFormatter(logging.Formatter):
    """Formats log records and tracebacks without tokens."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        return without_tokens(super().format(record))


class SaidBefore(logging.Filter):
    """Drops repeated messages of libraries; those of the toolkit pass every time."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        message = record.getMessage()
        is_new = message not in self.said or TOOLKIT in Path(record.pathname).parents
        self.said.add(message)
        return is_new


def log_without_tokens(level: int) -> None:
    """Log to stderr without tokens, from this level on."""
    handler = LineHandler()
    handler.addFilter(SaidBefore())
    handler.setFormatter(TokenFreeFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class LineHandler(logging.Handler):
    """Writes records to stderr, above active progress bars."""

    def __init__(self) -> None:
        super().__init__()
        self.process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            if os.getpid() == self.process:
                tqdm.write(self.format(record), file=sys.stderr)
            else:  # a data worker, possibly forked while the bars were locked
                sys.stderr.write(f"{self.format(record)}\n")
        except Exception:  # logging's convention for records that cannot be written
            self.handleError(record)


def start_logging() -> None:
    """Log the messages of the main process, and the errors of the others, to stderr."""
    from huggingface_hub.serialization import _torch as hub_serialization

    level = logging.INFO if launch_rank() == 0 else logging.ERROR
    log_without_tokens(level)
    for chatty in ("accelerate", "httpx", "huggingface_hub", "torchao", "PIL", "DeepSpeed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    hub_serialization.logger.setLevel(logging.WARNING)  # named by its file, not by its package
