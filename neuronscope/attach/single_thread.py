"""Watch one thread at a time: the calls of several threads that run a model at once cannot be told apart.

Torch keeps a stack of function modes for each thread, and a forward is tracked from its first call to its last. So one
thread is watched until its forward ends, and what other threads run meanwhile is not counted.
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
    """Says which thread is watched.

    >>> SingleThread().acquire()
    True
    """

    def __init__(self) -> None:
        self._watched: dict[str, int] = {}

    def acquire(self) -> bool:
        """Make this thread the watched one if there is none, and return whether it is the watched one.

        A graph is traced in one thread, so this is true while ``torch.compile`` traces.
        """
        if is_tracing():
            return True
        here = threading.get_ident()
        return self._watched.setdefault("thread", here) == here

    def is_here(self) -> bool:
        """Whether this thread is the watched one."""
        return self._watched.get("thread") == threading.get_ident()

    def release_if_ended(self) -> bool:
        """Forget the watched thread if it has ended, and return whether it had."""
        owner = self._watched.get("thread")
        return owner is not None and owner not in sys._current_frames() and self._watched.pop("thread", None) == owner

    def release(self) -> None:
        """Forget the watched thread: its forward is over, and the next one may run in any thread."""
        if not is_tracing():
            self._watched.clear()


class EnteredMode:
    """Enters a function mode at most once in a thread, and leaves it only in a thread that entered it.

    Args:
        mode: The mode.
    """

    def __init__(self, mode: TorchFunctionMode) -> None:
        self._mode = mode
        self._threads: list[int] = []  # that entered it; one that was interrupted may never leave
        self._suspended: list[int] = []  # those of them that left it until `resume`

    def enter(self, *, handling: bool) -> None:
        """Enter the mode, unless this thread has entered it.

        Args:
            handling: See :meth:`leave`.
        """
        here = self._threads[-1] if is_tracing() and self._threads else thread_id()
        if here not in self._threads:
            self._threads.append(here)
            self._mode.__enter__()
        elif not (is_tracing() or handling or self._is_on_stack()):
            self._mode.__enter__()  # an interrupt ended an earlier thread of this number, and its mode

    def _is_on_stack(self) -> bool:
        depth = torch._C._len_torch_function_stack()
        return any(torch._C._get_function_stack_at(place) is self._mode for place in range(depth))

    def leave(self, *, handling: bool) -> None:
        """Leave the mode if this thread entered it; the stack of another thread cannot be changed.

        Args:
            handling: Whether the mode is handling a call. Then torch has taken it off the stack and puts it back after
                the call, and :meth:`take_off_next` must be called for it.
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

        None of our code runs at that moment. But Python calls the profile function at the next call or return, and
        ours takes the mode off, and then itself. A profiler of the user's is left alone. Then the mode stays, and
        passes calls on unchanged, until this is called while no profiler is set.
        """
        if sys.getprofile() is None:
            sys.setprofile(self._take_off)

    def _take_off(self, *_: Any) -> None:
        last = torch._C._len_torch_function_stack() - 1
        if last >= 0 and torch._C._get_function_stack_at(last) is self._mode:
            torch._C._pop_torch_function_stack()
            sys.setprofile(None)

    def _take_out(self) -> None:
        """Take the mode off this thread's stack; modes that were entered after it stay.

        If the mode is not there, another one took it off in error: after an interrupt, ``torch.device`` and others take
        off whatever is on top. Then the other one is still on the stack, and is taken off instead.
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
        """Leave the mode until :meth:`resume`, if this thread entered it and no other mode after it."""
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
        """Enter the mode again, if :meth:`suspend` left it."""
        if not self._suspended or is_tracing():
            return
        here = threading.get_ident()
        if here in self._suspended:
            self._suspended.remove(here)
            torch._C._push_on_torch_function_stack(self._mode)
