"""The hooks that are put on modules: each passes what it is given on to the manager of all hooks.

Torch calls them, and ``torch.compile`` traces them with the model. An error of our own never leaves them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from neuronscope.attach.activations import Activation
from neuronscope.attach.compiling import (
    compiles_here,
    comptime,
    in_operator,
    is_compiled,
    is_tracing,
    operator_around,
    while_tracing,
)
from neuronscope.attach.examples import ExampleCounter
from neuronscope.attach.function_mode import ActivationFunctionMode, first_input
from neuronscope.attach.fused_calls import runs_fused
from neuronscope.attach.gradient_hooks import InertHook
from neuronscope.attach.unsupported import IN_OPERATOR

if TYPE_CHECKING:
    from neuronscope.attach.hooks import HookManager

__all__ = [
    "AfterActivation",
    "BeforeActivation",
    "EnterFusable",
    "EnterModule",
    "LabelOutput",
    "LeaveModule",
    "NoteLayout",
    "ResumeInside",
    "SuspendInside",
]

#: What a hook is given if it was moved to another module as one without keyword arguments, as quantisation does; and if
#: another thread takes it off while it is about to be called.
_NOTHING: Mapping[str, Any] = {}


class EnterModule(InertHook):
    """A hook on a module whose path names the place of what runs in it, when it begins."""

    def __init__(self, manager: HookManager, path: str) -> None:
        self.manager = manager
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
        caller = None if is_tracing() else sys._getframe(1)
        if self.manager.watches_here(caller is None, begins=True):
            try:
                self.manager.enter(self.path, module, args, kwargs, caller)
            except Exception as error:
                self.manager.fail(error)
        elif self.manager.failure is not None:
            self.manager.recorder.forward.module_stack.append(self.path)


class EnterFusable(EnterModule):
    """A hook on a module that torch may run in a fused kernel."""

    def __init__(self, manager: HookManager, path: str) -> None:
        super().__init__(manager, path)
        self._enter_while_tracing = while_tracing(manager.enter_fused_while_tracing, "path", "module", "args", "kwargs")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
        manager = self.manager
        try:
            traced = is_tracing()
            if manager.watches_here(traced, begins=True):
                manager.enter(self.path, module, args, kwargs, None if traced else sys._getframe(1))
            elif manager.failure is not None:
                manager.recorder.forward.module_stack.append(self.path)
            if manager.failure is not None:
                return
            if traced:
                self._enter_traced(self.path, module, args, kwargs)
            elif runs_fused(module, args, kwargs, _is_ours, compiled=is_compiled(module) or compiles_here()):
                if manager.watches_here(traced):
                    manager.enter_fused(self.path, module, first_input(args, kwargs))
                manager.hide_hooks(module)
        except Exception as error:
            manager.fail(error)

    def _enter_traced(  # `comptime` reads its arguments
        self,
        path: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        comptime(self._enter_while_tracing)


def _is_ours(found: Any) -> bool:
    """Whether a hook or a function mode is one of Neuronscope's."""
    return isinstance(found, (InertHook, ActivationFunctionMode))


class LeaveModule(InertHook):
    """A hook on such a module when it has ended or failed."""

    def __init__(self, manager: HookManager, path: str) -> None:
        self.manager = manager
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.manager.watches_here(is_tracing()):
            try:
                self.manager.leave(self.path, module, output)
            except Exception as error:
                self.manager.fail(error)
        elif self.manager.failure is not None:
            self.manager.recorder.forward.leave()
            self.manager.detach_when_idle()


class NoteLayout(InertHook):
    """A hook on a module that takes its time dimension first."""

    def __init__(self, manager: HookManager, examples: ExampleCounter) -> None:
        self.manager = manager
        self.examples = examples

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
        if self.manager.is_counted_here():
            try:
                self.examples.note_layout(module, args, kwargs)
            except Exception as error:
                self.manager.fail(error)


class LabelOutput(InertHook):
    """A hook on a layer whose weight is distributed."""

    def __init__(self, manager: HookManager, path: str) -> None:
        self.manager = manager
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not is_tracing() and self.manager.watches_here(False):
            try:
                self.manager.recorder.forward.flow.label_output(self.path, output)
            except Exception as error:
                self.manager.fail(error)


class SuspendInside(InertHook):
    """A hook on a module whose inner calls are not watched, when it begins."""

    def __init__(self, manager: HookManager) -> None:
        self.manager = manager

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
        if self.manager.is_counted_here():
            self.manager.begin_activation(None, None if is_tracing() else sys._getframe(1))


class ResumeInside(InertHook):
    """A hook on such a module when it has ended or failed."""

    def __init__(self, manager: HookManager) -> None:
        self.manager = manager

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.manager.is_counted_here() and self.manager.running:
            self.manager.after(None, None, is_tracing())


class BeforeActivation(InertHook):
    """A hook on an activation module when it begins."""

    def __init__(self, manager: HookManager, path: str, activation: Activation) -> None:
        self.manager = manager
        self.path = path
        self.activation = activation
        self._note_while_tracing = while_tracing(self._note_inside)

    def _note_inside(self) -> None:
        recorder = self.manager.recorder
        recorder.unmeasured.note_ran(self.path, recorder.running_phase)
        recorder.unmeasured.note(self.path or "(root)", IN_OPERATOR.format(operator_around()))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
        manager, traced = self.manager, is_tracing()
        if traced and manager.observing and in_operator():
            comptime(self._note_while_tracing)
            return
        caller = None if traced else sys._getframe(1)
        if manager.watches_here(traced, begins=True):
            try:
                x = args[0] if args else first_input(args, kwargs)
                manager.before(self.path, self.activation, module, x, caller)
            except Exception as error:
                manager.fail(error)


class AfterActivation(InertHook):
    """A hook on an activation module when it has ended or failed."""

    def __init__(self, manager: HookManager) -> None:
        self.manager = manager

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *given: Any) -> None:
        manager, traced = self.manager, is_tracing()
        if manager.watches_here(traced):
            try:
                kwargs = given[0] if len(given) > 1 else _NOTHING
                x = args[0] if args else first_input(args, kwargs)
                manager.after(x, given[-1], traced)
                if len(args) + len(kwargs) > 1 and not traced:
                    manager.recorder.forward.flow.join(given[-1], (*args, *kwargs.values()))
            except Exception as error:
                manager.fail(error)
