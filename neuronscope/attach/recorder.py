"""Observer: given tensors at a site, finds whose they are and counts them.

It knows nothing of how it came by them (see :mod:`neuronscope.attach.hooks`). ``torch.compile`` can trace it: what must
happen once and for real, such as making a meter, is a constant of the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from neuronscope.attach.activations import Activation
from neuronscope.attach.dtensor import Part, cut, is_partial, local
from neuronscope.attach.forward import ForwardContext, in_backward, observable
from neuronscope.attach.gradient_hooks import CountedGradient, GradientHook, RecomputedGradient, register
from neuronscope.attach.unsupported import BATCHED_GRADIENT, IN_TRANSFORM, empty_now, in_transform, uncountable, what
from neuronscope.count.counters import Meter, add_gradients, add_outputs, ask_gradients, gate_half
from neuronscope.count.counting import Scratch
from neuronscope.sites import SiteInfo, SiteKey

__all__ = ["AxisSource", "Call", "MeterSource", "SiteRecorder"]

#: Gives the meter for a site, or ``None`` where the site is not wanted: (phase, key, info, neurons, device).
MeterSource = Callable[[str, SiteKey, SiteInfo, int, torch.device], "Meter | None"]
#: Gives the declared axis of a site, or ``None``.
AxisSource = Callable[[str], "int | None"]

_GATED_NAMES = {"relu": "reglu", "gelu": "geglu", "silu": "swiglu", "sigmoid": "glu"}


class Call(NamedTuple):
    """One call of a site that has begun and not ended.

    Attributes:
        key: The site.
        meter: Where it is counted; ``None`` where it is not wanted.
        axis: The neurons' dimension.
        axis_source: How that is known.
        activation: What is applied.
        halved: The dimension along which the input is split in two halves (GLU), else ``None``.
        examples: Independent examples behind the call.
        hook: Counts the gradient of the input; ``None`` where ``torch.compile`` traces, or nothing is counted.
        input_role: What a gated product is to know of the input: that it is one, and of which site.
        output_role: And of the output: that it is one, of which site, and where its neurons lie.
    """

    key: SiteKey
    meter: Meter | None
    axis: int
    axis_source: str
    activation: Activation
    halved: int | None
    examples: int
    hook: CountedGradient | None
    input_role: tuple[Any, ...]
    output_role: tuple[Any, ...]


class SiteRecorder:
    """What is being counted, and for whom.

    Args:
        meters: Gives the meter of a site; called once a site and phase.
        axes: Gives the declared axis of a site by name.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
        fail: Told of a fault of ours in a backward pass.
    """

    def __init__(
        self, *, meters: MeterSource, axes: AxisSource, tolerance: float, fail: Callable[[Exception], None]
    ) -> None:
        self.phase = ""
        self.compiled = False  # whether any of the model was traced by torch.compile
        self.step = 0
        with torch.inference_mode(False):
            self.clock = torch.zeros((), dtype=torch.int64, device="cpu")
        self.frame = ForwardContext()
        self.unseen: dict[str, str] = {}
        self.fail = fail
        self.shares_layers: Callable[[], bool] = lambda: False  # whether ranks share the neurons of the model's layers
        self._tolerance = tolerance
        self._scratch = Scratch()
        self._meters: dict[tuple[str, SiteKey], Meter | None] = {}
        self._make_meter = meters
        self._declared = axes
        self._declared_axes: dict[SiteKey, int | None] = {}
        self._last_calls: dict[SiteKey, tuple[Any, Call]] = {}  # of each site: what led to its last call, and that
        self._leaf_handles: list[RemovableHandle] = []
        self._suspects: dict[SiteKey, int] = {}  # positions of the sites that may have been compiled without hooks

        def traced_meter(phase: str, key: tuple[Any, ...], info: tuple[Any, ...], neurons: int, device: str) -> Any:
            self.compiled = True
            if self.shares_layers():
                self.unseen[SiteKey(*key).name] = (
                    "torch.compile traced it, and under tensor parallelism a traced graph does not say which of the "
                    "layer's neurons are this rank's: watch the model without compiling it"
                )
                return None
            meter = self.meter(phase, SiteKey(*key), SiteInfo(*info), neurons, torch.device(device))
            if meter is not None:
                meter.in_graph = True
            return meter

        def traced_axis(name: str) -> int | None:
            return self._declared(name)

        # These run for real, once, while torch.compile traces; the graph then holds the meter itself.
        self._traced_meter = torch.compiler.assume_constant_result(traced_meter)
        self._traced_axis = torch.compiler.assume_constant_result(traced_axis)

    def not_seen(self) -> dict[str, str]:
        """What could not be seen so far, and why."""
        unseen = dict(self.unseen)
        if self.frame.ran_in_parts and not self.frame.ran_whole:
            unseen["(root)"] = (
                "parts of the model were called, its forward never: functional activations between them are not seen. "
                "Call the model itself, or `scope.open_step()` before each step and `scope.close_step()` after it"
            )
        return unseen

    def suspect(self) -> None:
        """The compiler traced something while no hook was on: sites not seen in the next step may be part of it."""
        self._suspects = self._positions()

    def end_step(self) -> None:
        """An observed step is over: say which sites were missed, if any may have been."""
        if self._suspects:
            now = self._positions()
            for key, positions in self._suspects.items():
                if now[key] == positions:
                    self.unseen.setdefault(
                        key.name,
                        f"torch.compile ran while nothing was observed, and at step {self.step} this site was not "
                        "seen: what was traced then is counted no more. Call the compiled model before the first "
                        "`scope.step()`, or `torch._dynamo.reset()` now",
                    )
            self._suspects = {}

    def _positions(self) -> dict[SiteKey, int]:
        found: dict[SiteKey, int] = {}
        for (_, key), meter in self._meters.items():
            if meter is not None:
                found[key] = found.get(key, 0) + meter.totals()[0]
        return found

    def turn_to(self, phase: str, step: int) -> None:
        """Count for this phase and optimizer step from now on."""
        self.phase = phase
        self.step = step
        self.clock.fill_(step)

    def restart(self) -> None:
        """Forget an unfinished forward, and hooks on tensors that outlive their step."""
        self.frame.restart()
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles = []

    def close(self) -> None:
        """Count nothing any more, gradients of graphs that are still alive included."""
        self.restart()
        for meter in self._meters.values():
            if meter is not None:
                meter.open = False

    def begin(self, path: str, function: str, activation: Activation, x: Any, halved: int | None) -> Call | None:
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
        if frame.muted:
            return None
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
            if not function and not torch.compiler.is_compiling():  # a function of integers is no activation
                self.unseen.setdefault(path or "(root)", f"it ran on {what(x)}, which cannot be counted")
            return None
        loose = not frame.owners
        if loose and not frame.bounded:
            frame.ran_in_parts = True
        recomputing = frame.recomputing
        if loose:
            if not observable():
                return None
            recomputing = in_backward()
        transformed = in_transform(x)
        if recomputing:
            if not transformed:
                self._ask_again(x, path, function, halved)
            return None
        key = frame.number(path, function)
        if transformed:
            self.unseen.setdefault(key.name, IN_TRANSFORM)
            return None
        call = self._call(key, activation, x, halved, self._examples(x))
        if call is None:
            return None
        if call.meter is not None and x.requires_grad and torch.is_grad_enabled():
            if call.hook is not None:
                self._hook(x, call.hook)
            else:
                ask_gradients(x, call.axis, call.halved, call.meter)
        frame.roles.put(x, call.input_role)
        return call

    def _examples(self, tensor: Tensor) -> int:
        """Return how many independent examples are behind a tensor: those of the forward, outside of one its length."""
        return self.frame.examples if self.frame.owners else tensor.size(0)

    def _call(self, key: SiteKey, activation: Activation, x: Tensor, halved: int | None, examples: int) -> Call | None:
        """What is known of a call. All of it follows from a few things; where these are as last time, so is it."""
        if torch.compiler.is_compiling():
            return self._find(key, activation, x, halved, examples)
        given = None  # a tensor of another class is looked at each time
        if type(x) is Tensor and not x.is_nested:
            ground = self.frame.flow.ground(x)
            given = (self.phase, x.shape, x.layout, empty_now(x), halved, examples, activation, ground)
            last = self._last_calls.get(key)
            if last is not None and last[0] == given:
                return last[1]
        call = self._find(key, activation, x, halved, examples)
        if call is not None:
            self._last_calls[key] = given, call
        return call

    def _find(self, key: SiteKey, activation: Activation, x: Tensor, halved: int | None, examples: int) -> Call | None:
        """Work out what a call leads to; ``None``, and why, where it cannot be counted."""
        compiling = torch.compiler.is_compiling()
        if not compiling and (reason := uncountable(x)):
            self.unseen.setdefault(key.name, reason)
            return None
        declared = self._traced_axis(key.name) if compiling else self._declared_axis(key)
        if declared is None:
            axis, source, mixed, part = self.frame.flow.of(x)
            if mixed:
                self.unseen.setdefault(
                    key._replace(call=0).name,
                    "its weights are a stack (experts), so that one index is a neuron of each of them; "
                    "declare its axis to count those together",
                )
                return None
        elif -x.dim() <= declared < x.dim():
            axis, source = declared % x.dim(), "declared"
            part = self.frame.flow.part(x, axis)
        else:
            self.unseen.setdefault(key.name, f"axis {declared} was declared for it, and its tensor has {x.dim()} axes")
            return None
        neurons = local(x).shape[axis]
        if halved is not None:
            halved = halved % x.dim()
            if halved == axis:
                neurons, part = neurons // 2, Part(part.first // 2, part.whole // 2)
        meter = self._known(key, neurons)
        if meter is None:
            info = SiteInfo(activation.name, activation.kind, activation.linear_when_on, axis, source, *part)
            meter = self._meter_of(key, info, neurons, x)
            if meter is not None and not compiling:
                meter.cut = cut(x)
        place = (key.path, key.function)
        hook = None if compiling or meter is None else CountedGradient(self, place, halved, meter, axis)
        role = (True, *key, axis, source, part, activation.name)
        return Call(key, meter, axis, source, activation, halved, examples, hook, (False, *key), role)

    def end(self, call: Call, x: Any, y: Any) -> None:
        """A site that began has made ``y`` of ``x``: count it."""
        if not isinstance(y, Tensor) or y.dim() <= call.axis:
            return
        if call.meter is not None:
            neurons = local(y).shape[call.axis]
            if neurons == call.meter.neurons and (not isinstance(x, Tensor) or cut(x) == cut(y)):
                self._count(call.meter, y, call.axis, call.examples)
            else:
                self.unseen.setdefault(
                    call.key.name,
                    f"its output has {neurons} neurons where {call.meter.neurons} were expected",
                )
        if isinstance(x, Tensor):
            self.frame.flow.same(x, y)
        self.frame.roles.put(y, call.output_role)

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
        path, function, call, axis, source, part, activation = (*role[1:4], *role[5:])
        key = SiteKey(path, function, call, True)
        if in_transform(y):
            self.unseen.setdefault(key.name, IN_TRANSFORM)
            return
        info = SiteInfo(_GATED_NAMES.get(activation, f"gated {activation}"), "gated", False, axis, source, *part)
        meter = self._meter_of(key, info, local(y).shape[axis], y)
        if meter is not None:
            self._count(meter, y, axis, self._examples(y))

    def _count(self, meter: Meter, y: Tensor, axis: int, examples: int) -> None:
        step = self.clock if torch.compiler.is_compiling() else self.step
        add_outputs(meter, local(y.detach()), axis, examples, step, self._scratch, self._tolerance)

    def _declared_axis(self, key: SiteKey) -> int | None:
        if key not in self._declared_axes:
            self._declared_axes[key] = self._declared(key.name)
        return self._declared_axes[key]

    def _known(self, key: SiteKey, neurons: int) -> Meter | None:
        """The meter of a site that was met before in this phase, in eager mode."""
        if torch.compiler.is_compiling():
            return None
        meter = self._meters.get((self.phase, key))
        return meter if meter is not None and meter.neurons == neurons else None

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
            self.unseen.setdefault(
                key.name, f"its neurons changed from {known.neurons} to {neurons}; only the first count"
            )
            return None
        if (phase, key) not in self._meters:
            made = self._meters[phase, key] = self._make_meter(phase, key, info, neurons, device)
            if made is not None and key.gated:
                made.gate = self._meters.get((phase, key._replace(gated=False)))
        return self._meters[phase, key]

    def _ask_again(self, x: Tensor, path: str, function: str, halved: int | None) -> None:
        """A checkpoint runs a site again: its output was counted before, but its gradient may come only now."""
        place = (path, function)
        if not x.requires_grad or not torch.is_grad_enabled() or self._is_asked(x, place):
            return
        recomputation = self.frame.recomputation
        number = recomputation.again(place)

        def site() -> tuple[Meter | None, int]:
            call = recomputation.call_of(place, number)
            key = SiteKey(path, function, call, False)
            last = self._last_calls.get(key)
            return self._meters.get((self.phase, key)), 0 if last is None else last[1].axis

        self._hook(x, RecomputedGradient(self, place, halved, site))

    def _is_asked(self, x: Tensor, place: tuple[str, str]) -> bool:
        """Whether the site asked this very tensor before: a checkpoint that is not reentrant runs on it again."""
        hooks = (x._backward_hooks or {}).values()
        return any(isinstance(hook, GradientHook) and (hook.observer, hook.place) == (self, place) for hook in hooks)

    def _hook(self, x: Tensor, hook: GradientHook) -> None:
        handle = register(x, hook)
        if handle is not None and x.is_leaf:
            self._leaf_handles.append(handle)  # a leaf outlives the step: its hook must not

    def gradient(self, gradient: Tensor, meter: Meter, axis: int, halved: int | None) -> None:
        """The gradient at a pre-activation has come: count it."""
        self.frame.end_loose()
        if in_transform(gradient):
            self._gradient_unseen(meter, BATCHED_GRADIENT)
        elif type(gradient) is not Tensor and (is_partial(gradient) or cut(gradient) != meter.cut):
            self._gradient_unseen(meter, "its gradient is spread over the ranks in another way than its output")
        else:
            plain = gradient.detach() if gradient.requires_grad else gradient
            add_gradients(meter, gate_half(local(plain), halved), axis, self._scratch)

    def _gradient_unseen(self, meter: Meter, reason: str) -> None:
        name = next(key.name for (_, key), known in self._meters.items() if known is meter)
        self.unseen.setdefault(name, reason)
