"""Draw in a thread of its own, so that training does not wait for pictures.

The thread lives only while there is something to draw. It is no daemon: Python waits for it before the program ends,
for whatever reason it ends, and nothing needs to be shut down. Most of a drawing is numpy and compression, which
release the interpreter's lock, so that the training loop runs on.

A process that is forked while the thread draws (a worker of a ``DataLoader``) would inherit the locks that the thread
holds at that moment, such as that of a module that is being imported, and no thread that releases them: it would wait
for ever. So a fork waits until the drawing at work is done.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["MOST_WAITING", "BackgroundDrawer"]

#: Drawings that may wait for their turn. A caller that adds one more waits until there is room.
MOST_WAITING = 4

Job = Callable[[], None]

#: A fork gives up waiting after this time, should a drawing wait for what the forking thread holds.
LONGEST_WAIT_FOR_DRAWING_S = 60.0


class _Forking(threading.local):
    """What a thread holds while it forks: the locks of all drawers, so that none is at work."""

    held: tuple[threading.RLock, ...] = ()

    def begin(self) -> None:
        locks = [drawer._at_work for drawer in tuple(_drawers)]
        self.held = tuple(lock for lock in locks if lock.acquire(timeout=LONGEST_WAIT_FOR_DRAWING_S))

    def end(self) -> None:
        for lock in self.held:
            lock.release()
        self.held = ()


_drawers: weakref.WeakSet[BackgroundDrawer] = weakref.WeakSet()
_forking = _Forking()
if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_forking.begin, after_in_parent=_forking.end, after_in_child=_forking.end)


class BackgroundDrawer:
    """Runs jobs one after another, in the order in which they came, in a thread of its own.

    An exception of a job is kept, and raised in the caller's thread by the next :meth:`check`. A copy, or what is sent
    to another process, begins with no jobs.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._at_work = threading.RLock()
        _drawers.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def draw(self, job: Job) -> None:
        """Queue a job. If no thread can be started, run it here and now. Raise what an earlier job raised."""
        with self._changed:
            while len(self._waiting) >= MOST_WAITING:
                self._changed.wait()
            self._waiting.append(job)
            without_thread = self._thread is None and not self._start_thread()
        if without_thread:
            self._run_jobs()
        self.check()

    def _start_thread(self) -> bool:
        thread = threading.Thread(target=self._run_jobs, name="neuronscope drawing", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # Python is shutting down, or was built without threads
            return False
        self._thread = thread
        return True

    def _run_jobs(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    return
                job = self._waiting.popleft()
                self._changed.notify_all()
            try:
                with self._at_work:
                    job()
            except Exception as error:  # noqa: BLE001  # raised again in the training's thread, by `check`
                self._error = error

    def finish(self) -> None:
        """Wait until all jobs are done, and raise what one of them raised."""
        thread = self._thread
        if thread is not None:
            thread.join()
        self.check()

    def check(self) -> None:
        """Raise the last exception of a job since the previous call, if there was one."""
        error, self._error = self._error, None
        if error is not None:
            raise error
