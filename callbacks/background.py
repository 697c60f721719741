"""Drawing in a thread of its own, so that training does not wait for pictures.

The thread lives only while there is something to draw, and is no daemon: Python waits for it before it ends, whatever
ended the program, and nothing needs to be shut down. Most of a drawing is numpy and compression, which leave the
interpreter to the training loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["MOST_WAITING", "BackgroundDrawer"]

#: Drawings that may wait for their turn; who brings one more waits until there is room.
MOST_WAITING = 4

Job = Callable[[], None]


class BackgroundDrawer:
    """Runs jobs one after another, in the order in which they came, in a thread of its own.

    What goes wrong in a job is kept for whoever asks next, in their own thread: see :meth:`check`. A copy, or what is
    sent to another process, has nothing to draw.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def draw(self, job: Job) -> None:
        """Have a job done soon; at once, and here, where no thread can be started.

        Raises:
            Exception: What went wrong in an earlier job; this one is taken all the same.
        """
        with self._changed:
            while len(self._waiting) >= MOST_WAITING:
                self._changed.wait()
            self._waiting.append(job)
            alone = self._thread is None and not self._start()
        if alone:
            self._work()
        self.check()

    def _start(self) -> bool:
        thread = threading.Thread(target=self._work, name="neuronscope drawing", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # Python is shutting down, or was built without threads
            return False
        self._thread = thread
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    return
                job = self._waiting.popleft()
                self._changed.notify_all()
            try:
                job()
            except Exception as error:  # noqa: BLE001  # told to the training's own thread, by `check`
                self._failure = error

    def finish(self) -> None:
        """Wait until all is drawn.

        Raises:
            Exception: What went wrong in a job.
        """
        thread = self._thread
        if thread is not None:
            thread.join()
        self.check()

    def check(self) -> None:
        """Raise what went wrong in a job since somebody asked last.

        Raises:
            Exception: That.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
