"""Register all hooks on a model, pass tensors on to the recorder, and remove every hook at the end.

A forward pre-hook on an activation module receives the pre-activation before an in-place function overwrites it, and
registers a hook for its gradient; a forward hook receives the output. A function mode receives functional activations
and gated products; it is entered only for a forward of an observed step. No output is replaced, and nothing is kept
alive or drawn at random. An error in our own code removes the hooks and lets the training go on.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.call_arguments import CallArguments
from neuronscope.attach.compiling import count_compilations, is_compiled, is_tracing, skip_frames, unwatched
from neuronscope.attach.dtensor import is_tensor_parallel, sharded_dims
from neuronscope.attach.examples import ExampleCounter, is_time_first
from neuronscope.attach.function_mode import ActivationFunctionMode, first_input
from neuronscope.attach.fused_calls import FUSABLE, REASON, HiddenHooks, hidden_activation, last_weight, runs_fused
from neuronscope.attach.gradient_hooks import InertHook
from neuronscope.attach.hook_handles import HookHandles
from neuronscope.attach.interrupts import CallStack, is_on_stack
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.masks import PositionMask
from neuronscope.attach.module_paths import walk
from neuronscope.attach.recorder import CountersFactory, DeclaredAxis, SiteRecorder
from neuronscope.attach.scripting import allow_scripting, stop_allowing_scripting
from neuronscope.attach.single_thread import EnteredMode, SingleThread
from neuronscope.attach.uneven_inputs import UnevenInputs
from neuronscope.errors import NeuronscopeWarning
from neuronscope.options import Examples, Mask

__all__ = ["HookManager"]

#: Packages whose modules measure a network: the functions that they call are not activations of the network.
_METRIC_PACKAGES = frozenset({"torchmetrics"})
#: Fewest unobserved steps for which it pays to take the hooks off the model and put them back.
_FEWEST_UNOBSERVED = 4
_FUSED = (nn.RNNBase, nn.RNNCellBase)
#: What a hook is given if it was moved to another module as one without keyword arguments, as quantisation does.
_NOTHING: Mapping[str, Any] = {}


class HookManager:
    """Owns all hooks on one model.

    Args:
        model: The model to watch.
        registry: Says which modules and functions are activations.
        new_counters: Returns the counters of a site; called once for each site and phase.
        declared_axis: Returns the declared axis of a site by its name.
        functional: Whether functional activations and gated products are watched.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
        examples: The option ``examples`` of :func:`neuronscope.watch`.
        mask: The option ``mask``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        registry: Registry,
        new_counters: CountersFactory,
        declared_axis: DeclaredAxis,
        functional: bool,
        tolerance: float,
        examples: Examples = "auto",
        mask: Mask = None,
    ) -> None:
        self.observing = False
        self.registry = registry
        self.functional = functional
        arguments = CallArguments(model)
        self._examples = ExampleCounter(examples, model, arguments)
        self._masks = PositionMask(mask, arguments)
        self.recorder = SiteRecorder(
            names=LayerNames(model),
            examples=self._examples,
            masks=self._masks,
            new_counters=new_counters,
            declared_axis=declared_axis,
            tolerance=tolerance,
            fail=self.fail,
        )
        self.running: list[Any] = []  # the activation modules that are running, one inside another
        self.module_sites: list[str] = []
        self.failure: Exception | None = None
        self._mode = ActivationFunctionMode(self)
        self.entered = EnteredMode(self._mode)
        self._thread = SingleThread()
        self.callers = CallStack()  # of the modules in ``observer.frame.owners``
        self._activation: FrameType | None = None  # the caller of the outermost of the `running` modules
        self._fused_calls: list[
            tuple[int, nn.Module, Any]
        ] = []  # calls that torch fuses: modules around it, module, input
        self._hidden = HiddenHooks(self._leave_fused)
        self._step_open = False
        self._handles = HookHandles()
        self._model = weakref.ref(model)
        self.uneven_inputs = UnevenInputs(model)
        self.recorder.is_tensor_parallel = lambda: is_tensor_parallel(self._model())
        self._compilations = count_compilations()
        self._compiles = False  # whether the model was or will be compiled, as far as is known
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        allow_scripting(self)
        hidden: list[str] = []  # modules below these paths get no hooks
        for path, module in walk(model):
            if any(path.startswith(f"{parent}.") for parent in hidden):
                continue
            if isinstance(module, torch.jit.ScriptModule):
                self.recorder.not_measured[path or "(root)"] = "a scripted module hides its activations from hooks"
                hidden.append(path)
                continue
            if isinstance(module, _FUSED):
                self.recorder.not_measured[path or "(root)"] = (
                    f"{type(module).__name__} applies its activations inside a fused kernel"
                )
            if any(sharded_dims(weight) for weight in module.parameters(recurse=False)):
                self._handles.add_after(module, _LabelOutput(self, path))
            if type(module).__module__.partition(".")[0] in _METRIC_PACKAGES:
                self._handles.add_before(module, _SuspendInside(self))
                self._handles.add_after(module, _ResumeInside(self))
                hidden.append(path)
                continue
            activation = self.registry.of_module(module)
            if activation is not None or path == "" or _names_places(module):
                self._hook(module, path, activation, is_root=path == "")
            if is_time_first(module):
                self._handles.add_before(module, _NoteLayout(self, self._examples))
            if activation is not None:
                self.module_sites.append(path)
                hidden.append(path)

    def _hook(self, module: nn.Module, path: str, activation: Activation | None, is_root: bool) -> None:
        if activation is None or is_root:
            enter = _EnterFusable if isinstance(module, FUSABLE) else _EnterModule
            self._handles.add_before(module, enter(self, path))
        if activation is not None:
            self._handles.add_before(module, _BeforeActivation(self, path, activation))
            self._handles.add_after(module, _AfterActivation(self), with_kwargs=True)
        if activation is None or is_root:
            self._handles.add_after(module, _LeaveModule(self, path))

    def detach(self) -> None:
        """Remove every hook; does nothing if it was done before."""
        self.set_observing(False)
        self._handles.remove(self._model())
        stop_allowing_scripting(self)
        self.recorder.close()

    def pause(self, steps: int) -> None:
        """Take the hooks off, because nothing is observed for ``steps`` steps; not if the model may be compiled.

        The compiler traces hooks with the model, and does not look at them again. So the hooks stay on until the model
        has run. After that they stay on if anything was traced since the watch began, or if the model is marked to be
        compiled.
        """
        if steps < _FEWEST_UNOBSERVED:
            return
        forward, model = self.recorder.forward, self._model()
        ran = forward.ran_root or forward.ran_parts
        self._compiles |= self.recorder.compiled or self._compilations != count_compilations()
        if ran and model is not None and not self._compiles and not self._handles.off:
            self._compiles = any(is_compiled(module) for module in model.modules())
            if not self._compiles:
                self._handles.take_off()

    def _resume(self) -> None:
        self._handles.put_back()
        if self._compilations != count_compilations():
            self._compiles = True
            self.recorder.expect_missed_sites()

    def detach_when_idle(self) -> None:
        """Detach after an error, unless a forward or the function mode is still active."""
        if self._handles and not self._mode.handling and not self.recorder.forward.module_stack:
            self.detach()

    def set_observing(self, observing: bool) -> None:
        """Start or stop counting, and forget what is left of an interrupted forward."""
        if observing and self._handles.off:
            self._resume()
        self.recorder.restart()
        self.entered.leave(handling=self._mode.handling)
        self._end()
        self.observing = observing
        if observing and self._step_open:
            self.entered.enter(handling=self._mode.handling)

    def open_step(self, inputs: tuple[Any, ...] = ()) -> None:
        """Note that a training step begins, so that its own functional calls are watched too.

        Args:
            inputs: What the step is given; see :meth:`neuronscope.attach.forward.ForwardContext.begin_step`.
        """
        self._step_open = True
        self._set_explicit_step(True)
        if self.observing:
            self.recorder.forward.begin_step(inputs)
            self.entered.enter(handling=self._mode.handling)

    def close_step(self) -> None:
        """Note that the training step is over."""
        self._step_open = False
        self._set_explicit_step(False)
        self.recorder.forward.end_step()
        self.entered.leave(handling=self._mode.handling)
        if self.failure is not None:
            self.detach_when_idle()

    def _set_explicit_step(self, explicit_step: bool) -> None:
        self.recorder.forward.explicit_step = explicit_step
        self.recorder.forward.forget()

    def watches_here(self) -> bool:
        """Whether to count what runs in this thread."""
        if not self.observing or self._thread.acquire():
            return self.observing
        if self._thread.release_if_ended():
            self.recorder.forward.restart()
            self._end()
            return self._thread.acquire()
        self.recorder.not_measured["(root)"] = (
            "its forward ran in several threads at once, and only some of it was counted"
        )
        return False

    def runs(self, caller: FrameType) -> bool:
        """Return whether anything that is watched runs in this thread, and forget what an interrupt ended.

        Args:
            caller: The frame that called a hook or a torch function.
        """
        module_stack = self.recorder.forward.module_stack
        if module_stack and self._thread.is_here():
            del module_stack[self.callers.running(len(module_stack), caller) :]
            if not module_stack:
                self._end()
        if self._activation is not None and not is_on_stack(self._activation, caller):
            self._activation = None
            self.running.clear()
            self.entered.resume()
        return bool(module_stack) or self._step_open

    def _end(self) -> None:
        """Reset the state of a forward that has ended, and leave the function mode unless a step is open."""
        self.callers.cut(0)
        self._activation = None
        self.running.clear()
        self._fused_calls.clear()
        self._hidden.put_back()
        self._thread.release()
        if not self._step_open:
            self.entered.leave(handling=self._mode.handling)

    def fail(self, error: Exception) -> None:
        """Handle an error in our own code: warn once, detach, and let the training go on."""
        if self.failure is None:
            self.failure = error
            if self._mode.handling:
                self.observing = False  # torch puts the mode back after the call; the end of the forward takes it off
            else:
                self.detach()
            warnings.warn(
                f"Neuronscope met a fault of its own and stopped watching; training goes on. {error!r}",
                NeuronscopeWarning,
                stacklevel=2,
            )

    def enter(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], caller: FrameType | None
    ) -> None:
        """Note that a watched module begins to run.

        Args:
            path: Path of the module.
            module: The module.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.
            caller: The frame that calls the module; ``None`` while ``torch.compile`` traces.
        """
        module_stack = self.recorder.forward.module_stack
        if caller is not None:
            self._forget_interrupted(module, caller)
            if path == "" and module_stack and self.callers.innermost is None:
                self.set_observing(True)  # a compiled forward failed, and its state is left
            self.callers.begin(len(module_stack), caller)
        if path == "" and not is_tracing():
            self.uneven_inputs.note_wrapper()
        if self.recorder.forward.enter(path, module, args, kwargs) and not self.recorder.forward.exporting:
            self.entered.enter(handling=self._mode.handling)

    def enter_fused(self, path: str, module: nn.Module, x: Any) -> None:
        """Stand aside during a call that torch runs in a fused kernel.

        Args:
            path: Path of the module.
            module: The module.
            x: Its input ``(B, T, D)``.
        """
        self._fused_calls.append((len(self.recorder.forward.module_stack) - 1, module, x))
        self.entered.leave(handling=self._mode.handling)
        if isinstance(module, nn.TransformerEncoderLayer):
            prefix = f"{path}." if path else ""
            self.recorder.note_ran(f"{prefix}activation")
            self.recorder.not_measured.setdefault(f"{prefix}linear1/{hidden_activation(module)}", REASON)

    def hide_hooks(self, module: nn.Module) -> None:
        """Take all hooks off a module and what is inside it while it runs, if torch looks for hooks there."""
        if isinstance(module, nn.TransformerEncoderLayer):
            self._hidden.take_off(module)

    def _leave_fused(self, module: nn.Module, output: Any) -> None:
        """Leave a module whose hooks were off when it ended; if it failed, torch calls them now."""
        if output is not None and self._fused_calls and self._fused_calls[-1][1] is module and self.watches_here():
            try:
                self.leave(self.recorder.forward.current_path, output)
            except Exception as error:
                self.fail(error)

    def leave(self, path: str, output: Any) -> None:
        """Note that a watched module has ended or failed.

        Args:
            path: Path of the module.
            output: What it returned; ``None`` if it failed.
        """
        if self._fused_calls:
            self._end_fused(output)
        if path == "" and not is_tracing():
            self.recorder.forward.flow.note_outputs(output)
        if self.recorder.forward.leave():
            self._end()
        else:
            self.callers.cut(len(self.recorder.forward.module_stack))

    def _end_fused(self, output: Any) -> None:
        """If the module that ends was run in a fused kernel, watch again, and note what it returned."""
        depth, found = len(self.recorder.forward.module_stack) - 1, None
        while self._fused_calls and self._fused_calls[-1][0] >= depth:
            found = self._fused_calls.pop()
        if found is None or self._fused_calls:
            return
        self.entered.enter(handling=self._mode.handling)
        _, module, x = found
        y, weight = output[0] if isinstance(output, tuple) else output, last_weight(module)
        if isinstance(y, Tensor) and weight is not None:
            with unwatched():
                self.recorder.forward.flow.follow(F.linear, (x, weight), {}, y)

    def _forget_interrupted(self, module: nn.Module, caller: FrameType) -> None:
        """Forget what an interrupt ended, if the hook of a module is called from a place where it does not run."""
        if self._activation is not None or (self.recorder.forward.module_stack and not self.callers.runs(id(module))):
            self.runs(caller)

    def begin_activation(self, call: Any, caller: FrameType | None) -> None:
        """Note that a module runs whose inner calls are not watched.

        Args:
            call: The call that was begun for it, or ``None``.
            caller: The frame that calls the module; ``None`` while ``torch.compile`` traces.
        """
        if not self.running:
            self._activation = caller
        self.running.append(call)

    def before(self, path: str, activation: Activation, module: nn.Module, x: Any, caller: FrameType | None) -> None:
        """Begin the call of an activation module.

        Args:
            path: Path of the module.
            activation: The activation that it applies.
            module: The module.
            x: Its input, the pre-activation.
            caller: The frame that calls the module; ``None`` while ``torch.compile`` traces.
        """
        call = None
        if caller is not None:
            self._forget_interrupted(module, caller)
        if not self.running:
            glu_dim = getattr(module, "dim", -1) if activation.halves else None
            call = self.recorder.begin(path, "", activation, x, glu_dim)
            self.entered.suspend()  # its inner calls are not watched
        self.begin_activation(call, caller)

    def after(self, x: Any, y: Any) -> None:
        """End the call of an activation module.

        Args:
            x: The pre-activation.
            y: The output; ``None`` if the module failed.
        """
        if not self.running:
            return  # the hook was moved to a module whose begin was not seen
        call = self.running.pop()
        if not self.running:
            self._activation = None
            self.entered.resume()
        if call is not None:
            self.recorder.end(call, x, y)
        elif not self.running:
            self.recorder.carry(x, y)
        if not self.running and not self.recorder.forward.module_stack:
            self._thread.release()


