"""What is logged, and how: line by line, without tokens, library chatter once."""

import logging
import os
import sys
from pathlib import Path

from common.bars import tqdm
from common.hub_token import TOOLKIT, without_tokens
from common.ranks import launch_rank


class TokenFreeFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without tokens."""

    def format(self, record: logging.LogRecord) -> str:
        """What is written of a record."""
        return without_tokens(super().format(record))


class SaidBefore(logging.Filter):
    """Lets what a library logs through once; what the toolkit itself has to say, every time."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        message = record.getMessage()
        is_new = message not in self.said or TOOLKIT in Path(record.pathname).parents
        self.said.add(message)
        return is_new


def log_without_tokens(level: int) -> None:
    """Write what the toolkit and its libraries log to stderr, message by message, and no token.

    Args:
        level: what is less than that is not written.
    """
    handler = LineHandler()
    handler.addFilter(SaidBefore())
    handler.setFormatter(TokenFreeFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class LineHandler(logging.Handler):
    """Writes records to stderr, above the bars that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            if os.getpid() == self.process:
                tqdm.write(self.format(record), file=sys.stderr)
            else:  # a data worker, which may have been forked while the bars were locked
                sys.stderr.write(f"{self.format(record)}\n")
        except Exception:  # whatever it is: logging's own way with what cannot be written
            self.handleError(record)


def start_logging() -> None:
    """Write what the main process has to say, and the errors of the others, to stderr."""
    from huggingface_hub.serialization import _torch as hub_serialization

    level = logging.INFO if launch_rank() == 0 else logging.ERROR
    log_without_tokens(level)
    for chatty in ("accelerate", "httpx", "huggingface_hub", "torchao", "PIL", "DeepSpeed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    hub_serialization.logger.setLevel(logging.WARNING)  # named by its file, not by its package
