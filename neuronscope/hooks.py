"""Tap: owns every handle on the model, hands tensors on to meters, and leaves nothing behind.

A forward pre-hook on an activation module sees the pre-activation before an in-place function overwrites it and asks for
its gradient; a forward hook sees the output. Functional activations and gated products are seen by a function mode that
is entered only for a forward of an observed step. Nothing is replaced, kept alive or drawn at random, and a fault in
here detaches the tap and lets the training go on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from neuronscope.census import SiteInfo
from neuronscope.counting import Meter, Scratch, add_gradients, add_outputs, ask_gradients, gate_half
from neuronscope.errors import NeuronscopeWarning
from neuronscope.frames import Frame, in_backward, observable
from neuronscope.sites import Activation, Registry, SiteKey, walk

__all__ = ["MeterSource", "Tap"]

#: Gives the meter for a site, or ``None`` where the site is not wanted: (phase, key, info, neurons, device).
MeterSource = Callable[[str, SiteKey, SiteInfo, int, torch.device], "Meter | None"]
#: Gives the declared axis of a site, or ``None``.
AxisSource = Callable[[str], "int | None"]

_PRODUCTS = frozenset(
    getattr(home, name)
    for home in (torch, Tensor)
    for name in ("mul", "multiply", "mul_", "multiply_", "__mul__", "__rmul__", "__imul__")
    if hasattr(home, name)
)
_GATED_NAMES = {"relu": "reglu", "gelu": "geglu", "silu": "swiglu", "sigmoid": "glu"}
_FUSED = (nn.RNNBase, nn.RNNCellBase)


class _Call(NamedTuple):
    """One call of a site that has begun and not ended.

    Attributes:
        key: The site.
        meter: Where it is counted; ``None`` where it is not wanted.
        axis: The neurons' dimension.
        info: What the site is.
        examples: Independent examples behind the call.
        counts: Whether its output is to be counted: not when a checkpoint runs it again.
    """

    key: SiteKey
    meter: Meter | None
    axis: int
    info: SiteInfo
    examples: int
    counts: bool


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
        self.phase = ""
        self.step = 0
        with torch.inference_mode(False):
            self.clock = torch.zeros((), dtype=torch.int64, device="cpu")
        self.registry = registry
        self.functional = functional
        self.frame = Frame()
        self.running: list[_Call | None] = []  # activation modules that are running, one inside another
        self.unseen: dict[str, str] = {}
        self.module_sites: list[str] = []
        self.failure: Exception | None = None
        self._tolerance = tolerance
        self._scratch = Scratch()
        self._mode = _FunctionWatch(self)
        self._entered: list[_FunctionWatch] = []  # at most one
        self._step_open = False
        self._meters: dict[tuple[str, SiteKey], Meter | None] = {}
        self._make_meter = meters
        self._declared = axes
        self._handles: list[RemovableHandle] = []
        self._leaf_handles: list[RemovableHandle] = []

        def traced_meter(phase: str, key: tuple[Any, ...], info: tuple[Any, ...], neurons: int, device: str) -> Any:
            return self.meter(phase, SiteKey(*key), SiteInfo(*info), neurons, torch.device(device))

        # Runs for real, once, while torch.compile traces; the graph then holds the meter itself.
        self._traced_meter = torch.compiler.assume_constant_result(traced_meter)
        self._traced_axis = torch.compiler.assume_constant_result(lambda name: self._declared(name))
        self._attach(model)

    # --- handles ---------------------------------------------------------------------------------------------------

    def _attach(self, model: nn.Module) -> None:
        hidden: list[str] = []  # below these paths nothing is hooked
        for path, module in walk(model):
            if any(path.startswith(f"{parent}.") for parent in hidden):
                continue
            if isinstance(module, torch.jit.ScriptModule):
                self.unseen[path or "(root)"] = "a scripted module hides its activations from hooks"
                hidden.append(path)
                continue
            if isinstance(module, _FUSED):
                self.unseen[path or "(root)"] = f"{type(module).__name__} applies its activations inside a fused kernel"
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
            self._handles.append(module.register_forward_hook(_Leave(self), always_call=True))

    def detach(self) -> None:
        """Take every hook off; harmless when done before."""
        self.set_observing(False)
        for handle in (*self._handles, *self._leaf_handles):
            handle.remove()
        self._handles, self._leaf_handles = [], []
        for meter in self._meters.values():
            if meter is not None:
                meter.open = False

    def set_observing(self, observing: bool) -> None:
        """Begin or cease to count; what was left of an interrupted forward is forgotten."""
        self._leave_mode()
        self.running.clear()
        self.frame.restart()
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles = []
        self.observing = observing
        if observing and self._step_open:
            self._enter_mode()

    def open_step(self) -> None:
        """A training step that is not itself a module's forward begins: watch its own functional calls too."""
        self._step_open = True
        if self.observing:
            self._enter_mode()

    def close_step(self) -> None:
        """The training step is over."""
        self._step_open = False
        self._leave_mode()

    def _enter_mode(self) -> None:
        if not self._entered:
            self._entered.append(self._mode)
            self._mode.__enter__()

    def _leave_mode(self) -> None:
        if self._entered:
            self._entered.pop().__exit__(None, None, None)

    def fail(self, error: Exception) -> None:
        """A fault of ours: warn once, detach, and let the training go on."""
        if self.failure is None:
            self.failure = error
            self.detach()
            warnings.warn(
                f"Neuronscope met a fault of its own and stopped watching; training goes on. {error!r}",
                NeuronscopeWarning,
                stacklevel=2,
            )

    # --- forwards --------------------------------------------------------------------------------------------------

    def enter(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A watched module begins to run."""
        if path == "" and self.frame.owners and not torch.compiler.is_compiling():
            self.set_observing(True)  # a forward that was interrupted left its traces
        if self.frame.enter(path, args, kwargs) and not self.frame.muted:
            self._enter_mode()

    def leave(self) -> None:
        """A watched module is done, or failed."""
        if self.frame.leave() and not self._step_open:
            self._leave_mode()

    def before(self, path: str, activation: Activation, module: nn.Module, x: Any) -> None:
        """An activation module is about to run on ``x``."""
        call = None
        if not self.running:
            halved = getattr(module, "dim", -1) if activation.halves else None
            call = self.begin(path, "", activation, x, halved)
        self.running.append(call)

    def after(self, x: Any, y: Any) -> None:
        """An activation module made ``y`` of ``x``; ``None`` where it failed."""
        call = self.running.pop() if self.running else None
        if call is not None:
            self.end(call, x, y)

    # --- sites -----------------------------------------------------------------------------------------------------

    def begin(self, path: str, function: str, activation: Activation, x: Any, halved: int | None) -> _Call | None:
        """A site is about to run on the pre-activation ``x``: number the call, find its neurons, ask for its gradient.

        Args:
            path: The module's path, or the owner's for a functional site.
            function: The function's name for a functional site, else ``""``.
            activation: What is applied.
            x: The pre-activation.
            halved: The dimension along which ``x`` is split in two halves (GLU), else ``None``.

        Returns:
            What :meth:`end` needs, or ``None`` where ``x`` is no activation tensor.
        """
        frame = self.frame
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0 or frame.muted:
            return None
        compiling = torch.compiler.is_compiling()
        loose = not frame.owners
        recomputing = frame.recomputing
        if loose:
            if not observable():
                return None
            recomputing = in_backward()
        key = frame.number(path, function)
        if not compiling and not _real(x):
            kind = "nested tensors" if x.is_nested else f"tensors of type {type(x).__name__} on {x.device.type}"
            self.unseen.setdefault(key.name, f"{kind} cannot be counted")
            return None
        declared = self._traced_axis(key.name) if compiling else self._declared(key.name)
        if declared is None:
            axis, source = frame.flow.of(x)
        else:
            axis, source = declared % x.dim(), "declared"
        neurons = x.shape[axis]
        if halved is not None:
            halved = halved % x.dim()
            neurons = neurons // 2 if halved == axis else neurons
        info = SiteInfo(activation.name, activation.kind, activation.linear_when_on, axis, source)
        meter = self._meter_of(key, info, neurons, x)
        if meter is not None and x.requires_grad and torch.is_grad_enabled():
            self._ask_gradient(x, meter, axis, halved)
        frame.roles.put(x, (False, *key))
        examples = x.shape[0] if loose else frame.examples
        return _Call(key, meter, axis, info, examples, not recomputing)

    def end(self, call: _Call, x: Any, y: Any) -> None:
        """A site that began has made ``y`` of ``x``: count it."""
        if not isinstance(y, Tensor) or y.dim() <= call.axis:
            return
        if call.meter is not None and call.counts:
            if y.shape[call.axis] == call.meter.neurons:
                self._count(call.meter, y, call.axis, call.examples)
            else:
                self.unseen.setdefault(
                    call.key.name, f"its output has {y.shape[call.axis]} neurons where {call.meter.neurons} were expected"
                )
        if isinstance(x, Tensor):
            self.frame.flow.same(x, y)
        gate = (call.axis, call.info.axis_source, call.info.activation, call.examples, call.counts)
        self.frame.roles.put(y, (True, *call.key, *gate))

    def product(self, args: tuple[Any, ...], y: Any) -> None:
        """A product was taken: if one factor is a site's output and the other is not its input, it is a gate."""
        if len(args) != 2 or not isinstance(y, Tensor):
            return
        for factor, other in (args, args[::-1]):
            role = self.frame.roles.get(factor) if isinstance(factor, Tensor) else None
            if role is None or not role[0] or not isinstance(other, Tensor) or other is factor:
                continue
            if factor.shape != y.shape or other.shape != y.shape:
                continue
            other_role = self.frame.roles.get(other)
            if other_role is not None and other_role[1:5] == role[1:5]:
                continue  # x · sigmoid(x): an activation written out, not a gate
            self._count_gated(role, y)
            return

    def _count_gated(self, role: tuple[Any, ...], y: Tensor) -> None:
        path, function, call, axis, source, activation, examples, counts = (*role[1:4], *role[5:])
        key = SiteKey(path, function, call, True)
        info = SiteInfo(_GATED_NAMES.get(activation, f"gated {activation}"), "gated", False, axis, source)
        meter = self._meter_of(key, info, y.shape[axis], y)
        if meter is not None and counts:
            self._count(meter, y, axis, examples)

    def _count(self, meter: Meter, y: Tensor, axis: int, examples: int) -> None:
        step = self.clock if torch.compiler.is_compiling() else self.step
        add_outputs(meter, _local(y.detach()), axis, examples, step, self._scratch, self._tolerance)

    def _meter_of(self, key: SiteKey, info: SiteInfo, neurons: int, x: Tensor) -> Meter | None:
        if torch.compiler.is_compiling():
            traced_info = (info.activation, info.kind, info.linear_when_on, info.axis, info.axis_source)
            traced_key = (key.path, key.function, key.call, key.gated)
            found: Meter | None = self._traced_meter(self.phase, traced_key, traced_info, neurons, str(x.device))
            return found
        return self.meter(self.phase, key, info, neurons, x.device)

    def meter(self, phase: str, key: SiteKey, info: SiteInfo, neurons: int, device: torch.device) -> Meter | None:
        """The meter of a site in a phase; made on first use."""
        known = self._meters.get((phase, key))
        if known is not None and known.neurons == neurons:
            return known
        if known is not None:
            self.unseen.setdefault(key.name, f"its neurons changed from {known.neurons} to {neurons}; only the first count")
            return None
        if (phase, key) not in self._meters:
            made = self._meters[phase, key] = self._make_meter(phase, key, info, neurons, device)
            if made is not None and key.gated:
                made.gate = self._meters.get((phase, key._replace(gated=False)))
        return self._meters[phase, key]

    def _ask_gradient(self, x: Tensor, meter: Meter, axis: int, halved: int | None) -> None:
        if torch.compiler.is_compiling():
            ask_gradients(x, axis, halved, meter)
            return
        handle = x.register_hook(_Gradient(self, meter, axis, halved))
        if x.is_leaf:
            self._leaf_handles.append(handle)  # a leaf outlives the step: its hook must not

    def gradient(self, gradient: Tensor, meter: Meter, axis: int, halved: int | None) -> None:
        """The gradient at a pre-activation has come."""
        add_gradients(meter, _local(gate_half(gradient, halved).detach()), axis, self._scratch)
        self.frame.end_loose()


def _may_call_functions(module: nn.Module) -> bool:
    """Whether a module may apply functions of its own: all but torch's own leaves and mere containers."""
    if type(module) in (nn.ModuleList, nn.ModuleDict):
        return False
    own = type(module).__module__.startswith("torch.nn.modules.")
    return not own or next(module.children(), None) is not None


def _real(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that can be counted."""
    from torch._subclasses.fake_tensor import FakeTensor

    return (
        tensor.device.type != "meta"
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not isinstance(tensor, FakeTensor)
    )


def _local(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that this rank holds; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class _Hook:
    """A hook that a copied or pickled model carries only as a function of the standard library that does nothing."""

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Enter(_Hook):
    def __init__(self, tap: Tap, path: str) -> None:
        self.tap = tap
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.tap.observing:
            try:
                self.tap.enter(self.path, args, kwargs)
            except Exception as error:
                self.tap.fail(error)


class _Leave(_Hook):
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.tap.observing:
            try:
                self.tap.leave()
            except Exception as error:
                self.tap.fail(error)


class _Before(_Hook):
    def __init__(self, tap: Tap, path: str, activation: Activation) -> None:
        self.tap = tap
        self.path = path
        self.activation = activation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.tap.observing:
            try:
                with _unwatched():
                    self.tap.before(self.path, self.activation, module, _input(args, kwargs))
            except Exception as error:
                self.tap.fail(error)


class _After(_Hook):
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.tap.observing:
            try:
                with _unwatched():
                    self.tap.after(_input(args, kwargs), output)
            except Exception as error:
                self.tap.fail(error)


class _Gradient(_Hook):
    __torch_unserializable__ = True  # a tensor that bears this hook may be saved without it, and without a warning

    def __init__(self, tap: Tap, meter: Meter, axis: int, halved: int | None) -> None:
        self.tap = tap
        self.meter = meter
        self.axis = axis
        self.halved = halved

    def __call__(self, gradient: Tensor | None) -> None:
        if self.meter.open and gradient is not None:  # None where only another part of a split tensor was used
            try:
                with _unwatched():
                    self.tap.gradient(gradient, self.meter, self.axis, self.halved)
            except Exception as error:
                self.tap.fail(error)


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _unwatched() -> Any:
    """A context in which our own arithmetic is seen by no function mode, ours or anybody's."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch._C.DisableTorchFunction()


class _FunctionWatch(TorchFunctionMode):
    """Sees every torch function called in a forward: functional activations, gated products, and where neurons go."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap = tap

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tap = self.tap
        if tap.running or not tap.observing:
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
        call: _Call | None = None
        try:
            with _unwatched():
                halved = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) if activation.halves else None
                call = tap.begin(tap.frame.owner, activation.name, activation, x, halved)
        except Exception as error:
            tap.fail(error)
        output = func(*args, **kwargs)
        if call is not None and tap.observing:
            try:
                with _unwatched():
                    tap.end(call, x, output)
            except Exception as error:
                tap.fail(error)
        return output

    def _follow(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        tap = self.tap
        try:
            with _unwatched():
                tap.frame.flow.follow(func, args, kwargs, output)
                if tap.functional and func in _PRODUCTS:
                    tap.product(args, output)
        except Exception as error:
            tap.fail(error)
