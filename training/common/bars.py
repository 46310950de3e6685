"""Progress bars, with rate and time left, for what takes long; what is logged meanwhile stands in lines of its own.

Every module takes `tqdm` from here, so that these settings are there before it is imported: they hold for the bars of
libraries too.
"""

import logging
import os
import sys
import threading


# What is done within a second needs no bar: the small files that libraries load and write one by one.
os.environ.setdefault("TQDM_DELAY", "1")
if not sys.stderr.isatty():  # a file, which keeps each line
    os.environ.setdefault("TQDM_MININTERVAL", "10")

from tqdm import tqdm


__all__ = ["LineHandler", "tqdm"]

# Of one process: data workers show no bars, and one that is killed must not keep the lock of all.
tqdm.set_lock(threading.RLock())


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
