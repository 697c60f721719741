"""Tap: owns every handle on the model, hands tensors on to meters, and leaves nothing behind.

A forward pre-hook on an activation module sees the pre-activation before an in-place function overwrites it, and asks
for its gradient; a forward hook sees the output. Functional activations and gated products are seen by a function
mode that is entered only for a forward of an observed step. Nothing is replaced, kept alive or drawn at random, and a
fault in here detaches the tap and lets the training go on.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.compiling import count_compilations, is_compiled, is_tracing, skip_frames, unwatched
from neuronscope.attach.dtensor import is_tensor_parallel
from neuronscope.attach.function_mode import ActivationFunctionMode, first_input
from neuronscope.attach.gradient_hooks import InertHook
from neuronscope.attach.hook_handles import HookHandles
from neuronscope.attach.interrupts import CallStack, is_on_stack
from neuronscope.attach.module_paths import walk
from neuronscope.attach.recorder import Call, CountersFactory, DeclaredAxis, SiteRecorder
from neuronscope.attach.single_thread import EnteredMode, SingleThread
from neuronscope.attach.uneven_inputs import UnevenInputs
from neuronscope.errors import NeuronscopeWarning

__all__ = ["HookManager"]

#: Packages whose modules measure a network and are no part of it: what they apply is nobody's activation.
_BYSTANDERS = frozenset({"torchmetrics"})
#: Steps without observation from which on it pays to take the hooks off the model and put them back.
_REST = 4
_FUSED = (nn.RNNBase, nn.RNNCellBase)


class HookManager:
    """Hooks on one model.

    Args:
        model: The model to watch.
        registry: What counts as an activation.
        new_counters: Gives the meter of a site; called once a site and phase.
        declared_axis: Gives the declared axis of a site by name.
        functional: Whether functional activations and gated products are watched.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
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
    ) -> None:
        self.observing = False
        self.registry = registry
        self.functional = functional
        self.recorder = SiteRecorder(
            new_counters=new_counters, declared_axis=declared_axis, tolerance=tolerance, fail=self.fail
        )
        self.running: list[Call | None] = []  # activation modules that are running, one inside another
        self.module_sites: list[str] = []
        self.failure: Exception | None = None
        self._mode = ActivationFunctionMode(self)
        self.entered = EnteredMode(self._mode)
        self._turn = SingleThread()
        self.callers = CallStack()  # of the modules in ``observer.frame.owners``
        self._activation: FrameType | None = None  # what called the outermost of those that are running
        self._suspended: list[str] = []  # modules for whose run the mode is left
        self._step_open = False
        self._handles = HookHandles()
        self._model = weakref.ref(model)
        self.uneven_inputs = UnevenInputs(model)
        self.recorder.is_tensor_parallel = lambda: is_tensor_parallel(self._model())
        self._compilations = count_compilations()
        self._compiles = False  # whether the compiler has anything to do with this process, since we watch
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        hidden: list[str] = []  # below these paths nothing is hooked
        for path, module in walk(model):
            if any(path.startswith(f"{parent}.") for parent in hidden):
                continue
            if isinstance(module, torch.jit.ScriptModule):
                self.recorder.unseen[path or "(root)"] = "a scripted module hides its activations from hooks"
                hidden.append(path)
                continue
            if isinstance(module, _FUSED):
                self.recorder.unseen[path or "(root)"] = (
                    f"{type(module).__name__} applies its activations inside a fused kernel"
                )
            if type(module).__module__.partition(".")[0] in _BYSTANDERS:
                self._handles.add(module.register_forward_pre_hook(_SuspendInside(self)))
                self._handles.add(module.register_forward_hook(_ResumeInside(self), always_call=True))
                hidden.append(path)
                continue
            activation = self.registry.of_module(module)
            if activation is not None or path == "" or _may_call_functions(module):
                self._hook(module, path, activation, is_root=path == "")
            if activation is not None:
                self.module_sites.append(path)
                hidden.append(path)

    def _hook(self, module: nn.Module, path: str, activation: Activation | None, is_root: bool) -> None:
        if activation is None or is_root:
            self._handles.add(module.register_forward_pre_hook(_EnterModule(self, path), with_kwargs=True))
        if activation is not None:
            self._handles.add(
                module.register_forward_pre_hook(_BeforeActivation(self, path, activation), with_kwargs=True)
            )
            self._handles.add(module.register_forward_hook(_AfterActivation(self), always_call=True, with_kwargs=True))
        if activation is None or is_root:
            self._handles.add(module.register_forward_hook(_LeaveModule(self, path), always_call=True))

    def detach(self) -> None:
        """Take every hook off; harmless when done before."""
        self.set_observing(False)
        self._handles.remove()
        self.recorder.close()

    def rest(self, steps: int) -> None:
        """Nothing is observed for ``steps`` steps: take the hooks off, unless the compiler has to do with the model.

        It traces hooks with the model, and looks at them never again: they stay on until the model has run, and from
        then on if anything was traced since it is watched, or is to be.
        """
        if steps < _REST:
            return
        forward, model = self.recorder.forward, self._model()
        ran = forward.ran_root or forward.ran_parts
        self._compiles |= self.recorder.compiled or self._compilations != count_compilations()
        if ran and model is not None and not self._compiles and not self._handles.off:
            self._compiles = any(is_compiled(module) for module in model.modules())
            if not self._compiles:
                self._handles.take_off()

    def _wake(self) -> None:
        self._handles.put_back()
        if self._compilations != count_compilations():
            self._compiles = True
            self.recorder.expect_missed_sites()

    def detach_when_idle(self) -> None:
        """After a fault: take everything off as soon as the function mode can be."""
        if self._handles and not self._mode.handling and not self.recorder.forward.module_stack:
            self.detach()

    def set_observing(self, observing: bool) -> None:
        """Begin or cease to count; what was left of an interrupted forward is forgotten."""
        if observing and self._handles.off:
            self._wake()
        self.recorder.restart()
        self.entered.leave(handling=self._mode.handling)
        self._end()
        self.observing = observing
        if observing and self._step_open:
            self.entered.enter(handling=self._mode.handling)

    def open_step(self) -> None:
        """A training step that is not itself a module's forward begins: watch its own functional calls too."""
        self._step_open = True
        self._set_explicit_step(True)
        if self.observing:
            self.entered.enter(handling=self._mode.handling)

    def close_step(self) -> None:
        """The training step is over."""
        self._step_open = False
        self._set_explicit_step(False)
        self.entered.leave(handling=self._mode.handling)
        if self.failure is not None:
            self.detach_when_idle()

    def _set_explicit_step(self, explicit_step: bool) -> None:
        self.recorder.forward.explicit_step = explicit_step
        self.recorder.forward.restart_outside_calls()

    def watches_here(self) -> bool:
        """Whether what runs in this thread is to be counted."""
        if not self.observing or self._turn.is_ours():
            return self.observing
        if self._turn.free():
            self.recorder.forward.restart()
            self._end()
            return self._turn.is_ours()
        self.recorder.unseen["(root)"] = "its forward ran in several threads at once, and only some of it was counted"
        return False

    def runs(self, caller: FrameType) -> bool:
        """Return whether anything that is watched runs in this thread, and forget what an interrupt ended.

        Args:
            caller: The frame that called a hook, or a torch function.
        """
        module_stack = self.recorder.forward.module_stack
        if module_stack and self._turn.is_taken_here():
            del module_stack[self.callers.running(len(module_stack), caller) :]
            if not module_stack:
                self.recorder.forward.forget()
                self._end()
        if self._activation is not None and not is_on_stack(self._activation, caller):
            self._activation = None
            self.running.clear()
            self.entered.resume()
        return bool(module_stack) or self._step_open

    def _end(self) -> None:
        """Nothing runs any more: leave the function mode, unless a step is open."""
        self.callers.cut(0)
        self._activation = None
        self.running.clear()
        self._suspended.clear()
        self._turn.end()
        if not self._step_open:
            self.entered.leave(handling=self._mode.handling)

    def fail(self, error: Exception) -> None:
        """A fault of ours: warn once, detach, and let the training go on."""
        if self.failure is None:
            self.failure = error
            if self._mode.handling:
                self.observing = False  # torch puts the mode back after the call: the forward's end takes it off
            else:
                self.detach()
            warnings.warn(
                f"Neuronscope met a fault of its own and stopped watching; training goes on. {error!r}",
                NeuronscopeWarning,
                stacklevel=2,
            )

    # --- forwards --------------------------------------------------------------------------------------------------

    def enter(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], caller: FrameType | None
    ) -> None:
        """A watched module begins to run, called by ``caller`` (``None`` where ``torch.compile`` traces)."""
        module_stack = self.recorder.forward.module_stack
        if caller is not None:
            self._look(module, caller)
            if path == "" and module_stack and self.callers.innermost is None:
                self.set_observing(True)  # a compiled forward that failed left its traces
            self.callers.begin(len(module_stack), caller)
        if path == "" and not is_tracing():
            self.uneven_inputs.note_wrapper()
        if self.recorder.forward.enter(path, args, kwargs) and not self.recorder.forward.exporting:
            self.entered.enter(handling=self._mode.handling)
        if isinstance(module, nn.TransformerEncoder) and _goes_nested(module, args, kwargs):
            # Under a function mode it would not, and give other outputs where the input is padded.
            self.recorder.unseen.setdefault(path or "(root)", "it ran on nested tensors, which cannot be counted")
            self._suspended.append(path)
            self.entered.leave(handling=self._mode.handling)

    def leave(self, path: str) -> None:
        """A watched module is done, or failed."""
        if self._suspended and self._suspended[-1] == path:
            self._suspended.pop()
            self.entered.enter(handling=self._mode.handling)
        if self.recorder.forward.leave():
            self._end()
        else:
            self.callers.cut(len(self.recorder.forward.module_stack))

    def _look(self, module: nn.Module, caller: FrameType) -> None:
        """A hook of a module is called by ``caller``: forget what an interrupt ended."""
        if self._activation is not None or (self.recorder.forward.module_stack and not self.callers.runs(id(module))):
            self.runs(caller)

    def begin_activation(self, call: Call | None, caller: FrameType | None) -> None:
        """A module runs whose own calls are its own affair."""
        if not self.running:
            self._activation = caller
        self.running.append(call)

    def before(self, path: str, activation: Activation, module: nn.Module, x: Any, caller: FrameType | None) -> None:
        """An activation module is about to run on ``x``, called by ``caller``."""
        call = None
        if caller is not None:
            self._look(module, caller)
        if not self.running:
            glu_dim = getattr(module, "dim", -1) if activation.halves else None
            call = self.recorder.begin(path, "", activation, x, glu_dim)
            self.entered.suspend()  # what it calls is its own affair
        self.begin_activation(call, caller)

    def after(self, x: Any, y: Any) -> None:
        """An activation module made ``y`` of ``x``; ``None`` where it failed."""
        call = self.running.pop() if self.running else None
        if not self.running:
            self._activation = None
            self.entered.resume()
        if call is not None:
            self.recorder.end(call, x, y)
        if not self.running and not self.recorder.forward.module_stack:
            self._turn.end()


