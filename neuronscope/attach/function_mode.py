"""Follow the torch functions that a forward calls: functional activations, gated products, and where neurons lie.

The mode is entered only for a forward, or an explicit training step, of an observed step.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.compiling import (
    GraphListener,
    ask_modes_about,
    call_traced,
    comptime,
    in_compiled_graph,
    is_tracing,
    seen_by_modes,
    unwatched,
    while_tracing,
)
from neuronscope.attach.fused_calls import TRACED_KERNEL
from neuronscope.attach.interrupts import CallStack
from neuronscope.attach.neuron_flow import LEAVING, SET_DATA
from neuronscope.attach.recorder import SiteRecorder
from neuronscope.attach.selections import SELECTING
from neuronscope.attach.single_thread import EnteredMode

__all__ = ["ActivationFunctionMode", "Watch", "first_input"]

_count_function_modes = torch._C._len_torch_function_stack  # under a name that is quick to find
#: Functions that are followed although they return no tensor.
_WITHOUT_RESULT = LEAVING | {Tensor.__setitem__, SET_DATA}
#: Functions that tell of a tensor what is no tensor. Modules ask often.
_QUESTIONS = frozenset(
    {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.shape.__get__}  # type: ignore[attr-defined]
)
#: Functions that run a backward pass.
_BACKWARD = frozenset({Tensor.backward, torch.autograd.backward, torch.autograd.grad})


#: Stands for an index that a graph is given anew at each run.
_ANY_NUMBER = torch.zeros((), dtype=torch.int64, device="cpu")


class Watch(Protocol):
    """What the mode needs to know; see :class:`neuronscope.attach.hooks.HookManager`."""

    observing: bool
    functional: bool
    registry: Registry
    recorder: SiteRecorder
    running: list[Any]
    callers: CallStack
    entered: EnteredMode

    def runs(self, caller: FrameType) -> bool:
        """Return whether anything that is watched runs in this thread, around ``caller``."""

    def end_fused_while_tracing(self, args: Any, output: Any) -> None:
        """Note that the fused kernel of a transformer's encoder layer is in the graph that is traced.

        Args:
            args: The arguments of the kernel.
            output: What it returned.
        """

    def in_backward_pass(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a forward, or an explicit step, runs a backward pass, and the mode is off."""

    def fail(self, error: Exception) -> None:
        """Handle an error in our own code."""


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, by position or by name; ``None`` for a call without arguments.

    Args:
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
    """
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))


class ActivationFunctionMode(TorchFunctionMode):
    """Passes every torch function call of a forward on, and reports those that matter to the recorder.

    Args:
        manager: The hooks of the watched model.

    Attributes:
        handling: Whether the mode is handling a call; meanwhile torch has taken it off the stack.
        listener: Is told of graphs that are traced.
    """

    def __init__(self, manager: Watch) -> None:
        super().__init__()
        self.manager = manager
        self.handling = False
        ask_modes_about(manager.registry.functions)
        # Sets are quick to look through.
        self._functions = frozenset(manager.registry.functions if manager.functional else ())
        self._not_only_followed = self._functions | _QUESTIONS | SELECTING | _BACKWARD
        self._end_fused_while_tracing = while_tracing(manager.end_fused_while_tracing, "args", "output")
        self._follow_while_tracing = while_tracing(
            self.follow_traced, "func", "args", "kwargs", "output", "mask", listener=manager.recorder.graphs
        )
        self.listener: GraphListener = manager.recorder.graphs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        manager = self.manager
        if is_tracing():
            if manager.running or not manager.observing:
                return call_traced(self, func, args, kwargs)
            return call_traced(self, func, args, kwargs, manager.recorder.forward.mask)
        known = special = func in self._not_only_followed  # most often it is not
        if special:
            if func in _QUESTIONS:
                return func(*args, **kwargs)
            if func in _BACKWARD and not in_compiled_graph():
                return self._run_backward(func, args, kwargs)
            known = func in self._functions
        recorder = manager.recorder
        before, self.handling = self.handling, True
        try:
            if recorder.compiled and in_compiled_graph():
                return func(*args, **kwargs)
            call = None
            if known or manager.running or not manager.observing:
                if not self._is_inside(func):
                    return self._pass_on(func, args, kwargs)
                if manager.running or not manager.observing:
                    return func(*args, **kwargs)
                activation = manager.registry.of_call(func, args, kwargs)
                call = None if activation is None else self._begin(activation, args, kwargs, traced=False)
            output = func(*args, **kwargs)
            if manager.observing:  # it has not failed
                try:
                    plain = type(output) is Tensor and call is None and not _count_function_modes()
                    followed = plain and recorder.forward.flow.repeats(func, args, kwargs, output)
                    if followed and not (special and func in SELECTING):
                        return output  # nothing was counted, so that an interrupt does not matter
                    if not (known or self._is_inside(func)):
                        manager.entered.take_off_next()
                        return output
                    if call is not None:
                        x = first_input(args, kwargs)
                        if type(output) is Tensor and type(x) is Tensor and not seen_by_modes():
                            recorder.end(call, x, output)
                        else:
                            with unwatched(False):
                                recorder.end(call, x, output)
                        if len(args) + len(kwargs) > 1:
                            recorder.forward.flow.join(output, (*args, *kwargs.values()))
                    elif followed or isinstance(output, (Tensor, tuple, list)) or func in _WITHOUT_RESULT:
                        with unwatched(False):
                            if not followed:
                                recorder.forward.flow.follow(func, args, kwargs, output)
                            if func in SELECTING and manager.functional:
                                recorder.select(func, args, kwargs, output)
                except Exception as error:
                    manager.fail(error)
            return output
        finally:
            self.handling = before

    def _is_inside(self, func: Callable[..., Any]) -> bool:
        """Whether a watched module or step runs around the call of a function, and no interrupt has ended it."""
        manager = self.manager
        return manager.callers.runs(id(func)) or manager.runs(sys._getframe(2))

    def _pass_on(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of other code, which runs because an interrupt ended the watched forward."""
        try:
            return func(*args, **kwargs)
        finally:
            self.manager.entered.take_off_next()

    def _run_backward(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that runs a backward pass, and follow the gradients if it returns them."""
        manager = self.manager
        with manager.in_backward_pass():
            output = func(*args, **kwargs)
        if output is not None and manager.observing:
            try:
                with unwatched(False):
                    manager.recorder.forward.flow.follow(func, args, kwargs, output)
            except Exception as error:
                manager.fail(error)
        return output

    def may_count(self, func: Any) -> bool:
        """Whether a call of a function may have to be counted, so that :meth:`trace` is traced for it."""
        return func is TRACED_KERNEL or func in self._functions or (self.manager.functional and func in SELECTING)

    def trace(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what :meth:`__torch_function__` does, for a call that may be counted, while ``torch.compile`` traces.

        Args:
            func: The function.
            args: The positional arguments of its call.
            kwargs: The keyword arguments of its call.
        """
        manager = self.manager
        if func is TRACED_KERNEL:
            output = func(*args, **kwargs)
            comptime(self._end_fused_while_tracing)
            return output
        if manager.running or not manager.observing:
            return func(*args, **kwargs)
        activation = manager.registry.of_call(func, args, kwargs) if manager.functional else None
        call = None if activation is None else self._begin(activation, args, kwargs, traced=True)
        output = func(*args, **kwargs)
        try:
            if call is not None:
                manager.recorder.end(call, first_input(args, kwargs), output)
            else:
                self._follow_in_graph(func, args, kwargs, output)
        except Exception as error:
            manager.fail(error)
        return output

    def _begin(self, activation: Activation, args: tuple[Any, ...], kwargs: dict[str, Any], *, traced: bool) -> Any:
        """Begin the call of an activation function; return ``None`` if it is no site, though what follows may be."""
        recorder = self.manager.recorder
        try:
            glu_dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) if activation.halves else None
            x, stack = first_input(args, kwargs), recorder.forward.module_stack
            path = stack[-1] if stack else ""
            if traced or (type(x) is Tensor and not seen_by_modes()):
                return recorder.begin(path, activation.name, activation, x, glu_dim, traced)
            with unwatched(False):
                return recorder.begin(path, activation.name, activation, x, glu_dim)
        except Exception as error:
            self.manager.fail(error)

    def _follow_in_graph(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Follow a function while ``torch.compile`` traces; `comptime` reads the arguments and variables."""
        mask = self.manager.recorder.forward.mask  # noqa: F841
        comptime(self._follow_while_tracing)
        if self.manager.functional:
            self.manager.recorder.select(func, args, kwargs, output)

    def follow_traced(self, func: Any, args: Any, kwargs: Any, output: Any, *facts: Any) -> None:
        """Follow a function that ``torch.compile`` has traced.

        Args:
            func: The function.
            args: The positional arguments of its call.
            kwargs: The keyword arguments of its call.
            output: What it returned.
            facts: The mask of positions.
        """
        mask = facts[0]
        if not (isinstance(output, (Tensor, tuple, list)) or func is Tensor.__setitem__):
            return
        flow = self.manager.recorder.forward.flow
        flow.row_masks.mask = mask if isinstance(mask, Tensor) else None
        if func is Tensor.__getitem__ and isinstance(args[1], torch.SymInt):
            args = args[0], _ANY_NUMBER  # the graph serves other numbers too, and so other experts
        flow.follow(func, args, kwargs, output)
