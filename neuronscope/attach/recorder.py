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
from neuronscope.attach.compiling import has_real_tensors, in_backward, is_tracing
from neuronscope.attach.dtensor import NeuronShard, is_partial, local_tensor, sharded_dims
from neuronscope.attach.forward import ForwardContext
from neuronscope.attach.gradient_hooks import CountedGradient, GradientHook, RecomputedGradient, register
from neuronscope.attach.unsupported import (
    BATCHED_GRADIENT,
    IN_TRANSFORM,
    describe_input,
    holds_no_data,
    in_transform,
    unsupported_reason,
)
from neuronscope.count.counters import SiteCounters, add_gradients, add_outputs, gate_half, register_gradient_hook
from neuronscope.count.counting import ScratchBuffers
from neuronscope.sites import SiteInfo, SiteKey

__all__ = ["Call", "CountersFactory", "DeclaredAxis", "SiteRecorder"]

#: Gives the meter for a site, or ``None`` where the site is not wanted: (phase, key, info, neurons, device).
CountersFactory = Callable[[str, SiteKey, SiteInfo, int, torch.device], "SiteCounters | None"]
#: Gives the declared axis of a site, or ``None``.
DeclaredAxis = Callable[[str], "int | None"]


class Call(NamedTuple):
    """One call of a site that has begun and not ended.

    Attributes:
        key: The site.
        counters: Where it is counted; ``None`` where it is not wanted.
        axis: The neurons' dimension.
        axis_source: How that is known.
        activation: What is applied.
        glu_dim: The dimension along which the input is split in two halves (GLU), else ``None``.
        examples: Independent examples behind the call.
        hook: Counts the gradient of the input; ``None`` where ``torch.compile`` traces, or nothing is counted.
        input_role: What a gated product is to know of the input: that it is one, and of which site.
        output_role: And of the output: that it is one, of which site, and where its neurons lie.
    """

    key: SiteKey
    counters: SiteCounters | None
    axis: int
    axis_source: str
    activation: Activation
    glu_dim: int | None
    examples: int
    hook: CountedGradient | None
    input_role: tuple[Any, ...]
    output_role: tuple[Any, ...]


