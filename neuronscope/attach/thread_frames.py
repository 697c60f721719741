"""Read what each thread of the process runs."""

from __future__ import annotations

import gc
import sys
import threading
from types import FrameType

__all__ = ["frames_of_threads"]

_reading = threading.RLock()


def frames_of_threads() -> dict[int, FrameType]:
    """Return the running frame of each thread, by the number of the thread.

    Before Python 3.12, ``sys._current_frames`` holds a lock of the interpreter while it makes the frames, and the
    garbage collector may start there. If what the collector frees lets another thread run, and this one asks too, each
    of the two waits for the other for ever (https://github.com/python/cpython/issues/106883). So the collector is off
    meanwhile.
    """
    if sys.version_info >= (3, 12):
        return sys._current_frames()
    with _reading:  # so that no other thread turns the collector on
        enabled = gc.isenabled()
        try:
            gc.disable()  # in here, because an interrupt may come as soon as it returns
            return sys._current_frames()
        finally:
            if enabled:
                gc.enable()
