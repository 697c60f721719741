"""Tap: owns every handle on the model, hands tensors on to meters, and leaves nothing behind.

A forward pre-hook on an activation module sees the pre-activation before an in-place function overwrites it, and asks
for its gradient; a forward hook sees the output. Functional activations and gated products are seen by a function
mode that is entered only for a forward of an observed step. Nothing is replaced, kept alive or drawn at random, and a
fault in here detaches the tap and lets the training go on.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from neuronscope import axes, counting, frames, meters, observer, recomputation, sites, threads
from neuronscope.errors import NeuronscopeWarning
from neuronscope.frameskip import skip_frames
from neuronscope.observer import AxisSource, Call, InertHook, MeterSource, Observer, unwatched
from neuronscope.sites import Activation, Registry, walk
from neuronscope.threads import EnteredMode, Turn

__all__ = ["Tap"]

_PRODUCTS = frozenset(
    getattr(home, name)
    for home in (torch, Tensor)
    for name in ("mul", "multiply", "mul_", "multiply_", "__mul__", "__rmul__", "__imul__")
    if hasattr(home, name)
)
#: Packages whose modules measure a network and are no part of it: what they apply is nobody's activation.
_BYSTANDERS = frozenset({"torchmetrics"})
_FUSED = (nn.RNNBase, nn.RNNCellBase)


class Tap:
    """Hooks on one model.

    Args:
        model: The model to watch.
        registry: What counts as an activation.
        meters: Gives the meter of a site; called once a site and phase.
        axes: Gives the declared axis of a site by name.
        functional: Whether functional activations and gated products are watched.
        tolerance: See :class:`neuronscope.verdicts.Policy`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        registry: Registry,
        meters: MeterSource,
        axes: AxisSource,
        functional: bool,
        tolerance: float,
    ) -> None:
        self.observing = False
        self.registry = registry
        self.functional = functional
        self.observer = Observer(meters=meters, axes=axes, tolerance=tolerance, fail=self.fail)
        self.running: list[Call | None] = []  # activation modules that are running, one inside another
        self.module_sites: list[str] = []
        self.failure: Exception | None = None
        self._mode = _FunctionWatch(self)
        self._entered = EnteredMode(self._mode)
        self._turn = Turn()
        self._suspended: list[str] = []  # modules for whose run the mode is left
        self._step_open = False
        self._handles: list[RemovableHandle] = []
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        hidden: list[str] = []  # below these paths nothing is hooked
        for path, module in walk(model):
            if any(path.startswith(f"{parent}.") for parent in hidden):
                continue
            if isinstance(module, torch.jit.ScriptModule):
                self.observer.unseen[path or "(root)"] = "a scripted module hides its activations from hooks"
                hidden.append(path)
                continue
            if isinstance(module, _FUSED):
                self.observer.unseen[path or "(root)"] = (
                    f"{type(module).__name__} applies its activations inside a fused kernel"
                )
            if type(module).__module__.partition(".")[0] in _BYSTANDERS:
                self._handles.append(module.register_forward_pre_hook(_Mute(self)))
                self._handles.append(module.register_forward_hook(_Unmute(self), always_call=True))
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
            self._handles.append(module.register_forward_pre_hook(_Enter(self, path), with_kwargs=True))
        if activation is not None:
            self._handles.append(module.register_forward_pre_hook(_Before(self, path, activation), with_kwargs=True))
            self._handles.append(module.register_forward_hook(_After(self), always_call=True, with_kwargs=True))
        if activation is None or is_root:
            self._handles.append(module.register_forward_hook(_Leave(self, path), always_call=True))

    def detach(self) -> None:
        """Take every hook off; harmless when done before."""
        self.set_observing(False)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.observer.close()

    def settle(self) -> None:
        """After a fault: take everything off as soon as the function mode can be."""
        if self._handles and not self._mode.handling and not self.observer.frame.owners:
            self.detach()

    def set_observing(self, observing: bool) -> None:
        """Begin or cease to count; what was left of an interrupted forward is forgotten."""
        self._entered.leave()
        self._turn.end()
        self.running.clear()
        self._suspended.clear()
        self.observer.restart()
        self.observing = observing
        if observing and self._step_open:
            self._entered.enter()

    def open_step(self) -> None:
        """A training step that is not itself a module's forward begins: watch its own functional calls too."""
        self._step_open = True
        self._bound(True)
        if self.observing:
            self._entered.enter()

    def close_step(self) -> None:
        """The training step is over."""
        self._step_open = False
        self._bound(False)
        self._entered.leave()
        if self.failure is not None:
            self.settle()

    def _bound(self, bounded: bool) -> None:
        self.observer.frame.bounded = bounded
        self.observer.frame.end_loose()

    def watches_here(self) -> bool:
        """Whether what runs in this thread is to be counted."""
        if not self.observing or self._turn.is_ours():
            return self.observing
        self.observer.unseen["(root)"] = "its forward ran in several threads at once, and only some of it was counted"
        return False

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

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A watched module begins to run."""
        stale = path == "" and self.observer.frame.owners and not torch.compiler.is_compiling()
        if stale and not _calls_itself(module):
            self.set_observing(True)  # a forward that was interrupted left its traces
        if self.observer.frame.enter(path, args, kwargs) and not self.observer.frame.muted:
            self._entered.enter()
        if isinstance(module, nn.TransformerEncoder) and _goes_nested(module, args, kwargs):
            # Under a function mode it would not, and give other outputs where the input is padded.
            self.observer.unseen.setdefault(path or "(root)", "it ran on nested tensors, which cannot be counted")
            self._suspended.append(path)
            self._entered.leave()

    def leave(self, path: str) -> None:
        """A watched module is done, or failed."""
        if self._suspended and self._suspended[-1] == path:
            self._suspended.pop()
            self._entered.enter()
        if self.observer.frame.leave():
            self._turn.end()
            if not self._step_open:
                self._entered.leave()

    def before(self, path: str, activation: Activation, module: nn.Module, x: Any) -> None:
        """An activation module is about to run on ``x``."""
        call = None
        if not self.running:
            halved = getattr(module, "dim", -1) if activation.halves else None
            call = self.observer.begin(path, "", activation, x, halved)
        self.running.append(call)

    def after(self, x: Any, y: Any) -> None:
        """An activation module made ``y`` of ``x``; ``None`` where it failed."""
        call = self.running.pop() if self.running else None
        if call is not None:
            self.observer.end(call, x, y)
        if not self.running and not self.observer.frame.owners:
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


def _calls_itself(module: nn.Module) -> bool:
    """Whether the module that begins to run is running already, by the frames of this thread."""
    frame, runs = sys._getframe(), 0
    while frame is not None and runs < 2:
        runs += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return runs > 1


class _Enter(InertHook):
    def __init__(self, tap: Tap, path: str) -> None:
        self.tap = tap
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.tap.watches_here():
            try:
                self.tap.enter(self.path, module, args, kwargs)
            except Exception as error:
                self.tap.fail(error)
        elif self.tap.failure is not None:
            self.tap.observer.frame.owners.append(self.path)


class _Leave(InertHook):
    def __init__(self, tap: Tap, path: str) -> None:
        self.tap = tap
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.tap.watches_here():
            try:
                self.tap.leave(self.path)
            except Exception as error:
                self.tap.fail(error)
        elif self.tap.failure is not None:
            self.tap.observer.frame.leave()
            self.tap.settle()


class _Mute(InertHook):
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.tap.watches_here():
            self.tap.running.append(None)


class _Unmute(_Mute):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if self.tap.watches_here() and self.tap.running:
            self.tap.running.pop()


class _Before(InertHook):
    def __init__(self, tap: Tap, path: str, activation: Activation) -> None:
        self.tap = tap
        self.path = path
        self.activation = activation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.tap.watches_here():
            try:
                with unwatched():
                    self.tap.before(self.path, self.activation, module, _input(args, kwargs))
            except Exception as error:
                self.tap.fail(error)


class _After(InertHook):
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.tap.watches_here():
            try:
                with unwatched():
                    self.tap.after(_input(args, kwargs), output)
            except Exception as error:
                self.tap.fail(error)


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _in_compiled_graph() -> bool:
    """Whether a graph that was traced before runs now: a debugging back end calls its functions one by one, in Python.

    What they compute was counted by the calls that stand in the graph.
    """
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(2)
    for _ in range(4):  # the mode is called by the function, through its dispatcher, and that by the graph's code
        if frame.f_code.co_filename.startswith("<eval_with_key>"):
            return frame.f_back is not None and "_dynamo" in frame.f_back.f_code.co_filename
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


class _FunctionWatch(TorchFunctionMode):
    """Sees every torch function called in a forward: functional activations, gated products, and where neurons go."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap = tap
        self.handling = False  # torch has taken the mode off the stack while it handles a call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return self._see(func, args, kwargs or {})
        before, self.handling = self.handling, True
        try:
            return self._see(func, args, kwargs or {})
        finally:
            self.handling = before

    def _see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tap = self.tap
        if tap.running or not tap.observing or (tap.observer.compiled and _in_compiled_graph()):
            return func(*args, **kwargs)
        activation = tap.registry.of_call(func, args, kwargs) if tap.functional else None
        if activation is not None:
            return self._activation(activation, func, args, kwargs)
        output = func(*args, **kwargs)
        if isinstance(output, (Tensor, tuple, list)):
            self._follow(func, args, kwargs, output)
        return output

    def _activation(
        self, activation: Activation, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tap = self.tap
        x = _input(args, kwargs)
        call: Call | None = None
        try:
            with unwatched():
                halved = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) if activation.halves else None
                call = tap.observer.begin(tap.observer.frame.owner, activation.name, activation, x, halved)
        except Exception as error:
            tap.fail(error)
        output = func(*args, **kwargs)
        if call is not None and tap.observing:
            try:
                with unwatched():
                    tap.observer.end(call, x, output)
            except Exception as error:
                tap.fail(error)
        return output

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tap = self.tap
        try:
            with unwatched():
                tap.observer.frame.flow.follow(func, args, kwargs, output)
                if tap.functional and func in _PRODUCTS:
                    tap.observer.product(args, output)
        except Exception as error:
            tap.fail(error)


skip_frames((axes, counting, frames, meters, observer, recomputation, sites, threads, sys.modules[__name__]))
