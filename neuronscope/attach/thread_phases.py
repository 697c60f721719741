"""Decide in which phase each thread runs the model, and whether counting is paused there."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from neuronscope.attach.single_thread import CountedThread

__all__ = ["ThreadPhases"]


class ThreadPhases:
    """Hold the phase and the pauses of each thread.

    Those of the thread in which the watch began are also those of every thread that has none of its own, except one
    that trains.

    Args:
        counted: Says which thread is counted.
        got_gradients: Returns whether a gradient has arrived in it.
    """

    def __init__(self, counted: CountedThread, got_gradients: Callable[[], bool]) -> None:
        self._counted = counted
        self._got_gradients = got_gradients
        self._home = threading.get_ident()
        self._phases: dict[int, str] = {}
        self._pauses: Counter[int] = Counter()

    @property
    def running(self) -> Collection[str]:
        """The phases that threads are in."""
        return self._phases.values()

    @property
    def name(self) -> str:
        """The phase of the counted thread."""
        return self._of(self._counted_thread()) if self._phases else "train"

    def state(self) -> tuple[str, bool]:
        """Return the phase of the counted thread, and whether counting is paused in it."""
        if not (self._phases or self._pauses):  # most often, at the end of each step
            return "train", False
        thread = self._counted_thread()
        return self.name, thread in self._pauses or (self._home in self._pauses and self._is_guided(thread))

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[bool]:
        """Set the phase of this thread.

        Args:
            name: The phase.

        Yields:
            Whether it is another phase than before, so that its pass ends with the block.
        """
        here = threading.get_ident()
        before, own = self._of(here), self._phases.get(here)
        self._phases[here] = name
        try:
            yield name not in ("train", before)
        finally:
            if own is None:
                self._phases.pop(here, None)
            else:
                self._phases[here] = own

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Pause counting in this thread."""
        here = threading.get_ident()
        self._pauses[here] += 1
        try:
            yield
        finally:
            self._pauses[here] -= 1
            if not self._pauses[here]:
                del self._pauses[here]

    def is_counted(self) -> bool:
        """Return whether this thread is the counted one, or the one in which the watch began."""
        return threading.get_ident() in (self._home, self._counted_thread())

    def _counted_thread(self) -> int:
        return self._counted.elsewhere() or threading.get_ident()

    def _of(self, thread: int) -> str:
        guide = self._home if self._is_guided(thread) else thread
        return self._phases.get(thread) or self._phases.get(guide, "train")

    def _is_guided(self, thread: int) -> bool:
        """Return whether phases and pauses of the thread in which the watch began are also those of another one."""
        trains = thread == self._counted.thread and self._got_gradients()
        return thread != self._home and not trains
