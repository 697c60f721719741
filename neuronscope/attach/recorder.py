"""Find the site and the neurons of an activation tensor, and update the counters of the site.

The hooks and the function mode pass the tensors in: see :mod:`neuronscope.attach.hooks`. ``torch.compile`` can trace
this. What a call leads to is found while it traces, and is a constant of the graph: the counters, and where the neurons
of the tensor lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from neuronscope.attach.activations import Activation
from neuronscope.attach.compiling import (
    TracedEnd,
    comptime,
    has_real_tensors,
    in_backward,
    is_tracing,
    trace_attempt,
    while_tracing,
)
from neuronscope.attach.dtensor import NeuronShard, is_distributed, is_partial, local_tensor, neuron_shard, sharded_dims
from neuronscope.attach.examples import ExampleCounter
from neuronscope.attach.forward import INFERENCE, ForwardContext
from neuronscope.attach.gradient_hooks import CountedGradient, GradientHook, RecomputedGradient, register
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.masks import PositionMask
from neuronscope.attach.origins import CONSTANT, ENDED, LOST, RAW, ROWS, UNITS, WEIGHT, Origin
from neuronscope.attach.units import Units, slice_dim
from neuronscope.attach.unsupported import (
    BATCHED_GRADIENT,
    IN_TRANSFORM,
    describe_input,
    holds_no_data,
    in_transform,
    unsupported_reason,
)
from neuronscope.count.counters import (
    SiteCounters,
    add_gradients,
    add_outputs,
    gate_half,
    leave_out,
    once_a_forward,
    register_gradient_hook,
)
from neuronscope.count.counting import ScratchBuffers
from neuronscope.count.neuron_layout import NeuronLayout, assumed_layout, neurons_first
from neuronscope.count.positions import blank_positions, keep_positions
from neuronscope.sites import SiteInfo, SiteKey

__all__ = ["Call", "CountersFactory", "DeclaredAxis", "SiteRecorder"]

#: All names of a site that a pattern may match: its own, its layer's path, and the place of the activation.
Names = tuple[str, str, str]
#: Returns the counters for a site, or ``None`` if it is not wanted: (phase, key, info, names, neurons, device).
CountersFactory = Callable[[str, SiteKey, SiteInfo, Names, int, torch.device], "SiteCounters | None"]
#: Returns the declared axis of a site by its three names, or ``None``.
DeclaredAxis = Callable[[str, str, str], "int | None"]

_MOST_CALLS = 20_000


class Call(NamedTuple):
    """One call of a site that has begun and not ended.

    Attributes:
        key: The site.
        counters: The counters of the site; ``None`` if the site is not wanted.
        layout: Where the neurons of its output lie.
        hook: Counts the gradient of the input; ``None`` if nothing is counted.
        after: What the output is.
        activation: The activation that is applied.
        info: What is known of the site.
        gate: The site of the gate, if the call is a gated product.
    """

    key: SiteKey
    counters: SiteCounters | None
    layout: NeuronLayout
    hook: CountedGradient | None
    after: Origin
    activation: Activation
    info: SiteInfo
    gate: SiteKey | None = None


class SiteRecorder:
    """Records the calls of all sites of a model.

    Args:
        names: The layers of the model's weights.
        examples: Counts the examples that a forward is given.
        masks: Finds the mask of positions that a forward is given.
        new_counters: Returns the counters of a site; called once for each site and phase.
        declared_axis: Returns the declared axis of a site by its names.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
        fail: Called with an error of our own code in a backward pass.

    Attributes:
        phase: The phase that is counted. In ``train``, what runs without gradients is counted as ``inference``.
        step: The optimizer step that is counted.
        step_tensor: The same as a tensor, for compiled graphs: int64, without dimensions.
        compiled: Whether ``torch.compile`` traced any part of the model.
        trace_error: An error of our own while ``torch.compile`` traced, if there was one.
        forward: The forward that is running.
        not_measured: Maps a site to the reason why it, or a part of its calls, is not measured.
        not_neurons: Maps the place of an activation to the reason why what it is applied to are no neurons.
        own_code: File and name of the model's own forward.
        is_tensor_parallel: Returns whether ranks share the neurons of the model's layers.
    """

    def __init__(
        self,
        *,
        names: LayerNames,
        examples: ExampleCounter,
        masks: PositionMask,
        new_counters: CountersFactory,
        declared_axis: DeclaredAxis,
        tolerance: float,
        fail: Callable[[Exception], None],
    ) -> None:
        self.phase = ""
        self.compiled = False
        self.trace_error: Exception | None = None
        self.step = 0
        with torch.inference_mode(False):
            self.step_tensor = torch.zeros((), dtype=torch.int64, device="cpu")
        self.forward = ForwardContext(names, examples, masks)
        self.not_measured: dict[str, str] = {}
        self.not_neurons: dict[str, str] = {}
        self._ran: set[tuple[str, str]] = set()  # phases, and paths of the activation modules that ran in them
        self.fail = fail
        self.own_code = "", ""
        self.is_tensor_parallel: Callable[[], bool] = lambda: False
        self._tolerance = tolerance
        self._scratch = ScratchBuffers()
        self._counters: dict[tuple[str, SiteKey], SiteCounters | None] = {}
        self._new_counters = new_counters
        self._declared = declared_axis
        self._calls: dict[tuple[Any, ...], Call] = {}  # by the facts that they follow from
        self._gates: dict[SiteKey, Call] = {}
        self._unclear: dict[str, tuple[str, tuple[str, ...]]] = {}  # functions without known neurons: reason, layers
        self._modules: set[SiteKey] = set()  # sites whose activation is a module
        self._transformed: set[str] = set()  # layers whose activations ran inside a function transform
        self._leaf_handles: list[RemovableHandle] = []
        self._maybe_missed: dict[SiteKey, int] = {}  # positions of the sites that may have been compiled without hooks
        #: Calls in graphs, whether each adds to the examples, and whether its graph is of a part of the model.
        self._traced: list[tuple[Call, bool, bool]] = []

        # torch.compile runs these while it traces.
        self._find_while_tracing = while_tracing(
            self._find_traced, "phase", "path", "function", "activation", "x", "glu_dim", "inputs", listener=self
        )
        self._end_while_tracing = while_tracing(self._end_traced, "call", "y")
        self._unreadable_while_tracing = while_tracing(self._unreadable_traced, "call")
        self._product_while_tracing = while_tracing(self._product_traced, "phase", "args", "y")
        self._carry_while_tracing = while_tracing(self._carry, "x", "y")
        found: list[int | None] = []
        self._found = found

        def last_found() -> int | None:
            return found.pop() if found else None

        def counters_of(call: int) -> SiteCounters | None:
            return self._traced[call][0].counters

        def layout_of(call: int) -> tuple[Any, ...]:
            return tuple(self._traced[call][0].layout)

        def adds_examples(call: int) -> bool:
            return self._traced[call][1]

        def is_in_part(call: int) -> bool:
            return self._traced[call][2]

        self._last_found = torch.compiler.assume_constant_result(last_found)
        self._counters_of = torch.compiler.assume_constant_result(counters_of)
        self._layout_of = torch.compiler.assume_constant_result(layout_of)
        self._adds_examples = torch.compiler.assume_constant_result(adds_examples)
        self._is_in_part = torch.compiler.assume_constant_result(is_in_part)

    def all_not_measured(self) -> dict[str, str]:
        """Return all sites, layers and modules that are not measured so far, each with the reason."""
        not_measured = dict(self.not_measured)
        flow = self.forward.flow
        for place, (reason, layers) in self._unclear.items():
            if not layers or not all(flow.gives_outputs(layer) for layer in layers):
                not_measured.setdefault(place, reason)
        measured = {layer for _, key in self._counters for layer in key.layer.split("+")}
        for layer, function in flow.bent.items():
            if layer in self._transformed:
                continue
            if measured.intersection(layer.split("+")):
                if function == "mul":
                    not_measured.setdefault(
                        layer,
                        "another layer read its product with a function of itself, which is an activation that is "
                        "written out: only the function is measured, and not the product. Register what it is part "
                        "of: `activations={...}`",
                    )
            else:
                not_measured.setdefault(
                    layer,
                    f"`{function}` was applied to it, which is not known as an activation, and then another layer read "
                    "it. Register what it is part of: `activations={...}`",
                )
        if self.forward.ran_parts and not self.forward.ran_root:
            not_measured["(root)"] = (
                "parts of the model were called, but never its forward: functional activations between them are not "
                "seen. Call the model itself, or `scope.open_step()` before each step and `scope.close_step()` after it"
            )
        return not_measured

    def ran(self, phase: str) -> set[str]:
        """Return the paths of the activation modules that ran in a phase."""
        return {path for name, path in self._ran if name == phase}

    def current_info(self, key: SiteKey, info: SiteInfo) -> SiteInfo:
        """Return what is known of a site by now: whether it gives outputs, and which layers read and feed it.

        Args:
            key: The site.
            info: What was known when it first ran.
        """
        flow = self.forward.flow
        output = bool(info.layer) and key not in self._modules and flow.gives_outputs(info.layer)
        readers, notes = tuple(flow.readers.get(key, ())), tuple(flow.reader_notes.get(key, ()))
        normalises = flow.normalised.get(info.layer)
        return replace(
            info,
            output=output,
            readers=readers,
            reader_notes=notes,
            is_norm=normalises is not None,
            normalises=normalises or "",
        )

    def _note_transformed(self, place: str, x: Tensor) -> None:
        """Note that an activation ran inside a function transform."""
        self.not_measured.setdefault(place, IN_TRANSFORM)
        units = self.forward.flow.origin(x).units
        if units is not None:
            self._transformed.add(units.layer)

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
        return INFERENCE if self.forward.training and self.forward.inference else self.phase

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

    def begin(self, path: str, function: str, activation: Activation, x: Any, glu_dim: int | None) -> Any:
        """Begin a call of a site: find its neurons, and register a hook for the gradient of its input.

        Args:
            path: Path of the activation module, or of the module that calls the activation function.
            function: Name of the function for an activation function, otherwise ``""``.
            activation: The activation that is applied.
            x: The pre-activation ``(…, N, …)``.
            glu_dim: The dimension along which ``x`` is split in two halves (GLU), otherwise ``None``.

        Returns:
            The call, for :meth:`end`, or its number while ``torch.compile`` traces; ``None`` if it is not counted.
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
        if is_tracing():
            return self._begin_in_graph(path, function, activation, x, glu_dim)
        transformed = in_transform(x)
        if recomputing:
            if not transformed:
                self._register_recomputed(x, path, function, activation.name, glu_dim)
            return None
        place = _place(path, function)
        phase = self.running_phase
        if not function:
            self._ran.add((phase, path))
        if transformed:
            self._note_transformed(place, x)
            return None
        call = self._find(phase, place, not function, activation, x, glu_dim)
        if not torch.is_grad_enabled() and forward.may_be_recomputed:
            forward.recomputation.add((path, function), call)
        if call is not None and call.hook is not None and x.requires_grad and torch.is_grad_enabled():
            self._hook(x, call.hook if forward.mask is None else call.hook.with_mask(forward.mask))
        return call

    def _begin_in_graph(  # `comptime` reads its arguments and variables
        self,
        path: str,  # noqa: ARG002
        function: str,  # noqa: ARG002
        activation: Activation,  # noqa: ARG002
        x: Tensor,
        glu_dim: int | None,
    ) -> Any:
        phase = self.running_phase  # noqa: F841
        inputs = self.forward.parts.inputs  # noqa: F841
        comptime(self._find_while_tracing)
        call = self._last_found()
        if call is None:
            return None
        counters = self._counters_of(call)
        if counters is not None and x.requires_grad and torch.is_grad_enabled():
            axis, dims = self._layout_of(call)
            register_gradient_hook(x, axis, dims, glu_dim, counters, self.forward.mask)
        return call

    def begin_graph(self, code: tuple[str, str]) -> None:
        """Note that a graph begins to be traced.

        Args:
            code: See :class:`~neuronscope.attach.compiling.GraphListener`.
        """
        self.compiled = True
        running = self.forward.module_stack  # by hooks that ran in eager code, and were not traced
        self.forward.parts.begin_graph(not running or (running[-1] == "" and code == self.own_code))

    def end_graph(self, end: TracedEnd | None) -> None:
        """Note that a graph was traced.

        Args:
            end: See :class:`~neuronscope.attach.compiling.GraphListener`.
        """
        self.forward.parts.end_graph(end)

    def _find_traced(
        self, phase: str, path: str, function: str, activation: Activation, x: Tensor, glu_dim: int | None, _: str
    ) -> None:
        """Find a call while ``torch.compile`` traces, and note its number."""
        if not function:
            self._ran.add((phase, path))
        place = _place(path, function)
        self._found.clear()
        if torch._C._functorch.maybe_current_level() is not None:
            self._note_transformed(place, x)
            return
        call = self._find(phase, place, not function, activation, x, glu_dim, traced=True)
        if call is not None:
            self._note_traced(call)

    def _note_traced(self, call: Call) -> None:
        counters = call.counters
        if counters is not None:
            counters.in_graph = True
        self._found.append(len(self._traced))
        part = self.forward.parts.tracing
        first = part or (counters is not None and counters.is_first_call(self.forward.number, trace_attempt()))
        self._traced.append((call, first, part))

    def _is_shared_in_graph(self, key: SiteKey) -> bool:
        """Whether ranks share the neurons of a traced site, after noting that it is not measured."""
        if not self.is_tensor_parallel():
            return False
        self.not_measured[key.name] = (
            "torch.compile traced it, and under tensor parallelism a traced graph does not say which of the layer's "
            "neurons are this rank's: watch the model without compiling it"
        )
        return True

    def _find(
        self,
        phase: str,
        place: str,
        is_module: bool,
        activation: Activation,
        x: Tensor,
        glu_dim: int | None,
        traced: bool = False,
    ) -> Call | None:
        """Return the call of a site, or ``None`` after noting why it is not counted.

        Args:
            phase: The phase that it belongs to.
            place: Where the activation is applied.
            is_module: Whether the activation is a module, and no function.
            activation: The activation.
            x: The pre-activation.
            glu_dim: As in :meth:`begin`.
            traced: Whether ``x`` is the fake tensor of a graph.
        """
        origin = self.forward.flow.origin(x)
        ordinal = self.forward.ordinal(origin, activation.name) if origin.units is not None else 0
        facts = None
        if type(x) is Tensor and not x.is_nested:  # tensors of other classes are examined each time
            facts = (origin, phase, x.shape, activation, ordinal, place, glu_dim, x.layout, holds_no_data(x))
            last = self._calls.get(facts)
            if last is not None:
                return last
        call = self._find_anew(phase, place, is_module, activation, x, glu_dim, origin, ordinal, traced)
        if call is not None and facts is not None:
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            self._calls[facts] = call
        return call

    def _find_anew(
        self,
        phase: str,
        place: str,
        is_module: bool,
        activation: Activation,
        x: Tensor,
        glu_dim: int | None,
        origin: Origin,
        ordinal: int,
        traced: bool,
    ) -> Call | None:
        units = origin.units if origin.units is not None and origin.units.layer else None
        key = (
            SiteKey(place, "", "", 0) if units is None else SiteKey(units.layer, units.text(), activation.name, ordinal)
        )
        if not traced and (reason := unsupported_reason(x)):
            self.not_measured.setdefault(key.name, reason)
            return None
        names = (key.name, key.layer, place)
        declared = self._declared(*names)
        if declared is not None:
            if not -x.dim() <= declared < x.dim():
                self.not_measured.setdefault(
                    key.name, f"axis {declared} was declared for it, and its tensor has {x.dim()} axes"
                )
                return None
            layout, source = NeuronLayout(declared % x.dim()), "declared"
            if units is not None and units.layout != layout:
                units = None
        elif units is not None:
            layout, source = units.layout, f"layer ({units.layer})"
        elif self._may_be_neurons(origin, place, is_module):
            layout, source = assumed_layout(x.dim()), "assumed (rank)"
        else:
            return None
        output_units = units
        if glu_dim is not None:
            glu_dim %= x.dim()
            output_units = None if units is None else slice_dim(units, glu_dim, 0, x.shape[glu_dim] // 2)
            if units is not None and output_units is None:
                self.not_measured.setdefault(key.name, "it splits units and positions that lie on one dimension")
                return None
            if output_units is not None and declared is None:
                layout = output_units.layout
        shard = self._shard(x, layout, units, key)
        if shard is None:
            return None
        neurons = _neurons_in(local_tensor(x).shape, layout)
        if glu_dim is not None and layout.dims is None and glu_dim == layout.axis:
            neurons, shard = neurons // 2, NeuronShard(shard.first // 2, shard.whole // 2)
        runs = () if output_units is None else output_units.tensor_runs()
        if runs and neurons < shard.whole and output_units is not None:  # the layer's, of which a rank has a part
            runs = ((units.layer, 0, shard.whole, 1),) if units is not None and output_units.size == units.width else ()
        if sum(len(range(*run[1:])) for run in runs) not in (neurons, shard.whole):
            runs = ()
        info = SiteInfo(
            activation.name,
            activation.kind,
            activation.linear_when_on,
            layout.axis,
            source,
            *shard,
            layer="" if units is None else units.layer,
            units=runs,
            place=place,
        )
        if is_module:
            self._modules.add(key)
        hidden = traced and self._is_shared_in_graph(key)
        counters = None if hidden else self._counters_for(phase, key, info, names, neurons, x)
        if counters is not None and not traced:
            counters.sharded_dims = sharded_dims(x)
        hook = None if counters is None else CountedGradient(self, (place, activation.name), glu_dim, counters, layout)
        after = (
            origin.but(site=key, units=output_units, bent="", carries=(key,))
            if output_units is not None
            else origin.but(site=key, units=None, state=LOST if origin.state == UNITS else origin.state)
        )
        call = Call(key, counters, layout, hook, after, activation, info)
        self._gates[key] = call
        return call

    def _may_be_neurons(self, origin: Origin, place: str, is_module: bool) -> bool:
        """Whether an activation of a tensor without known units is counted; if not, the reason is noted."""
        state = origin.state
        if state == ROWS:
            self.not_measured.setdefault(
                place,
                "its rows are units of several layers (experts), so that one index is a neuron of each of them; "
                "declare its axis to count those together",
            )
            return False
        if state == ENDED and origin.layer:
            self.not_measured.setdefault(
                origin.layer, f"data picked some of its units before the activation at {place}, so that they are mixed"
            )
            return False
        if state in (ENDED, WEIGHT):
            what = "parameters alone" if state == WEIGHT else "several units together"
            self.not_neurons.setdefault(place, f"its input was computed from {what}")
            return False
        if is_module:
            return True
        if state in (RAW, CONSTANT):
            self.not_neurons.setdefault(place, "no layer came before it")
            return False
        self._unclear.setdefault(
            place,
            (
                f"which dimension of its input holds neurons is not known: declare it, as in `axes={{{place!r}: 1}}`",
                self.forward.flow.last_layers(origin),
            ),
        )
        return False

    def _shard(self, x: Tensor, layout: NeuronLayout, units: Units | None, key: SiteKey) -> NeuronShard | None:
        """Return which neurons of the layer this rank holds; ``None`` after noting why that is not known."""
        if not is_distributed(x):
            found = self.forward.flow.shard(x, layout.axis, "" if units is None else units.layer)
            if found is None:
                self.not_measured.setdefault(key.name, "ranks share its layer, and it has a part of each rank's units")
            return found
        if layout.dims is not None:
            self.not_measured.setdefault(key.name, "ranks share it, and several dimensions hold its neurons")
            return None
        return neuron_shard(x, layout.axis)

    def end(self, call: Any, x: Any, y: Any) -> None:
        """End a call of a site: count its output.

        Args:
            call: What :meth:`begin` returned.
            x: The pre-activation ``(…, N, …)``.
            y: The output ``(…, N, …)``.
        """
        given = y  # `comptime` reads variables
        if isinstance(y, dict):
            y = [*y.values()]
        if isinstance(y, (tuple, list)) and len(y) > 0:
            y = y[0]  # a spiking neuron gives its spikes, and then its state
        if is_tracing():
            if isinstance(y, Tensor):
                comptime(self._end_while_tracing)
                self._count_in_graph(call, y)
            else:
                comptime(self._unreadable_while_tracing)
            return
        if not isinstance(y, Tensor) or y.dim() <= call.layout.axis:
            self._unreadable(call, given)
            return
        if call.counters is not None:
            neurons = _neurons_in(local_tensor(y).shape, call.layout)
            if neurons == call.counters.neurons and (not isinstance(x, Tensor) or sharded_dims(x) == sharded_dims(y)):
                self._count(call.counters, y, call.layout)
            else:
                self.not_measured.setdefault(
                    call.key.name,
                    f"its output has {neurons} neurons where {call.counters.neurons} were expected",
                )
        self._end(call, y)

    def _unreadable(self, call: Call, given: Any) -> None:
        """Note that what an activation gave cannot be counted, so that its gradients are not either."""
        what = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        what = "" if given is None else f" ({what})"
        self.not_measured.setdefault(call.key.name, f"its output{what} cannot be counted")
        if call.counters is not None:
            call.counters.unreadable = True

    def _unreadable_traced(self, call: int) -> None:
        self._unreadable(self._traced[call][0], None)

    def _end(self, call: Call, y: Tensor) -> None:
        units = call.after.units
        if units is None or len(units.dims) == y.dim():
            self.forward.flow.put(y, call.after)

    def _end_traced(self, call: int, y: Tensor) -> None:
        self._end(self._traced[call][0], y)

    def carry(self, x: Any, y: Any) -> None:
        """Note what an activation module returned whose call is not counted: what it was given.

        Args:
            x: Its input.
            y: Its output.
        """
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return
        if is_tracing():
            comptime(self._carry_while_tracing)
        else:
            self._carry(x, y)

    def _carry(self, x: Tensor, y: Tensor) -> None:
        origin = self.forward.flow.origin(x)
        if x.is_nested or y.is_nested or x.shape != y.shape:
            origin = origin.without_units(LOST)
        self.forward.flow.put(y, origin.but(site=None, carries=()))

    def product(self, args: tuple[Any, ...], y: Any) -> None:
        """Count a product as gated if one factor is the output of a site and the other has other units.

        Args:
            args: The two factors.
            y: The product.
        """
        if len(args) != 2 or not isinstance(y, Tensor):
            return
        phase = self.running_phase
        if not is_tracing():
            call = self._find_product(phase, args, y)
            if call is not None and call.counters is not None:
                self._count(call.counters, y, call.layout)
            return
        comptime(self._product_while_tracing)
        number = self._last_found()
        if number is not None:
            self._count_in_graph(number, y)

    def _product_traced(self, phase: str, args: tuple[Any, ...], y: Tensor) -> None:
        self._found.clear()
        call = self._find_product(phase, args, y, traced=True)
        if call is not None:
            self._note_traced(call)

    def _find_product(self, phase: str, args: tuple[Any, ...], y: Tensor, traced: bool = False) -> Call | None:
        flow = self.forward.flow
        for factor, other in (args, args[::-1]):
            if not isinstance(factor, Tensor) or not isinstance(other, Tensor) or other is factor:
                continue
            origin = flow.overwritten if factor is y and flow.overwritten is not None else flow.origin(factor)
            gate = None if origin.site is None else self._gates.get(origin.site)
            if gate is None or factor.shape != y.shape or other.shape != y.shape:
                continue
            if origin.units is None:
                if gate.info.axis_source == "declared":
                    return self._gated(phase, gate, origin, None, y, traced)
                continue
            if gate.after.units is None or origin.units.size != gate.after.units.size:
                continue  # a part of what the site gave: its gradients are not counted apart
            beside = flow.overwritten if other is y and flow.overwritten is not None else flow.origin(other)
            if beside.state in (WEIGHT, CONSTANT) or (beside.unit_set and beside.unit_set == origin.unit_set):
                continue  # x · sigmoid(x) is an activation written out, and no gated product
            return self._gated(phase, gate, origin, origin.units, y, traced)
        return None

    def _gated(
        self, phase: str, gate: Call, origin: Origin, units: Units | None, y: Tensor, traced: bool
    ) -> Call | None:
        name = gate.activation.gated_name or f"gated {gate.activation.name}"
        if units is None:  # its axis was declared
            key = SiteKey(gate.key.layer, gate.key.units, name, 0)
        else:
            key = SiteKey(gate.key.layer, units.text(), name, self.forward.ordinal(origin, name))
        if not traced and in_transform(y):
            self.not_measured.setdefault(key.name, IN_TRANSFORM)
            return None
        layout = gate.layout if units is None else units.layout
        # Where ranks share a layer, the gate's units are the whole layer's.
        shared = units is None or gate.info.whole > units.size == units.width
        info = replace(
            gate.info,
            activation=name,
            kind="gated",
            linear_when_on=False,
            axis=layout.axis,
            units=gate.info.units if units is None or shared or not gate.info.units else units.tensor_runs(),
        )
        names = (key.name, key.layer, info.place)
        neurons = _neurons_in(local_tensor(y).shape, layout)
        hidden = traced and self._is_shared_in_graph(key)
        counters = None if hidden else self._counters_for(phase, key, info, names, neurons, y)
        if counters is not None:
            counters.gate = self._counters.get((phase, gate.key))
        before = self.forward.flow.origin(y)
        if units is None:
            return Call(key, counters, layout, None, before, gate.activation, info, gate.key)
        after = before.but(state=UNITS, units=units, layer="", bent="", site=key, carries=(key, *before.carries))
        self.forward.flow.put(y, after)
        return Call(key, counters, layout, None, after, gate.activation, info, gate.key)

    def _count(self, counters: SiteCounters, y: Tensor, layout: NeuronLayout) -> None:
        plain, axis = local_tensor(y.detach()), layout.axis
        left_out = None
        if layout.dims is not None or self.forward.mask is not None:
            plain, axis, left_out = _arranged(plain, layout, self.forward.mask)
            if not plain.numel():
                return
        examples = counters.new_examples(self.forward.number, self.forward.examples, plain.numel() // counters.neurons)
        if counters.in_graph and self.forward.parts.exist:  # a graph may have counted some of this forward
            new = once_a_forward(examples, self.forward.number_tensor, counters.last_forward)
            counters.tensors.traced[1].add_(new)
            examples = 0
        add_outputs(counters, plain, axis, examples, self.step, self._scratch, self._tolerance)
        if left_out is not None:
            leave_out(counters, left_out)

    def _count_in_graph(self, call: int, y: Tensor) -> None:
        counters = self._counters_of(call)
        if counters is None:
            return
        axis, dims = self._layout_of(call)
        plain, axis = neurons_first(y.detach(), axis, dims)
        left_out = None
        if dims is None:
            plain, left_out = blank_positions(plain, axis, self.forward.mask)
        examples: int | Tensor = 0
        if self._adds_examples(call):
            positions = plain.numel() // plain.shape[axis]
            examples = min(positions, self.forward.examples)
            if self._is_in_part(call):
                examples = once_a_forward(examples, self.forward.number_tensor, counters.last_forward)
        add_outputs(counters, plain, axis, examples, self.step_tensor, self._scratch, self._tolerance)
        if left_out is not None:
            leave_out(counters, left_out)

    def _counters_for(
        self, phase: str, key: SiteKey, info: SiteInfo, names: Names, neurons: int, x: Tensor
    ) -> SiteCounters | None:
        """Return the counters of a site in a phase, and make them on first use.

        Args:
            phase: The phase.
            key: The site.
            info: What is known of the site.
            names: Its names, for patterns.
            neurons: Number of its neurons.
            x: A tensor on its device.

        Returns:
            The counters; ``None`` if the site is not wanted, or if its number of neurons has changed.
        """
        if (phase, key) not in self._counters:
            self._counters[phase, key] = self._new_counters(phase, key, info, names, neurons, x.device)
        known = self._counters[phase, key]
        if known is not None and known.neurons != neurons:
            self.not_measured.setdefault(
                key.name, f"its neurons changed from {known.neurons} to {neurons}; only the first count"
            )
            return None
        return known

    def _register_recomputed(self, x: Tensor, path: str, function: str, activation: str, glu_dim: int | None) -> None:
        """Register a gradient hook for a recomputed call: activation checkpointing runs a site again in backward.

        Its output was counted before. Its gradient may arrive only now.
        """
        place = (path, function)
        if (
            not x.requires_grad
            or not torch.is_grad_enabled()
            or self._is_registered(x, (_place(path, function), activation))
        ):
            return
        recomputation = self.forward.recomputation
        number = recomputation.next_number(place)

        def site() -> tuple[SiteCounters | None, NeuronLayout]:
            call = recomputation.forward_call(place, number)
            return (None, NeuronLayout(0)) if call is None else (call.counters, call.layout)

        self._hook(x, RecomputedGradient(self, (_place(path, function), activation), glu_dim, site))

    def _is_registered(self, x: Tensor, place: tuple[str, str]) -> bool:
        """Whether the tensor has a hook of this site: non-reentrant checkpointing runs the site on it again."""
        hooks = (x._backward_hooks or {}).values()
        return any(isinstance(hook, GradientHook) and (hook.recorder, hook.place) == (self, place) for hook in hooks)

    def _hook(self, x: Tensor, hook: GradientHook) -> None:
        handle = register(x, hook)
        if handle is not None and x.is_leaf:
            self._leaf_handles.append(handle)  # a leaf outlives the step, and its hook must not

    def gradient(
        self,
        gradient: Tensor,
        counters: SiteCounters,
        layout: NeuronLayout,
        glu_dim: int | None,
        mask: Tensor | None = None,
    ) -> None:
        """Count a gradient at a pre-activation.

        Args:
            gradient: Gradient ``(…, N, …)``.
            counters: The counters of the site.
            layout: Where the neurons lie.
            glu_dim: The dimension along which the input is split in two halves (GLU), otherwise ``None``.
            mask: Which positions are counted, bool ``(B, T)``; ``None`` = all.
        """
        if in_transform(gradient):
            self._note_gradient(counters, BATCHED_GRADIENT)
        elif type(gradient) is not Tensor and (is_partial(gradient) or sharded_dims(gradient) != counters.sharded_dims):
            self._note_gradient(counters, "its gradient is spread over the ranks in another way than its output")
        else:
            plain = gradient.detach() if gradient.requires_grad else gradient
            found, axis = gate_half(local_tensor(plain), glu_dim), layout.axis
            left_out = None
            if layout.dims is not None or mask is not None:
                found, axis, left_out = _arranged(found, layout, mask)
                if not found.numel():
                    return
            add_gradients(counters, found, axis, self._scratch)
            if left_out is not None:
                leave_out(counters, left_out, gradients=True)

    def _note_gradient(self, counters: SiteCounters, reason: str) -> None:
        name = next(key.name for (_, key), known in self._counters.items() if known is counters)
        self.not_measured.setdefault(name, reason)


def _place(path: str, function: str) -> str:
    """Return the place of an activation: the path of its module, or the function in the module that calls it."""
    if not function:
        return path or "(root)"
    return f"{path}.{function}()" if path else f"{function}()"


def _arranged(tensor: Tensor, layout: NeuronLayout, mask: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
    """Return what to count of a tensor, its neuron axis, and how many positions to take off again.

    Args:
        tensor: Output or gradient ``(…, N, …)``.
        layout: Where its neurons lie. A mask applies only if one dimension indexes them.
        mask: Which positions are counted, bool ``(B, T)``; ``None`` = all.
    """
    if layout.dims is not None:
        return *neurons_first(tensor, *layout), None
    if tensor.device.type == "cpu":
        return *keep_positions(tensor, layout.axis, mask), None
    blank, left_out = blank_positions(tensor, layout.axis, mask)
    return blank, layout.axis, left_out


def _neurons_in(shape: Sequence[int], layout: NeuronLayout) -> int:
    """Return the number of neurons of a tensor.

    Args:
        shape: Its shape.
        layout: Where its neurons lie.
    """
    if layout.dims is None:
        return shape[layout.axis]
    return math.prod(size for dim in layout.dims for size, stride in dim if stride)