class SiteRecorder:
    """What is being counted, and for whom.

    Args:
        new_counters: Gives the meter of a site; called once a site and phase.
        declared_axis: Gives the declared axis of a site by name.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
        fail: Told of a fault of ours in a backward pass.
    """

    def __init__(
        self,
        *,
        new_counters: CountersFactory,
        declared_axis: DeclaredAxis,
        tolerance: float,
        fail: Callable[[Exception], None],
    ) -> None:
        self.phase = ""
        self.compiled = False  # whether any of the model was traced by torch.compile
        self.step = 0
        with torch.inference_mode(False):
            self.step_tensor = torch.zeros((), dtype=torch.int64, device="cpu")
        self.forward = ForwardContext()
        self.unseen: dict[str, str] = {}
        self.fail = fail
        self.is_tensor_parallel: Callable[[], bool] = lambda: (
            False
        )  # whether ranks share the neurons of the model's layers
        self._tolerance = tolerance
        self._scratch = ScratchBuffers()
        self._counters: dict[tuple[str, SiteKey], SiteCounters | None] = {}
        self._new_counters = new_counters
        self._declared = declared_axis
        self._declared_axes: dict[SiteKey, int | None] = {}
        self._last_calls: dict[SiteKey, tuple[Any, Call]] = {}  # of each site: what led to its last call, and that
        self._leaf_handles: list[RemovableHandle] = []
        self._suspects: dict[SiteKey, int] = {}  # positions of the sites that may have been compiled without hooks

        def traced_counters(phase: str, key: tuple[Any, ...], info: tuple[Any, ...], neurons: int, device: str) -> Any:
            self.compiled = True
            if self.is_tensor_parallel():
                self.unseen[SiteKey(*key).name] = (
                    "torch.compile traced it, and under tensor parallelism a traced graph does not say which of the "
                    "layer's neurons are this rank's: watch the model without compiling it"
                )
                return None
            counters = self.make_counters(phase, SiteKey(*key), SiteInfo(*info), neurons, torch.device(device))
            if counters is not None:
                counters.in_graph = True
            return counters

        def traced_axis(name: str) -> int | None:
            return self._declared(name)

        # These run for real, once, while torch.compile traces; the graph then holds the meter itself.
        self._traced_counters = torch.compiler.assume_constant_result(traced_counters)
        self._traced_axis = torch.compiler.assume_constant_result(traced_axis)

    def not_seen(self) -> dict[str, str]:
        """What could not be seen so far, and why."""
        unseen = dict(self.unseen)
        if self.forward.ran_parts and not self.forward.ran_root:
            unseen["(root)"] = (
                "parts of the model were called, its forward never: functional activations between them are not seen. "
                "Call the model itself, or `scope.open_step()` before each step and `scope.close_step()` after it"
            )
        return unseen

    def expect_missed_sites(self) -> None:
        """The compiler traced something while no hook was on: sites not seen in the next step may be part of it."""
        self._suspects = self._positions()

    def note_missed_sites(self) -> None:
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
        for (_, key), counters in self._counters.items():
            if counters is not None:
                found[key] = found.get(key, 0) + counters.totals()[0]
        return found

    def set_phase(self, phase: str, step: int) -> None:
        """Count for this phase and optimizer step from now on."""
        self.phase = phase
        self.step = step
        self.step_tensor.fill_(step)

    def restart(self) -> None:
        """Forget an unfinished forward, and hooks on tensors that outlive their step."""
        self.forward.restart()
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles = []

    def close(self) -> None:
        """Count nothing any more, gradients of graphs that are still alive included."""
        self.restart()
        for counters in self._counters.values():
            if counters is not None:
                counters.open = False

    def begin(self, path: str, function: str, activation: Activation, x: Any, glu_dim: int | None) -> Call | None:
        """A site is about to run on the pre-activation ``x``: number the call, find its neurons, ask for its gradient.

        Args:
            path: The module's path, or the owner's for a functional site.
            function: The function's name for a functional site, else ``""``.
            activation: What is applied.
            x: The pre-activation.
            glu_dim: The dimension along which ``x`` is split in two halves (GLU), else ``None``.

        Returns:
            What :meth:`end` needs, or ``None`` where ``x`` is no activation tensor.
        """
        forward = self.forward
        if forward.exporting:
            return None
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
            if not function and not is_tracing():  # a function of integers is no activation
                self.unseen.setdefault(path or "(root)", f"it ran on {describe_input(x)}, which cannot be counted")
            return None
        outside_module = not forward.module_stack
        if outside_module and not forward.explicit_step:
            forward.ran_parts = True
        recomputing = forward.recomputing
        if outside_module:
            if not has_real_tensors():
                return None
            recomputing = in_backward()
        transformed = in_transform(x)
        if recomputing:
            if not transformed:
                self._register_recomputed(x, path, function, glu_dim)
            return None
        key = forward.number(path, function)
        if transformed:
            self.unseen.setdefault(key.name, IN_TRANSFORM)
            return None
        call = self._call(key, activation, x, glu_dim, self._examples(x))
        if call is None:
            return None
        if call.counters is not None and x.requires_grad and torch.is_grad_enabled():
            if call.hook is not None:
                self._hook(x, call.hook)
            else:
                register_gradient_hook(x, call.axis, call.glu_dim, call.counters)
        forward.roles.put(x, call.input_role)
        return call

    def _examples(self, tensor: Tensor) -> int:
        """Return how many independent examples are behind a tensor: those of the forward, outside of one its length."""
        return self.forward.examples if self.forward.module_stack else tensor.size(0)

    def _call(self, key: SiteKey, activation: Activation, x: Tensor, glu_dim: int | None, examples: int) -> Call | None:
        """What is known of a call. All of it follows from a few things; where these are as last time, so is it."""
        if is_tracing():
            return self._find(key, activation, x, glu_dim, examples)
        given = None  # a tensor of another class is looked at each time
        if type(x) is Tensor and not x.is_nested:
            cache_key = self.forward.flow.cache_key(x)
            given = (self.phase, x.shape, x.layout, holds_no_data(x), glu_dim, examples, activation, cache_key)
            last = self._last_calls.get(key)
            if last is not None and last[0] == given:
                return last[1]
        call = self._find(key, activation, x, glu_dim, examples)
        if call is not None:
            self._last_calls[key] = given, call
        return call

    def _find(self, key: SiteKey, activation: Activation, x: Tensor, glu_dim: int | None, examples: int) -> Call | None:
        """Work out what a call leads to; ``None``, and why, where it cannot be counted."""
        compiling = is_tracing()
        if not compiling and (reason := unsupported_reason(x)):
            self.unseen.setdefault(key.name, reason)
            return None
        declared = self._traced_axis(key.name) if compiling else self._declared_axis(key)
        if declared is None:
            axis, source, mixed, shard = self.forward.flow.of(x)
            if mixed:
                self.unseen.setdefault(
                    key._replace(call=0).name,
                    "its weights are a stack (experts), so that one index is a neuron of each of them; "
                    "declare its axis to count those together",
                )
                return None
        elif -x.dim() <= declared < x.dim():
            axis, source = declared % x.dim(), "declared"
            shard = self.forward.flow.shard(x, axis)
        else:
            self.unseen.setdefault(key.name, f"axis {declared} was declared for it, and its tensor has {x.dim()} axes")
            return None
        neurons = local_tensor(x).shape[axis]
        if glu_dim is not None:
            glu_dim = glu_dim % x.dim()
            if glu_dim == axis:
                neurons, shard = neurons // 2, NeuronShard(shard.first // 2, shard.whole // 2)
        counters = self._known(key, neurons)
        if counters is None:
            info = SiteInfo(activation.name, activation.kind, activation.linear_when_on, axis, source, *shard)
            counters = self._counters_for(key, info, neurons, x)
            if counters is not None and not compiling:
                counters.sharded_dims = sharded_dims(x)
        place = (key.path, key.function)
        hook = None if compiling or counters is None else CountedGradient(self, place, glu_dim, counters, axis)
        gated_name = activation.gated_name or f"gated {activation.name}"
        role = (True, *key, axis, source, shard, gated_name)
        return Call(key, counters, axis, source, activation, glu_dim, examples, hook, (False, *key), role)

    def end(self, call: Call, x: Any, y: Any) -> None:
        """A site that began has made ``y`` of ``x``: count it."""
        if not isinstance(y, Tensor) or y.dim() <= call.axis:
            return
        if call.counters is not None:
            neurons = local_tensor(y).shape[call.axis]
            if neurons == call.counters.neurons and (not isinstance(x, Tensor) or sharded_dims(x) == sharded_dims(y)):
                self._count(call.counters, y, call.axis, call.examples)
            else:
                self.unseen.setdefault(
                    call.key.name,
                    f"its output has {neurons} neurons where {call.counters.neurons} were expected",
                )
        if isinstance(x, Tensor):
            self.forward.flow.same(x, y)
        self.forward.roles.put(y, call.output_role)

    def product(self, args: tuple[Any, ...], y: Any) -> None:
        """A product was taken: if one factor is a site's output and the other is not its input, it is a gate."""
        if len(args) != 2 or not isinstance(y, Tensor):
            return
        for factor, other in (args, args[::-1]):
            role = self.forward.roles.get(factor) if isinstance(factor, Tensor) else None
            if role is None or not role[0] or not isinstance(other, Tensor) or other is factor:
                continue
            if factor.shape != y.shape or other.shape != y.shape:
                continue
            other_role = self.forward.roles.get(other)
            if other_role is not None and other_role[1:5] == role[1:5]:
                continue  # x · sigmoid(x): an activation written out, not a gate
            self._count_gated(role, y)
            return

    def _count_gated(self, role: tuple[Any, ...], y: Tensor) -> None:
        path, function, call, axis, source, shard, gated_name = (*role[1:4], *role[5:])
        key = SiteKey(path, function, call, True)
        if in_transform(y):
            self.unseen.setdefault(key.name, IN_TRANSFORM)
            return
        info = SiteInfo(gated_name, "gated", False, axis, source, *shard)
        counters = self._counters_for(key, info, local_tensor(y).shape[axis], y)
        if counters is not None:
            self._count(counters, y, axis, self._examples(y))

    def _count(self, counters: SiteCounters, y: Tensor, axis: int, examples: int) -> None:
        step = self.step_tensor if is_tracing() else self.step
        add_outputs(counters, local_tensor(y.detach()), axis, examples, step, self._scratch, self._tolerance)

    def _declared_axis(self, key: SiteKey) -> int | None:
        if key not in self._declared_axes:
            self._declared_axes[key] = self._declared(key.name)
        return self._declared_axes[key]

    def _known(self, key: SiteKey, neurons: int) -> SiteCounters | None:
        """The meter of a site that was met before in this phase, in eager mode."""
        if is_tracing():
            return None
        counters = self._counters.get((self.phase, key))
        return counters if counters is not None and counters.neurons == neurons else None

    def _counters_for(self, key: SiteKey, info: SiteInfo, neurons: int, x: Tensor) -> SiteCounters | None:
        if is_tracing():
            traced_info = (info.activation, info.kind, info.linear_when_on, info.axis, info.axis_source)
            traced_key = (key.path, key.function, key.call, key.gated)
            found: SiteCounters | None = self._traced_counters(
                self.phase, traced_key, traced_info, neurons, str(x.device)
            )
            return found
        return self.make_counters(self.phase, key, info, neurons, x.device)

    def make_counters(
        self, phase: str, key: SiteKey, info: SiteInfo, neurons: int, device: torch.device
    ) -> SiteCounters | None:
        """The meter of a site in a phase; made on first use."""
        known = self._counters.get((phase, key))
        if known is not None and known.neurons == neurons:
            return known
        if known is not None:
            self.unseen.setdefault(
                key.name, f"its neurons changed from {known.neurons} to {neurons}; only the first count"
            )
            return None
        if (phase, key) not in self._counters:
            made = self._counters[phase, key] = self._new_counters(phase, key, info, neurons, device)
            if made is not None and key.gated:
                made.gate = self._counters.get((phase, key._replace(gated=False)))
        return self._counters[phase, key]

    def _register_recomputed(self, x: Tensor, path: str, function: str, glu_dim: int | None) -> None:
        """A checkpoint runs a site again: its output was counted before, but its gradient may come only now."""
        place = (path, function)
        if not x.requires_grad or not torch.is_grad_enabled() or self._is_registered(x, place):
            return
        recomputation = self.forward.recomputation
        number = recomputation.next_number(place)

        def site() -> tuple[SiteCounters | None, int]:
            call = recomputation.forward_call(place, number)
            key = SiteKey(path, function, call, False)
            last = self._last_calls.get(key)
            return self._counters.get((self.phase, key)), 0 if last is None else last[1].axis

        self._hook(x, RecomputedGradient(self, place, glu_dim, site))

    def _is_registered(self, x: Tensor, place: tuple[str, str]) -> bool:
        """Whether the site asked this very tensor before: a checkpoint that is not reentrant runs on it again."""
        hooks = (x._backward_hooks or {}).values()
        return any(isinstance(hook, GradientHook) and (hook.recorder, hook.place) == (self, place) for hook in hooks)

    def _hook(self, x: Tensor, hook: GradientHook) -> None:
        handle = register(x, hook)
        if handle is not None and x.is_leaf:
            self._leaf_handles.append(handle)  # a leaf outlives the step: its hook must not

    def gradient(self, gradient: Tensor, counters: SiteCounters, axis: int, glu_dim: int | None) -> None:
        """The gradient at a pre-activation has come: count it."""
        self.forward.restart_outside_calls()
        if in_transform(gradient):
            self._gradient_unseen(counters, BATCHED_GRADIENT)
        elif type(gradient) is not Tensor and (is_partial(gradient) or sharded_dims(gradient) != counters.sharded_dims):
            self._gradient_unseen(counters, "its gradient is spread over the ranks in another way than its output")
        else:
            plain = gradient.detach() if gradient.requires_grad else gradient
            add_gradients(counters, gate_half(local_tensor(plain), glu_dim), axis, self._scratch)

    def _gradient_unseen(self, counters: SiteCounters, reason: str) -> None:
        name = next(key.name for (_, key), known in self._counters.items() if known is counters)
        self.unseen.setdefault(name, reason)
