"""Find the site and the neuron axis of an activation tensor, and update the counters of the site.

The hooks and the function mode pass the tensors in: see :mod:`neuronscope.attach.hooks`. ``torch.compile`` can trace
this. What must really run, once, such as making counters, is a constant of the trace.
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
from neuronscope.attach.forward import INFERENCE, ForwardContext
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

#: Returns the counters for a site, or ``None`` if the site is not wanted: (phase, key, info, neurons, device).
CountersFactory = Callable[[str, SiteKey, SiteInfo, int, torch.device], "SiteCounters | None"]
#: Returns the declared axis of a site by its name, or ``None``.
DeclaredAxis = Callable[[str], "int | None"]


class Call(NamedTuple):
    """One call of a site that has begun and not ended.

    Attributes:
        key: The site.
        counters: The counters of the site; ``None`` if the site is not wanted.
        axis: Dimension of the neurons.
        axis_source: How the axis is known.
        activation: The activation that is applied.
        glu_dim: The dimension along which the input is split in two halves (GLU), otherwise ``None``.
        examples: Number of independent examples in the input.
        hook: Counts the gradient of the input; ``None`` while ``torch.compile`` traces, or if nothing is counted.
        input_role: Recorded for the input, to recognize gated products: false, then the key of the site.
        output_role: Recorded for the output: true, the key of the site, where its neurons lie, and the product's name.
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
    """Records the calls of all sites of a model.

    Args:
        new_counters: Returns the counters of a site; called once for each site and phase.
        declared_axis: Returns the declared axis of a site by its name.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
        fail: Called with an error of our own code in a backward pass.

    Attributes:
        phase: The phase that is counted. In ``train``, what runs without gradients is counted as ``inference``.
        step: The optimizer step that is counted.
        step_tensor: The same as a tensor, for compiled graphs: int64, without dimensions.
        compiled: Whether ``torch.compile`` traced any part of the model.
        forward: The forward that is running.
        not_measured: Maps a site to the reason why it, or a part of its calls, is not measured.
        is_tensor_parallel: Returns whether ranks share the neurons of the model's layers.
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
        self.compiled = False
        self.step = 0
        with torch.inference_mode(False):
            self.step_tensor = torch.zeros((), dtype=torch.int64, device="cpu")
        self.forward = ForwardContext()
        self.not_measured: dict[str, str] = {}
        self.fail = fail
        self.is_tensor_parallel: Callable[[], bool] = lambda: False
        self._tolerance = tolerance
        self._scratch = ScratchBuffers()
        self._counters: dict[tuple[str, SiteKey], SiteCounters | None] = {}
        self._new_counters = new_counters
        self._declared = declared_axis
        self._declared_axes: dict[SiteKey, int | None] = {}
        self._last_calls: dict[
            SiteKey, tuple[Any, Call]
        ] = {}  # of each site: the facts behind its last call, and the call
        self._leaf_handles: list[RemovableHandle] = []
        self._maybe_missed: dict[SiteKey, int] = {}  # positions of the sites that may have been compiled without hooks

        def traced_counters(phase: str, key: tuple[Any, ...], info: tuple[Any, ...], neurons: int, device: str) -> Any:
            self.compiled = True
            if self.is_tensor_parallel():
                self.not_measured[SiteKey(*key).name] = (
                    "torch.compile traced it, and under tensor parallelism a traced graph does not say which of the "
                    "layer's neurons are this rank's: watch the model without compiling it"
                )
                return None
            counters = self.site_counters(phase, SiteKey(*key), SiteInfo(*info), neurons, torch.device(device))
            if counters is not None:
                counters.in_graph = True
            return counters

        def traced_axis(name: str) -> int | None:
            return self._declared(name)

        # torch.compile runs these while it traces; the graph then holds the counters themselves.
        self._traced_counters = torch.compiler.assume_constant_result(traced_counters)
        self._traced_axis = torch.compiler.assume_constant_result(traced_axis)

    def all_not_measured(self) -> dict[str, str]:
        """Return all sites and modules that are not measured so far, each with the reason."""
        not_measured = dict(self.not_measured)
        if self.forward.ran_parts and not self.forward.ran_root:
            not_measured["(root)"] = (
                "parts of the model were called, but never its forward: functional activations between them are not "
                "seen. Call the model itself, or `scope.open_step()` before each step and `scope.close_step()` after it"
            )
        return not_measured

    def expect_missed_sites(self) -> None:
        """Note that the compiler traced something while no hook was on the model, so that sites may be missed."""
        self._maybe_missed = self._positions()

    def note_missed_sites(self) -> None:
        """After an observed step, note the sites that were not seen in it, if some may have been missed."""
        if self._maybe_missed:
            now = self._positions()
            for key, positions in self._maybe_missed.items():
                if now[key] == positions:
                    self.not_measured.setdefault(
                        key.name,
                        f"torch.compile ran while nothing was observed, and at step {self.step} this site was not "
                        "seen: what was traced then is not counted. Call the compiled model before the first "
                        "`scope.step()`, or `torch._dynamo.reset()` now",
                    )
            self._maybe_missed = {}

    def _positions(self) -> dict[SiteKey, int]:
        found: dict[SiteKey, int] = {}
        for (_, key), counters in self._counters.items():
            if counters is not None:
                found[key] = found.get(key, 0) + counters.totals()[0]
        return found

    def set_phase(self, phase: str, step: int) -> None:
        """Count for this phase and this optimizer step from now on.

        Args:
            phase: Name of the phase.
            step: Number of the optimizer step.
        """
        self.phase = phase
        self.forward.training = phase == "train"
        self.step = step
        self.step_tensor.fill_(step)

    @property
    def running_phase(self) -> str:
        """The phase of the forward that is running."""
        return INFERENCE if self.forward.inference else self.phase

    def restart(self) -> None:
        """Forget an unfinished forward, and remove the hooks on tensors that outlive their step."""
        self.forward.restart()
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles = []

    def close(self) -> None:
        """Stop counting, also the gradients of graphs that are still alive."""
        self.restart()
        for counters in self._counters.values():
            if counters is not None:
                counters.open = False

    def begin(self, path: str, function: str, activation: Activation, x: Any, glu_dim: int | None) -> Call | None:
        """Begin a call of a site: number it, find its neurons, and register a hook for the gradient of its input.

        Args:
            path: Path of the activation module, or of the module that calls the activation function.
            function: Name of the function for a functional site, otherwise ``""``.
            activation: The activation that is applied.
            x: The pre-activation ``(…, N, …)``.
            glu_dim: The dimension along which ``x`` is split in two halves (GLU), otherwise ``None``.

        Returns:
            The call, for :meth:`end`; ``None`` if it is not counted.
        """
        forward = self.forward
        if forward.exporting:
            return None
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
            if not function and not is_tracing():  # a function of integers is not an activation
                self.not_measured.setdefault(
                    path or "(root)", f"it ran on {describe_input(x)}, which cannot be counted"
                )
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
            self.not_measured.setdefault(key.name, IN_TRANSFORM)
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
        """Return the number of examples of the forward; outside of a forward, the length of the tensor."""
        return self.forward.examples if self.forward.module_stack else tensor.size(0)

    def _call(self, key: SiteKey, activation: Activation, x: Tensor, glu_dim: int | None, examples: int) -> Call | None:
        """Return the call, from the last call of the site if all facts that it follows from are the same."""
        if is_tracing():
            return self._find(key, activation, x, glu_dim, examples)
        facts = None  # tensors of other classes are examined each time
        if type(x) is Tensor and not x.is_nested:
            cache_key = self.forward.flow.cache_key(x)
            facts = (self.running_phase, x.shape, x.layout, holds_no_data(x), glu_dim, examples, activation, cache_key)
            last = self._last_calls.get(key)
            if last is not None and last[0] == facts:
                return last[1]
        call = self._find(key, activation, x, glu_dim, examples)
        if call is not None:
            self._last_calls[key] = facts, call
        return call

    def _find(self, key: SiteKey, activation: Activation, x: Tensor, glu_dim: int | None, examples: int) -> Call | None:
        """Return the call, or ``None`` after noting why it cannot be counted."""
        compiling = is_tracing()
        if not compiling and (reason := unsupported_reason(x)):
            self.not_measured.setdefault(key.name, reason)
            return None
        declared = self._traced_axis(key.name) if compiling else self._declared_axis(key)
        if declared is None:
            axis, source, mixed, shard = self.forward.flow.of(x)
            if mixed:
                self.not_measured.setdefault(
                    key._replace(call=0).name,
                    "its weights are a stack (experts), so that one index is a neuron of each of them; "
                    "declare its axis to count those together",
                )
                return None
        elif -x.dim() <= declared < x.dim():
            axis, source = declared % x.dim(), "declared"
            shard = self.forward.flow.shard(x, axis)
        else:
            self.not_measured.setdefault(
                key.name, f"axis {declared} was declared for it, and its tensor has {x.dim()} axes"
            )
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
        """End a call of a site: count its output.

        Args:
            call: What :meth:`begin` returned.
            x: The pre-activation ``(…, N, …)``.
            y: The output ``(…, N, …)``.
        """
        if not isinstance(y, Tensor) or y.dim() <= call.axis:
            return
        if call.counters is not None:
            neurons = local_tensor(y).shape[call.axis]
            if neurons == call.counters.neurons and (not isinstance(x, Tensor) or sharded_dims(x) == sharded_dims(y)):
                self._count(call.counters, y, call.axis, call.examples)
            else:
                self.not_measured.setdefault(
                    call.key.name,
                    f"its output has {neurons} neurons where {call.counters.neurons} were expected",
                )
        if isinstance(x, Tensor):
            self.forward.flow.same(x, y)
        self.forward.roles.put(y, call.output_role)

    def product(self, args: tuple[Any, ...], y: Any) -> None:
        """Count a product as gated if one factor is the output of a site and the other is not the input of that site.

        Args:
            args: The two factors.
            y: The product.
        """
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
                continue  # x · sigmoid(x) is an activation written out, not a gated product
            self._count_gated(role, y)
            return

    def _count_gated(self, role: tuple[Any, ...], y: Tensor) -> None:
        path, function, call, axis, source, shard, gated_name = (*role[1:4], *role[5:])
        key = SiteKey(path, function, call, True)
        if in_transform(y):
            self.not_measured.setdefault(key.name, IN_TRANSFORM)
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
        """Return the counters that a site already has in this phase; ``None`` while ``torch.compile`` traces."""
        if is_tracing():
            return None
        counters = self._counters.get((self.running_phase, key))
        return counters if counters is not None and counters.neurons == neurons else None

    def _counters_for(self, key: SiteKey, info: SiteInfo, neurons: int, x: Tensor) -> SiteCounters | None:
        if is_tracing():
            traced_info = (info.activation, info.kind, info.linear_when_on, info.axis, info.axis_source)
            traced_key = (key.path, key.function, key.call, key.gated)
            found: SiteCounters | None = self._traced_counters(
                self.running_phase, traced_key, traced_info, neurons, str(x.device)
            )
            return found
        return self.site_counters(self.running_phase, key, info, neurons, x.device)

    def site_counters(
        self, phase: str, key: SiteKey, info: SiteInfo, neurons: int, device: torch.device
    ) -> SiteCounters | None:
        """Return the counters of a site in a phase, and make them on first use.

        Args:
            phase: The phase.
            key: The site.
            info: What is known of the site.
            neurons: Number of its neurons.
            device: Device of its tensors.

        Returns:
            The counters; ``None`` if the site is not wanted, or if its number of neurons has changed.
        """
        known = self._counters.get((phase, key))
        if known is not None and known.neurons == neurons:
            return known
        if known is not None:
            self.not_measured.setdefault(
                key.name, f"its neurons changed from {known.neurons} to {neurons}; only the first count"
            )
            return None
        if (phase, key) not in self._counters:
            made = self._counters[phase, key] = self._new_counters(phase, key, info, neurons, device)
            if made is not None and key.gated:
                made.gate = self._counters.get((phase, key._replace(gated=False)))
        return self._counters[phase, key]

    def _register_recomputed(self, x: Tensor, path: str, function: str, glu_dim: int | None) -> None:
        """Register a gradient hook for a recomputed call: activation checkpointing runs a site again in backward.

        Its output was counted before. Its gradient may arrive only now.
        """
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
        """Whether the tensor has a hook of this site: non-reentrant checkpointing runs the site on it again."""
        hooks = (x._backward_hooks or {}).values()
        return any(isinstance(hook, GradientHook) and (hook.recorder, hook.place) == (self, place) for hook in hooks)

    def _hook(self, x: Tensor, hook: GradientHook) -> None:
        handle = register(x, hook)
        if handle is not None and x.is_leaf:
            self._leaf_handles.append(handle)  # a leaf outlives the step, and its hook must not

    def gradient(self, gradient: Tensor, counters: SiteCounters, axis: int, glu_dim: int | None) -> None:
        """Count a gradient at a pre-activation.

        Args:
            gradient: Gradient ``(…, N, …)``.
            counters: The counters of the site.
            axis: Dimension of the neurons.
            glu_dim: The dimension along which the input is split in two halves (GLU), otherwise ``None``.
        """
        self.forward.restart_outside_calls()
        if in_transform(gradient):
            self._note_gradient(counters, BATCHED_GRADIENT)
        elif type(gradient) is not Tensor and (is_partial(gradient) or sharded_dims(gradient) != counters.sharded_dims):
            self._note_gradient(counters, "its gradient is spread over the ranks in another way than its output")
        else:
            plain = gradient.detach() if gradient.requires_grad else gradient
            add_gradients(counters, gate_half(local_tensor(plain), glu_dim), axis, self._scratch)

    def _note_gradient(self, counters: SiteCounters, reason: str) -> None:
        name = next(key.name for (_, key), known in self._counters.items() if known is counters)
        self.not_measured.setdefault(name, reason)