def _names_places(module: nn.Module) -> bool:
    """Whether the place of an activation function that is called in a module is named by its path.

    Torch's own leaf modules call none. A module without parameters, such as a point at which a library lets hooks in,
    is a part of the module around it: it may look at its own hooks, so it gets none.
    """
    if type(module) in (nn.ModuleList, nn.ModuleDict) or next(module.parameters(), None) is None:
        return False
    return not type(module).__module__.startswith("torch.nn.modules.") or next(module.children(), None) is not None


def _caller() -> FrameType | None:
    """Return the frame that called the hook that calls this; ``None`` while ``torch.compile`` traces."""
    return None if is_tracing() else sys._getframe(2)


class _EnterModule(InertHook):
    def __init__(self, manager: HookManager, path: str) -> None:
        self.manager = manager
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
        if self.manager.watches_here():
            try:
                self.manager.enter(self.path, module, args, kwargs, _caller())
            except Exception as error:
                self.manager.fail(error)
        elif self.manager.failure is not None:
            self.manager.recorder.forward.module_stack.append(self.path)


class _EnterFusable(_EnterModule):
    """A hook on a module that torch may run in a fused kernel."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
        manager = self.manager
        try:
            if manager.watches_here():
                manager.enter(self.path, module, args, kwargs, _caller())
            elif manager.failure is not None:
                manager.recorder.forward.module_stack.append(self.path)
            if not is_tracing() and manager.failure is None and runs_fused(module, args, kwargs, _is_ours):
                if manager.watches_here():
                    manager.enter_fused(self.path, module, first_input(args, kwargs))
                manager.hide_hooks(module)
        except Exception as error:
            manager.fail(error)


def _is_ours(found: Any) -> bool:
    """Whether a hook or a function mode is one of Neuronscope's."""
    return isinstance(found, (InertHook, ActivationFunctionMode))