def _may_call_functions(module: nn.Module) -> bool:
    """Whether a module may apply functions of its own: all but torch's own leaves and mere containers."""
    if type(module) in (nn.ModuleList, nn.ModuleDict):
        return False
    own = type(module).__module__.startswith("torch.nn.modules.")
    return not own or next(module.children(), None) is not None


def _goes_nested(encoder: nn.TransformerEncoder, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the encoder packs padded input into nested tensors, as it does in evaluation, without gradients."""
    padded = args[2] if len(args) > 2 else kwargs.get("src_key_padding_mask")
    return padded is not None and not encoder.training and not torch.is_grad_enabled() and encoder.use_nested_tensor


def _caller() -> FrameType | None:
    """The frame that called the hook which asks; ``None`` where ``torch.compile`` traces it."""
    return None if is_tracing() else sys._getframe(2)


class _EnterModule(InertHook):
    def __init__(self, manager: HookManager, path: str) -> None:
        self.manager = manager
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.manager.watches_here():
            try:
                self.manager.enter(self.path, module, args, kwargs, _caller())
            except Exception as error:
                self.manager.fail(error)
        elif self.manager.failure is not None:
            self.manager.recorder.forward.module_stack.append(self.path)


class _LeaveModule(InertHook):
    def __init__(self, manager: HookManager, path: str) -> None:
        self.manager = manager
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.manager.watches_here():
            try:
                self.manager.leave(self.path)
            except Exception as error:
                self.manager.fail(error)
        elif self.manager.failure is not None:
            self.manager.recorder.forward.leave()
            self.manager.detach_when_idle()


class _SuspendInside(InertHook):
    def __init__(self, manager: HookManager) -> None:
        self.manager = manager

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.manager.watches_here():
            self.manager.begin_activation(None, _caller())


class _ResumeInside(_SuspendInside):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if self.manager.watches_here() and self.manager.running:
            self.manager.after(None, None)


class _BeforeActivation(InertHook):
    def __init__(self, manager: HookManager, path: str, activation: Activation) -> None:
        self.manager = manager
        self.path = path
        self.activation = activation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.manager.watches_here():
            try:
                with unwatched():
                    self.manager.before(self.path, self.activation, module, first_input(args, kwargs), _caller())
            except Exception as error:
                self.manager.fail(error)


class _AfterActivation(InertHook):
    def __init__(self, manager: HookManager) -> None:
        self.manager = manager

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.manager.watches_here():
            try:
                with unwatched():
                    self.manager.after(first_input(args, kwargs), output)
            except Exception as error:
                self.manager.fail(error)


# What is loaded by now is all that a hook can call.
skip_frames(module for name, module in list(sys.modules.items()) if name.startswith("neuronscope."))
