"""Count one thread: the calls of several threads that run a model at once cannot be told apart.

A forward is tracked from its first call to its last, and torch keeps a stack of function modes for each thread. So the
forwards of one thread are counted, and what other threads run beside it is left alone.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from neuronscope.attach.compiling import in_backward, is_tracing
from neuronscope.attach.interrupts import is_on_stack
from neuronscope.attach.thread_frames import frames_of_threads

if TYPE_CHECKING:
    from neuronscope.attach.recorder import SiteRecorder

__all__ = ["CountedThread", "EnteredMode", "Turns", "enclosing_modules"]

# Under names that are quick to find.
_count_modes = torch._C._len_torch_function_stack
_pop_mode, _push_mode = torch._C._pop_torch_function_stack, torch._C._push_on_torch_function_stack

#: Functions in which a thread waits for others, by their modules.
_WAITING = {
    "concurrent.futures.thread": {"_worker"},
    "multiprocessing.connection": {"wait"},
    "queue": {"get"},
    "selectors": {"select"},
    "threading": {"_wait_for_tstate_lock", "join", "wait"},
}
_BACKWARD = {"torch.autograd.graph": {"_engine_run_backward"}}
#: Seconds for which a thread that trains waits, once, until one that does not gives its place up.
_PATIENCE = 0.2


class CountedThread:
    """Says which thread is counted: the first that runs the model, until it ends.

    Another thread takes its place

    - if it waits for others, has got no gradient, and no thread has yet run the model beside it: then the model is run
      in one thread after another;
    - if it ran without gradients only, and the other one begins a forward with gradients.

    During a backward pass, for which the counted thread waits, forwards that recompute activations run in autograd's
    thread.

    Attributes:
        here: The thread whose next forward is counted: the counted one, or autograd's.
        thread: The counted thread; ``None`` if none has run the model yet.
        in_forward: The thread while a forward of it is running, and else ``None``.
        graded: Whether it began a forward with gradients.
        shared: Whether another thread was turned away.
        claimed: Set when the counted thread has given its place up to the one that asked; ``None`` if none asks.
        claimer: The thread that asked last.
    """

    def __init__(self) -> None:
        self.here: int | None = None
        self.thread: int | None = None
        self.in_forward: int | None = None
        self.graded = False
        self.shared = False
        self.claimed: threading.Event | None = None
        self.claimer = 0

    def become(self, thread: int) -> None:
        """Count another thread from now on.

        Args:
            thread: The thread.
        """
        self.here = self.thread = thread
        self.in_forward, self.graded = None, False
        self.claimed = None

    def is_here(self) -> bool:
        """Whether this thread's calls are counted."""
        return self.here == threading.get_ident()

    def elsewhere(self) -> int | None:
        """Return the counted thread if it is another one that has not ended, otherwise ``None``."""
        return None if self.thread == threading.get_ident() or self.ended() else self.thread

    def ended(self) -> bool:
        """Whether no thread is counted, or it has ended."""
        return self.thread is None or self.thread not in frames_of_threads()

    def waits(self, *, for_backward: bool = False) -> bool:
        """Whether the counted thread waits for other threads.

        Args:
            for_backward: Whether autograd's threads, which run a backward pass for it, are others too.
        """
        frame = frames_of_threads().get(self.thread or 0)
        if frame is None:
            return False
        name, module = frame.f_code.co_name, frame.f_globals.get("__name__", "")
        return name in _WAITING.get(module, ()) or (for_backward and name in _BACKWARD.get(module, ()))

    def let_it_wait(self, is_busy: Callable[[], bool], *, for_backward: bool) -> None:
        """Give the counted thread a moment, once, to wait for this one, which it may just have started.

        Args:
            is_busy: Whether it runs the model itself.
            for_backward: As of :meth:`waits`.
        """
        for _ in range(20):
            if self.shared or self.ended() or self.waits(for_backward=for_backward) or is_busy():
                break
            time.sleep(0.001)

    def runs(self, frame: FrameType) -> bool:
        """Whether a frame is on the stack of the counted thread.

        Args:
            frame: A frame that may have ended.
        """
        last = frames_of_threads().get(self.thread or 0)
        return last is not None and is_on_stack(frame, last)

    def name(self) -> str:
        """Return the name of the counted thread."""
        for thread in threading.enumerate():
            if thread.ident == self.thread:
                return thread.name
        return f"{self.thread}"

    def claim(self, claimer: int) -> bool:
        """Ask the counted thread to give its place up at the next hook of ours that it runs, and return if it did.

        It is waited for once, and shortly.

        Args:
            claimer: The thread that asks.
        """
        if self.claimed is not None:
            return False
        self.claimed, self.claimer = threading.Event(), claimer
        self.in_forward = None  # so that it looks
        return self.claimed.wait(_PATIENCE)