class _LeaveModule(InertHook):
    def __init__(self, manager: HookManager, path: str) -> None:
        self.manager = manager
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.manager.watches_here():
            try:
                self.manager.leave(self.path, output)
            except Exception as error:
                self.manager.fail(error)
        elif self.manager.failure is not None:
            self.manager.recorder.forward.leave()
            self.manager.detach_when_idle()


class _NoteLayout(InertHook):
    """A hook on a module that takes its time dimension first."""

    def __init__(self, manager: HookManager, examples: ExampleCounter) -> None:
        self.manager = manager
        self.examples = examples

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
        if self.manager.watches_here():
            try:
                self.examples.note_layout(module, args, kwargs)
            except Exception as error:
                self.manager.fail(error)


class _LabelOutput(InertHook):
    """A hook on a layer whose weight is distributed."""

    def __init__(self, manager: HookManager, path: str) -> None:
        self.manager = manager
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.manager.watches_here() and not is_tracing():
            try:
                self.manager.recorder.forward.flow.label_output(self.path, output)
            except Exception as error:
                self.manager.fail(error)


class _SuspendInside(InertHook):
    def __init__(self, manager: HookManager) -> None:
        self.manager = manager

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
        if self.manager.watches_here():
            self.manager.begin_activation(None, _caller())


class _ResumeInside(InertHook):
    def __init__(self, manager: HookManager) -> None:
        self.manager = manager

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.manager.watches_here() and self.manager.running:
            self.manager.after(None, None)


class _BeforeActivation(InertHook):
    def __init__(self, manager: HookManager, path: str, activation: Activation) -> None:
        self.manager = manager
        self.path = path
        self.activation = activation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
        if self.manager.watches_here():
            try:
                with unwatched():
                    self.manager.before(self.path, self.activation, module, first_input(args, kwargs), _caller())
            except Exception as error:
                self.manager.fail(error)


class _AfterActivation(InertHook):
    def __init__(self, manager: HookManager) -> None:
        self.manager = manager

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *given: Any) -> None:
        if self.manager.watches_here():
            try:
                kwargs = given[0] if len(given) > 1 else _NOTHING
                with unwatched():
                    self.manager.after(first_input(args, kwargs), given[-1])
            except Exception as error:
                self.manager.fail(error)


# Every module that a hook can call is loaded by now.
skip_frames(module for name, module in list(sys.modules.items()) if name.startswith("neuronscope."))
