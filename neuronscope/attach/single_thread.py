"""One thread at a time: what a model does in several threads at once cannot be told apart.

Torch keeps a stack of function modes for each thread, and a forward is followed from its first call to its last. So one
thread has its turn until its forward ends, and what runs in others meanwhile is left alone.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from neuronscope.attach.compiling import is_tracing, thread_id

__all__ = ["EnteredMode", "SingleThread"]


class SingleThread:
    """Whose forward is watched.

    >>> turn = SingleThread()
    >>> turn.is_ours()
    True
    """

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def is_ours(self) -> bool:
        """Whether this thread has the turn; it takes it where nobody has it. A compiled graph is traced in one."""
        if is_tracing():
            return True
        here = threading.get_ident()
        return self._taken.setdefault("thread", here) == here

    def is_taken_here(self) -> bool:
        """Whether this thread took the turn."""
        return self._taken.get("thread") == threading.get_ident()

    def free(self) -> bool:
        """Take the turn from a thread that has ended, and say whether there was one."""
        owner = self._taken.get("thread")
        return owner is not None and owner not in sys._current_frames() and self._taken.pop("thread", None) == owner

    def end(self) -> None:
        """The forward is over: the next may come in any thread."""
        if not is_tracing():
            self._taken.clear()


class EnteredMode:
    """A function mode that is entered at most once in a thread, and left in a thread that entered it only.

    Args:
        mode: The mode.
    """

    def __init__(self, mode: TorchFunctionMode) -> None:
        self._mode = mode
        self._threads: list[int] = []  # those that entered it; one that was interrupted may never leave
        self._suspended: list[int] = []  # those of them that left it for a while

    def enter(self, *, handling: bool) -> None:
        """Enter the mode, unless it is entered.

        Args:
            handling: See :meth:`leave`.
        """
        here = self._threads[-1] if is_tracing() and self._threads else thread_id()
        if here not in self._threads:
            self._threads.append(here)
            self._mode.__enter__()
        elif not (is_tracing() or handling or self._is_on_stack()):
            self._mode.__enter__()  # a thread of that number was ended by an interrupt, and the mode with it

    def _is_on_stack(self) -> bool:
        depth = torch._C._len_torch_function_stack()
        return any(torch._C._get_function_stack_at(place) is self._mode for place in range(depth))

    def leave(self, *, handling: bool) -> None:
        """Leave the mode, if this thread entered it: the stack of another is not ours to touch.

        Args:
            handling: Whether the mode handles a call. Then torch has taken it off the stack and puts it back after the
                call: :meth:`take_off_next` is for that.
        """
        here = self._threads[-1] if is_tracing() and self._threads else thread_id()
        if here in self._threads:
            self._threads.remove(here)
            if here in self._suspended:
                self._suspended.remove(here)
            elif is_tracing():
                self._mode.__exit__(None, None, None)
            elif not handling:
                self._take_out()

    def take_off_next(self) -> None:
        """Take the mode off this thread's stack as soon as torch has put it back there, after the call that it handles.

        Nothing of ours runs then. But Python tells a profile function of whatever is called or returns next, and that
        takes the mode off, and itself. Where a profiler is at work it is left alone: the mode stays, and passes on
        what it is given, until this is called without one.
        """
        if sys.getprofile() is None:
            sys.setprofile(self._take_off)

    def _take_off(self, *_: Any) -> None:
        last = torch._C._len_torch_function_stack() - 1
        if last >= 0 and torch._C._get_function_stack_at(last) is self._mode:
            torch._C._pop_torch_function_stack()
            sys.setprofile(None)

    def _take_out(self) -> None:
        """Take the mode off this thread's stack; others that were entered since then stay on it.

        Where it is not there, somebody left who takes off whatever is on top, as ``torch.device`` does: after an
        interrupt that was ours. Then theirs is still there, and goes in its place.
        """
        above: list[Any] = []
        while torch._C._len_torch_function_stack() and self._mode not in above:
            above.append(torch._C._pop_torch_function_stack())
        if self._mode in above:
            above.remove(self._mode)
        else:
            del above[:1]
        for mode in reversed(above):
            torch._C._push_on_torch_function_stack(mode)

    def suspend(self) -> None:
        """Leave the mode for a while, where nothing can be seen: only if it is entered, and no other since then."""
        if is_tracing():
            return
        here = threading.get_ident()
        if here in self._threads and torch._C._len_torch_function_stack():
            last = torch._C._pop_torch_function_stack()
            if last is self._mode:
                self._suspended.append(here)
            else:
                torch._C._push_on_torch_function_stack(last)

    def resume(self) -> None:
        """Enter the mode again, if it was left for a while."""
        if not self._suspended or is_tracing():
            return
        here = threading.get_ident()
        if here in self._suspended:
            self._suspended.remove(here)
            torch._C._push_on_torch_function_stack(self._mode)