class Watched(Protocol):
    """What is watched, as far as threads matter; see :class:`neuronscope.attach.hooks.HookManager`."""

    observing: bool

    def is_attached(self) -> bool:
        """Return whether hooks are on the model."""

    def is_busy(self) -> bool:
        """Return whether the counted thread runs a forward, or is in an explicit step."""

    def is_inside(self, caller: FrameType) -> bool:
        """Return whether a module that calls its hooks runs inside another one of the model."""

    def end(self) -> None:
        """Reset the state of a forward."""

    def observe(self) -> None:
        """Set the phase, the step and whether they are observed, for the counted thread."""


class Turns:
    """Decides whether a forward that begins is counted, and gives the place of the counted thread to another one.

    Args:
        watch: What is watched.
        recorder: Records what the counted thread runs.
        thread: The counted thread.
    """

    def __init__(self, watch: Watched, recorder: SiteRecorder, thread: CountedThread) -> None:
        self._watch = watch
        self._recorder = recorder
        self._thread = thread
        self._postponed = False  # whether `observe` is to be called when the next forward begins
        self._may_be_inside = False  # whether a forward may be running of which nothing was observed

    def take_for_step(self) -> bool:
        """Make this thread, in which an explicit step begins, the counted one if it may be; return whether it is."""
        here = threading.get_ident()
        if self._thread.thread != here:
            if not self._may_be_taken(claims=not self._trains()):
                return False
            self._change_thread(here)
        return True

    def take(self, caller: FrameType, begins: bool) -> bool:
        """Begin a forward in this thread, if it is the counted one or may be, and return whether to count it.

        Args:
            caller: The frame that calls a hook.
            begins: Whether a forward may begin with it.
        """
        thread, here = self._thread, threading.get_ident()
        if thread.here == here and thread.claimed is None:  # most often; nothing is observed once the hooks are off
            return begins and self.begin(caller)
        with self._recorder.lock:
            if not self._watch.is_attached():
                return False
            if thread.thread == here and thread.claimed is not None:
                self._give_up()
                return False
            if thread.here == here:
                return begins and self.begin(caller)
            if not begins or self._watch.is_inside(caller):
                return False
            if thread.thread == here:  # another one ran in its place during its backward pass
                thread.here = here
                return self.begin(caller)
        backward = in_backward()
        thread.let_it_wait(self._watch.is_busy, for_backward=backward)
        with self._recorder.lock:
            if backward and not thread.ended():
                if self._watch.is_busy() or not thread.waits(for_backward=True):
                    return False
                thread.here = here
                return self.begin(caller)
            claims = torch.is_grad_enabled() and not self._trains()
            if self._may_be_taken(claims):
                self._change_thread(here)
                return self.begin(caller)
        if claims and not thread.waits() and thread.claim(here):
            with self._recorder.lock:
                if thread.thread == here:
                    thread.here = here
                    return self.begin(caller)
        self._note_turned_away()
        return False

    def _trains(self) -> bool:
        """Whether the counted thread ran any forward with gradients."""
        return self._thread.graded or self._recorder.got_gradients

    def _may_be_taken(self, claims: bool) -> bool:
        """Whether another thread may become the counted one at once.

        Args:
            claims: Whether it has gradients, and the counted one had none.
        """
        thread = self._thread
        if thread.ended():
            return True
        in_turn = thread.waits() and not thread.shared and not self._recorder.got_gradients
        return (claims or in_turn) and not self._watch.is_busy()

    def _give_up(self) -> None:
        """Give the place of the counted thread to the one that asks for it."""
        claimer, claimed = self._thread.claimer, self._thread.claimed
        self._stop_forward()
        self._change_thread(claimer)
        self._thread.here = None  # its next call may be in the middle of a forward
        if claimed is not None:
            claimed.set()
        self._note_turned_away()

    def _change_thread(self, thread: int) -> None:
        """Count another thread from now on."""
        if self._thread.in_forward is not None:  # an interrupt ended the last thread
            self._stop_forward()
        self._thread.become(thread)
        self._recorder.got_gradients = self._postponed = False
        self._watch.observe()

    def _stop_forward(self) -> None:
        """Forget the forward that runs: its thread has ended, or is counted no more."""
        self._recorder.forward.restart()
        self._watch.end()

    def _note_turned_away(self) -> None:
        self._thread.shared = True
        self._recorder.unmeasured.reasons["(root)"] = (
            f"it ran in several threads at once, and only what the thread {self._thread.name()} ran was counted: run "
            "it in one thread, or run and watch a copy of it (`copy.deepcopy`) in each"
        )

    def begin(self, caller: FrameType) -> bool:
        """Note that a forward begins in this thread if it is the counted one, and return whether to count it.

        Args:
            caller: The frame that calls the hook of its outermost module.
        """
        with self._recorder.lock:
            if self._thread.here != threading.get_ident():
                return False
            if self._thread.claimed is not None:
                self._give_up()
                return False
            if self._postponed:
                self._postponed = False
                self._watch.observe()
            if self._may_be_inside:
                if self._watch.is_inside(caller):
                    return False
                self._may_be_inside = False
            if self._watch.observing:
                self._thread.in_forward = self._thread.here
                self._thread.graded = self._thread.graded or torch.is_grad_enabled()
            return self._watch.observing

    def change(self) -> None:
        """Have the phase and the step set: now, or when the next forward begins if another thread is counted.

        Between its forward and its backward pass, what is known of that forward is needed still.
        """
        with self._recorder.lock:
            elsewhere = self._thread.elsewhere() is not None
            self._postponed = elsewhere and self._watch.observing
            if not self._postponed:
                self._watch.observe()
                self._may_be_inside |= elsewhere and self._watch.observing


