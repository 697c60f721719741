"""Register all hooks on a model, pass tensors on to the recorder, and remove every hook at the end.

A forward pre-hook on an activation module receives the pre-activation before an in-place function overwrites it, and
registers a hook for its gradient; a forward hook receives the output. A function mode receives functional activations
and gated products; it is entered only for a forward of an observed step. Nothing is replaced, kept alive or drawn at
random. An error in our own code removes the hooks and lets the training go on.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.call_arguments import CallArguments
from neuronscope.attach.compiling import count_compilations, is_compiled, is_tracing, skip_frames, unwatched
from neuronscope.attach.dtensor import is_tensor_parallel, sharded_dims
from neuronscope.attach.examples import ExampleCounter, is_time_first
from neuronscope.attach.function_mode import ActivationFunctionMode, first_input
from neuronscope.attach.gradient_hooks import InertHook
from neuronscope.attach.hook_handles import HookHandles
from neuronscope.attach.interrupts import CallStack, is_on_stack
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.masks import PositionMask
from neuronscope.attach.module_paths import walk
from neuronscope.attach.recorder import CountersFactory, DeclaredAxis, SiteRecorder
from neuronscope.attach.single_thread import EnteredMode, SingleThread
from neuronscope.errors import NeuronscopeWarning
from neuronscope.options import Examples, Mask

__all__ = ["HookManager"]

#: Packages whose modules measure a network: the functions that they call are not activations of the network.
_METRIC_PACKAGES = frozenset({"torchmetrics"})
#: Fewest unobserved steps for which it pays to take the hooks off the model and put them back.
_FEWEST_UNOBSERVED = 4
_FUSED = (nn.RNNBase, nn.RNNCellBase)


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
        self._suspended: list[str] = []  # modules during whose call the mode is left
        self._step_open = False
        self._handles = HookHandles()
        self._model = weakref.ref(model)
        self.note_weights: Callable[[], None] | None = None  # called when the model's own forward begins
        self.recorder.is_tensor_parallel = lambda: is_tensor_parallel(self._model())
        self._compilations = count_compilations()
        self._compiles = False  # whether the model was or will be compiled, as far as is known
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
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
                self._handles.add(module.register_forward_hook(_LabelOutput(self, path)))
            if type(module).__module__.partition(".")[0] in _METRIC_PACKAGES:
                self._handles.add(module.register_forward_pre_hook(_SuspendInside(self)))
                self._handles.add(module.register_forward_hook(_ResumeInside(self), always_call=True))
                hidden.append(path)
                continue
            activation = self.registry.of_module(module)
            if activation is not None or path == "" or _may_call_functions(module):
                self._hook(module, path, activation, is_root=path == "")
            if is_time_first(module):
                self._handles.add(module.register_forward_pre_hook(_NoteLayout(self, self._examples), with_kwargs=True))
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
        """Remove every hook; does nothing if it was done before."""
        self.set_observing(False)
        self._handles.remove()
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
        self._suspended.clear()
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
        if path == "" and not is_tracing() and self.note_weights is not None:
            self.note_weights()
        if self.recorder.forward.enter(path, module, args, kwargs) and not self.recorder.forward.exporting:
            self.entered.enter(handling=self._mode.handling)
        if isinstance(module, nn.TransformerEncoder) and _goes_nested(module, args, kwargs):
            # Under a function mode it would not use nested tensors, and its outputs at padded positions would differ.
            self.recorder.not_measured.setdefault(path or "(root)", "it ran on nested tensors, which cannot be counted")
            self._suspended.append(path)
            self.entered.leave(handling=self._mode.handling)

    def leave(self, path: str, output: Any) -> None:
        """Note that a watched module has ended or failed.

        Args:
            path: Path of the module.
            output: What it returned; ``None`` if it failed.
        """
        if path == "" and not is_tracing():
            self.recorder.forward.flow.note_outputs(output)
        if self._suspended and self._suspended[-1] == path:
            self._suspended.pop()
            self.entered.enter(handling=self._mode.handling)
        if self.recorder.forward.leave():
            self._end()
        else:
            self.callers.cut(len(self.recorder.forward.module_stack))

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
        call = self.running.pop() if self.running else None
        if not self.running:
            self._activation = None
            self.entered.resume()
        if call is not None:
            self.recorder.end(call, x, y)
        elif not self.running:
            self.recorder.carry(x, y)
        if not self.running and not self.recorder.forward.module_stack:
            self._thread.release()


def _may_call_functions(module: nn.Module) -> bool:
    """Whether a module may call activation functions itself: all but torch's own leaf modules and containers."""
    if type(module) in (nn.ModuleList, nn.ModuleDict):
        return False
    own = type(module).__module__.startswith("torch.nn.modules.")
    return not own or next(module.children(), None) is not None


def _goes_nested(encoder: nn.TransformerEncoder, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the encoder packs padded input into nested tensors, as it does in evaluation without gradients."""
    padded = args[2] if len(args) > 2 else kwargs.get("src_key_padding_mask")
    return padded is not None and not encoder.training and not torch.is_grad_enabled() and encoder.use_nested_tensor


def _caller() -> FrameType | None:
    """Return the frame that called the hook that calls this; ``None`` while ``torch.compile`` traces."""
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

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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


# Every module that a hook can call is loaded by now.
skip_frames(module for name, module in list(sys.modules.items()) if name.startswith("neuronscope."))
