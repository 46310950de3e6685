"""Progress bars for long operations.

Every module imports `tqdm` from here, so that these settings precede its import and apply to libraries too.
"""

import os
import sys
import threading


# No bar for less than a second, such as the small files that libraries load one by one.
os.environ.setdefault("TQDM_DELAY", "1")
if not sys.stderr.isatty():  # a file keeps every line
    os.environ.setdefault("TQDM_MININTERVAL", "10")

from tqdm import tqdm


__all__ = ["tqdm"]

# A lock for this process only: data workers show no bars, and a killed one must not hold the lock of all.
tqdm.set_lock(threading.RLock())