def enclosing_modules(frame: FrameType) -> list[nn.Module]:
    """Return the modules whose calls are running on a stack, the innermost first.

    Args:
        frame: The last frame of the stack to look at.
    """
    found: list[nn.Module] = []
    above: FrameType | None = frame
    while above is not None:
        if above.f_code is nn.Module._call_impl.__code__:
            found.append(above.f_locals["self"])
        above = above.f_back
    return found


class EnteredMode:
    """Enters a function mode at most once in a thread, and leaves it only in a thread that entered it.

    Args:
        mode: The mode.

    Attributes:
        threads: Those that entered it; one that was interrupted may never leave.
    """

    def __init__(self, mode: TorchFunctionMode) -> None:
        self._mode = mode
        self.threads: list[int] = []
        self._suspended: list[int] = []  # those of them that left it until `resume`

    def enter(self, *, handling: bool) -> None:
        """Enter the mode, unless this thread has entered it.

        Args:
            handling: See :meth:`leave`.
        """
        traced = is_tracing()
        here = self._here() if traced else threading.get_ident()
        if here not in self.threads:
            self.threads.append(here)
            if traced:
                self._mode.__enter__()
            else:
                _push_mode(self._mode)
        elif not (traced or handling or self._is_on_stack()):
            self._mode.__enter__()  # an interrupt ended an earlier thread of this number, and its mode

    def _here(self) -> int:
        """Return the number of the thread in which the compiler traces, which cannot trace that question."""
        return self.threads[-1] if self.threads else 0

    def _is_on_stack(self) -> bool:
        depth = torch._C._len_torch_function_stack()
        return any(torch._C._get_function_stack_at(place) is self._mode for place in range(depth))

    def leave(self, *, handling: bool) -> None:
        """Leave the mode if this thread entered it; the stack of another thread cannot be changed.

        Args:
            handling: Whether the mode is handling a call. Then torch has taken it off the stack and puts it back after
                the call, and :meth:`take_off_next` must be called for it.
        """
        if not self.threads:
            return
        traced = is_tracing()
        here = self._here() if traced else threading.get_ident()
        if here in self.threads:
            self.threads.remove(here)
            if here in self._suspended:
                self._suspended.remove(here)
            elif traced:
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
        while _count_modes():
            last = _pop_mode()
            if last is self._mode:
                break
            above.append(last)
        else:
            del above[:1]
        for mode in reversed(above):
            _push_mode(mode)

    def suspend(self) -> None:
        """Leave the mode until :meth:`resume`, if this thread entered it and no other mode after it; in eager mode."""
        here = threading.get_ident()
        if here in self.threads and _count_modes():
            last = _pop_mode()
            if last is self._mode:
                self._suspended.append(here)
            else:
                _push_mode(last)

    def resume(self) -> None:
        """Enter the mode again, if :meth:`suspend` left it; in eager mode."""
        here = threading.get_ident()
        if here in self._suspended:
            self._suspended.remove(here)
            _push_mode(self._mode)
