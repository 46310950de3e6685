"""Progress bars, with rate and time left, for what takes long; what is logged meanwhile stands in lines of its own.

Every module takes `tqdm` from here, so that these settings are there before it is imported: they hold for the bars of
libraries too.
"""

import os
import sys
import threading


# What is done within a second needs no bar: the small files that libraries load and write one by one.
os.environ.setdefault("TQDM_DELAY", "1")
if not sys.stderr.isatty():  # a file, which keeps each line
    os.environ.setdefault("TQDM_MININTERVAL", "10")

from tqdm import tqdm


__all__ = ["tqdm"]

# Of one process: data workers show no bars, and one that is killed must not keep the lock of all.
tqdm.set_lock(threading.RLock())
