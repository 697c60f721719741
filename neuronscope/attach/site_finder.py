"""Find the site of an activation: the layer whose units it is given, where they lie, and the counters for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuronscope.attach.activations import ROWS, Activation
from neuronscope.attach.dtensor import NeuronShard, is_distributed, local_tensor, neuron_shard, sharded_dims
from neuronscope.attach.forward import ForwardContext
from neuronscope.attach.gradient_hooks import CountedGradient, Counters, Gradients
from neuronscope.attach.hand_split import HandSplit
from neuronscope.attach.incoming import Incoming
from neuronscope.attach.origins import ACTIVATED, CONSTANT, LOST, UNITS, WEIGHT, Operand, Origin
from neuronscope.attach.plain_sizes import plain_shape
from neuronscope.attach.readers import carry_site
from neuronscope.attach.row_owners import Owners
from neuronscope.attach.selections import Selected, Selections
from neuronscope.attach.units import Run, Units, slice_dim
from neuronscope.attach.unmeasured import Unmeasured, place_of
from neuronscope.attach.unsupported import CAPTURED, IN_TRANSFORM, in_transform, unsupported_reason
from neuronscope.count.captured_graphs import is_capturing
from neuronscope.count.counters import SiteCounters
from neuronscope.count.expert_counters import ExpertCounters, JoinedCounters
from neuronscope.count.neuron_layout import NeuronLayout, assumed_layout
from neuronscope.sites import NAMED_TENSOR, ReaderColumns, SiteInfo, SiteKey

__all__ = ["Call", "CountersFactory", "DeclaredAxis", "Names", "SiteFinder", "neurons_in"]

#: All names of a site that a pattern may match: its own, its layer's path, and the place of the activation.
Names = tuple[str, str, str]
#: Returns the counters for a site, or ``None`` if it is not wanted: (phase, key, info, names, neurons, device).
CountersFactory = Callable[[str, SiteKey, SiteInfo, Names, int, torch.device], "SiteCounters | None"]
#: Returns the declared axis of a site by its three names, or ``None``.
DeclaredAxis = Callable[[str, str, str], "int | None"]

_MOST_CALLS = 20_000
#: Stands for the activation of a tensor that the user names.
_NAMED = Activation("tensor", "sparse")
_SILU = next(row.activation for row in ROWS if row.activation.name == "silu")
#: Functions that may come before a SiLU that is written out.
_CLAMPS = {"clamp", "clamp_", "clip", "clip_", "clamp_max", "clamp_max_", "minimum"}
_UNSEEN: Any = object()


@dataclass(slots=True)
class Call:
    """One call of a site that has begun and not ended. Calls are equal that are counted alike.

    Attributes:
        key: The site.
        counters: The counters of the site; ``None`` if the site is not wanted.
        layout: Where the neurons of its output lie.
        hook: Counts the gradient of the input; ``None`` if nothing is counted.
        after: What the output is.
        activation: The activation that is applied.
        info: What is known of the site.
        gate: The site of the gate, if the call is a gated product.
        shape: The shape of an output that needs no further examination, because the input has it; or ``None``.
        owners: Which expert each row is of, if the layer is one of experts and anything is counted.
    """

    key: SiteKey
    counters: Counters | None
    layout: NeuronLayout
    hook: CountedGradient | None = field(compare=False)
    after: Origin = field(compare=False)
    activation: Activation = field(compare=False)
    info: SiteInfo = field(compare=False)
    gate: SiteKey | None = field(default=None, compare=False)
    shape: torch.Size | None = field(default=None, compare=False)
    owners: Owners | None = field(default=None, compare=False)


class _Applied(NamedTuple):
    """An activation that is applied to something.

    Attributes:
        activation: The activation.
        glu_dim: The dimension along which its input is split in two halves (GLU), otherwise ``None``.
        place: Where it is applied.
        ordinal: Its number among those of its name that are applied to the same units.
    """

    activation: Activation
    glu_dim: int | None
    place: str
    ordinal: int


class SiteFinder:
    """Finds the sites of a model, and remembers what the calls of each lead to.

    Args:
        forward: The forward that is running.
        gradients: Receives the gradients at the sites.
        new_counters: Returns the counters of a site; called once for each site and phase.
        declared_axis: Returns the declared axis of a site by its names.

    Attributes:
        unmeasured: What is not measured.
        is_tensor_parallel: Returns whether ranks share the neurons of the model's layers.
        split: The layers that ranks share by hand.
        paths: Returns the paths of the model's modules.
    """

    def __init__(
        self,
        forward: ForwardContext,
        gradients: Gradients,
        new_counters: CountersFactory,
        declared_axis: DeclaredAxis,
    ) -> None:
        self.unmeasured = Unmeasured(forward.flow)
        self.is_tensor_parallel: Callable[[], bool] = lambda: False
        self.split = HandSplit(None)
        self.paths: Callable[[], Collection[str]] = tuple
        self._forward = forward
        self._gradients = gradients
        self._new_counters = new_counters
        self._declared = declared_axis
        self._counters: dict[tuple[str, SiteKey], SiteCounters | None] = {}
        self._calls: dict[tuple[Any, ...], Call | None] = {}  # by the facts that they follow from
        self._gates: dict[SiteKey, Call] = {}
        self._units: dict[SiteKey, tuple[Run, ...]] = {}  # which units the neurons of each site are
        self._other_halves: dict[SiteKey, tuple[Run, ...]] = {}  # of a GLU: the units of its gate
        self.selections = Selections(self, forward, self._gates.get)
        self._sparse: set[SiteKey] = set()  # sites of kind `sparse`
        self._named: set[SiteKey] = set()  # tensors that the user names
        self._experts: dict[tuple[str, SiteKey], ExpertCounters] = {}  # of layers whose rows are of several experts
        self._common: dict[SiteKey, SiteKey] = {}  # of each expert's site: the key of all experts together
        self._stacked: dict[str, bool] = {}  # whether a layer is a matrix of a stack, by its path
        self._modules: set[SiteKey] = set()  # sites whose activation is a module
        self._maybe_missed: dict[SiteKey, int] = {}  # positions of the sites that may have been compiled without hooks

    def all_counters(self) -> list[SiteCounters]:
        """Return the counters of all sites and phases that are wanted."""
        return [counters for counters in list(self._counters.values()) if counters is not None]

    def name_of(self, counters: Counters) -> str:
        """Return the name of the site of these counters; of those of several experts, that of the first."""
        own = counters.wanted[0] if isinstance(counters, JoinedCounters) else counters
        return next(key.name for (_, key), known in list(self._counters.items()) if known is own)

    def forget_phase(self, phase: str) -> set[SiteKey]:
        """Forget the counters of a phase; return the sites. A compiled graph holds those of others.

        Args:
            phase: Name of the phase.
        """
        known = [(key, counters) for (name, key), counters in self._counters.items() if name == phase]
        gone = {key for key, counters in known if counters is not None and not counters.in_graph}
        for key in gone:
            del self._counters[phase, key]
        self._experts = {
            place: counters for place, counters in self._experts.items() if place[0] != phase or counters.in_graph
        }
        self._calls = {facts: call for facts, call in self._calls.items() if facts[1] != phase}
        return gone

    def all_not_measured(self, *, compiled: bool) -> dict[str, str]:
        """Return all sites, layers and modules that are not measured so far, each with the reason.

        Args:
            compiled: Whether ``torch.compile`` traced any part of the model.
        """
        forward = self._forward
        keys = [*(key for _, key in list(self._counters)), *self._common.values()]
        measured = {name for key in keys for name in key.layer.split("+")}
        measured |= {layer for key in list(self._named) for layer, *_ in self._units.get(key, ())}
        all_seen = not (compiled or forward.ran_parts)
        not_measured = self.unmeasured.with_layers(measured, all_seen=all_seen)
        if forward.ran_alone and not forward.ran_root:
            not_measured["(root)"] = (
                "activations of the model were called outside of its forward and of all its parts: their examples are "
                "not counted, and where the layer before one was not seen, its axis is assumed. Call the model itself, "
                "or `scope.open_step(batch)` before each step and `scope.close_step()` after it"
            )
        elif forward.ran_parts and not forward.ran_root and (unseen := forward.flow.unseen_layers()):
            more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
            not_measured["(root)"] = (
                "parts of the model were called, and never its forward: its layers that were called outside of a part "
                f"were not seen (`{unseen[0]}`{more} was not seen to run), nor are functions between parts. Call the "
                "model itself, or `scope.open_step()` before each step and `scope.close_step()` after it"
            )
        return not_measured

    def current_info(self, key: SiteKey, info: SiteInfo) -> SiteInfo:
        """Return what is known of a site by now: whether it gives outputs, and which layers read and feed it.

        Args:
            key: The site.
            info: What was known when it first ran.
        """
        flow = self._forward.flow
        if key in self._common:
            return self._expert_info(key, info)
        output = bool(info.layer) and key not in self._modules and flow.is_output(key, info.layer)
        found, notes = flow.readers.get(key, {}), tuple(flow.reader_notes.get(key, ()))
        readers = tuple(dict.fromkeys(each if isinstance(each, str) else each.layer for each in found))
        normalises = flow.normalised.get(info.layer)
        incoming = Incoming(flow, key, self._runs_of)
        notes += tuple(
            f"read by `{layer}`, which {reason}" for layer in readers if (reason := flow.applied_elsewhere(layer))
        )
        if self.split.holds(info.layer):
            incoming.notes["ranks share its layer by hand"] = None
        return replace(
            info,
            output=output,
            readers=readers,
            reader_columns=tuple(each for each in found if not isinstance(each, str)),
            reader_notes=notes,
            incoming=tuple(incoming.rows),
            incoming_notes=tuple(incoming.notes),
            is_norm=normalises is not None,
            normalises=normalises or "",
        )

    def _expert_info(self, key: SiteKey, info: SiteInfo) -> SiteInfo:
        """Return what is known of the site of an expert whose rows lie in one tensor with those of others."""
        flow, common = self._forward.flow, self._common[key]
        found = flow.readers.get(common, {})
        return replace(
            info,
            output=common not in self._modules and flow.gives_outputs(common.layer),
            readers=tuple(dict.fromkeys(each if isinstance(each, str) else each.layer for each in found)),
            reader_notes=(*flow.reader_notes.get(common, ()), "its rows lie in one tensor with those of other experts"),
            incoming_notes=("data picks its weights from those of all experts",),
        )

    def layer_readers(self, layer: str) -> tuple[tuple[ReaderColumns, ...], tuple[str, ...]]:
        """Return which columns read the units of a layer before any activation, and how else they are read.

        Args:
            layer: Path of the layer.
        """
        flow = self._forward.flow
        found = flow.readers.get(layer, {})
        notes = [*flow.reader_notes.get(layer, ()), *(f"read by `{each}`" for each in found if isinstance(each, str))]
        reasons = (flow.applied_elsewhere(each.layer) for each in found if not isinstance(each, str))
        return tuple(each for each in found if not isinstance(each, str)), (*notes, *filter(None, reasons))

    def _runs_of(self, key: SiteKey) -> tuple[Sequence[Run], Sequence[Run]]:
        """Return the units that the neurons of a site are, and those of the other half of a GLU."""
        return self._units.get(key, ()), self._other_halves.get(key, ())

    def find(
        self,
        phase: str,
        path: str,
        function: str,
        activation: Activation,
        x: Tensor,
        glu_dim: int | None,
        traced: bool = False,
    ) -> Call | None:
        """Return the call of a site, or ``None`` after noting why it is not counted.

        Args:
            phase: The phase that it belongs to.
            path: As in :meth:`neuronscope.attach.recorder.SiteRecorder.begin`, and so are the others.
            function: Name of a function, or ``""``.
            activation: The activation.
            x: The pre-activation.
            glu_dim: A dimension, or ``None``.
            traced: Whether ``x`` is the fake tensor of a graph.
        """
        forward, facts = self._forward, None
        origin = forward.flow.origin(x)
        ordinal = forward.ordinals.number(origin, activation.name) if origin.units is not None else 0
        if type(x) is Tensor and not x.is_nested:  # tensors of other classes are examined each time
            kept = id(activation)  # the registry keeps it
            facts = (origin, phase, x.shape, kept, ordinal, path, function, glu_dim, x.layout, x.is_meta, False)
            found: Call | None = self._calls.get(facts, _UNSEEN)
            if found is _UNSEEN and not traced and is_capturing(x):  # not seen before the capture
                facts = (*facts[:-1], True)
                found = self._calls.get(facts, _UNSEEN)
            if found is not _UNSEEN:
                units = origin.units
                if found is None or units is None or units.experts is None:
                    return found
                return self.with_owners(found, units)
        applied = _Applied(activation, glu_dim, place_of(path, function), ordinal)
        if not function:
            self.unmeasured.note_ran(path, phase)
        call = self._find_anew(phase, applied, x, origin, is_module=not function, traced=traced)
        known = None if call is None or not call.info.units else call.key
        forward.flow.note_activation(origin, known, activation.name)
        if facts is not None:
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            self._calls[facts] = call
        return call if call is None or origin.units is None else self.with_owners(call, origin.units)

    def with_owners(self, call: Call, units: Units) -> Call:
        """Return a call with what says in this forward which experts the rows are of, if the layer is one of experts.

        If it is not known, no expert's positions are known from then on: their sites are listed, and not reported.

        Args:
            call: The call.
            units: The units of the pre-activation, or of the product.
        """
        if not isinstance(call.counters, JoinedCounters):
            return call
        owners = self._forward.flow.expert_rows.owners(units)
        if owners is not None and (not isinstance(owners, Tensor) or plain_shape(owners) == (units.rows,)):
            return replace(call, owners=owners)
        self.unmeasured.note(
            call.key.name,
            "the tensor that says which expert each row is of was not seen, or was changed in place before the "
            "activation ran, or does not belong to the compiled graph that the activation belongs to",
        )
        call.counters.leave_out_call()
        return replace(call, counters=None, hook=None)

    def _find_anew(
        self, phase: str, applied: _Applied, x: Tensor, origin: Origin, *, is_module: bool, traced: bool
    ) -> Call | None:
        activation, glu_dim, place, ordinal = applied
        units = origin.units if origin.units is not None and origin.units.layer else None
        key = (
            SiteKey(place, "", "", 0) if units is None else SiteKey(units.layer, units.text(), activation.name, ordinal)
        )
        if not traced and (reason := unsupported_reason(x)):
            self.unmeasured.note(key.name, reason)
            return None
        names = (key.name, key.layer, place)
        declared = self._declared(*names)
        if declared is not None and units is not None and units.experts is not None:
            units, key = None, SiteKey(place, "", "", 0)  # all experts are counted together
            names = (key.name, key.layer, place)
        if declared is not None:
            if not -x.dim() <= declared < x.dim():
                reason = f"axis {declared} was declared for it, and its tensor has {x.dim()} axes: declare one of these"
                self.unmeasured.note(key.name, reason)
                return None
            layout, source = NeuronLayout(declared % x.dim()), "declared"
            if units is not None and units.layout != layout:
                units = None
        elif units is not None:
            layout, source = units.layout, f"layer ({units.layer})"
        elif self.unmeasured.may_be_neurons(origin, place, "" if is_module else activation.name):
            layout, source = assumed_layout(x.dim()), "assumed (rank)"
        else:
            return None
        output_units = units
        if glu_dim is not None:
            glu_dim %= x.dim()
            output_units = None if units is None else slice_dim(units, glu_dim, 0, x.shape[glu_dim] // 2)
            if units is not None and output_units is None:
                self.unmeasured.note(
                    key.name, "it splits units and positions that lie on one dimension: declare its axis, `axes={...}`"
                )
                return None
            if output_units is not None and declared is None:
                layout = output_units.layout
            half = None if units is None else slice_dim(units, glu_dim, x.shape[glu_dim] // 2, x.shape[glu_dim] // 2)
            self._other_halves[key] = () if half is None or half == output_units else half.tensor_runs()
        shard = self._shard(x, layout, units, key)
        if shard is None:
            return None
        neurons = neurons_in(local_tensor(x).shape, layout)
        if glu_dim is not None and layout.dims is None and glu_dim == layout.axis:
            neurons, shard = neurons // 2, NeuronShard(shard.first // 2, shard.whole // 2)
        sparse = origin.site is not None and origin.site in self._sparse
        kind = "sparse" if sparse or activation.kind == "sparse" else activation.kind
        if kind == "sparse":
            self._sparse.add(key)
        info = SiteInfo(
            activation=activation.name,
            kind=kind,
            linear_when_on=activation.linear_when_on,
            axis=layout.axis,
            axis_source=source,
            first=shard.first,
            whole=shard.whole,
            layer="" if units is None else units.layer,
            units=() if units is None or output_units is None else _runs(units, output_units, neurons, shard.whole),
            place=place,
        )
        if is_module:
            self._modules.add(key)
        counters = self._all_counters_for(phase, key, info, names, neurons, x, units, traced)
        hook = None
        if counters is not None:
            hook = CountedGradient(self._gradients, (place, activation.name), glu_dim, counters, layout)
            if not traced:
                counters.sharded_dims = sharded_dims(x)
        if output_units is not None:
            after = origin.but(
                site=key,
                units=output_units,
                bends=((output_units.layer, ACTIVATED),),
                carries=(carry_site(key, output_units),),
                picks=None,
                made=False,
                factors=(),
            ).inherit([Operand((), origin)])
        else:
            state = LOST if origin.state == UNITS else origin.state
            after = origin.but(site=key, units=None, state=state, factors=())
        fits = glu_dim is None and (output_units is None or len(output_units.dims) == x.dim())
        shape = x.shape if type(x) is Tensor and fits else None
        self._units[key] = info.units
        call = self._gates[key] = Call(key, counters, layout, hook, after, activation, info, shape=shape)
        return call

    def find_named(
        self, phase: str, name: str, axis: int, kind: str, y: Tensor, *, traced: bool
    ) -> tuple[Call | None, str]:
        """Return the call of a tensor that the user names, and why it is not counted, ``""`` if it is.

        Args:
            phase: The phase that it belongs to.
            name: Its name.
            axis: The dimension that indexes its neurons, ≥ 0.
            kind: One of :data:`neuronscope.attach.activations.KINDS`.
            y: The tensor ``(…, N, …)``.
            traced: Whether it is the fake tensor of a graph.
        """
        key, layout = SiteKey(name, "", "", 0), NeuronLayout(axis)
        if key not in self._named and (name in self.paths() or any(each.name == name for _, each in self._counters)):
            return None, "the name is that of a layer, a module or a site of the model: give it another one"
        self._named.add(key)
        if not traced and (reason := unsupported_reason(y)):
            return None, reason
        origin = self._forward.flow.origin(y)
        units = origin.units if origin.units is not None and origin.units.layout == layout else None
        shard = self._shard(y, layout, units, key)
        if shard is None:
            return None, self.unmeasured.reasons[name]
        neurons = neurons_in(local_tensor(y).shape, layout)
        info = SiteInfo(
            activation="tensor",
            kind=kind,
            linear_when_on=False,
            axis=axis,
            axis_source="declared",
            first=shard.first,
            whole=shard.whole,
            layer="" if units is None else units.layer,
            units=() if units is None else _runs(units, units, neurons, shard.whole),
            place=NAMED_TENSOR,
        )
        hidden = traced and self._is_shared_in_graph(key)
        names = (name, info.layer or name, NAMED_TENSOR)
        counters = None if hidden else self._counters_for(phase, key, info, names, neurons, y)
        known = self._counters.get((phase, key))
        if known is not None and counters is None:
            return None, self.unmeasured.reasons[name]
        hook = None
        if counters is not None:
            hook = CountedGradient(self._gradients, (name, NAMED_TENSOR), None, counters, layout)
            if not traced:
                counters.sharded_dims = sharded_dims(y)
        if units is not None:
            self._units[key] = info.units
            carries, bends = (carry_site(key, units), *origin.carries), ((units.layer, ACTIVATED),)
            self._forward.flow.put(y, origin.but(bends=bends, carries=carries))
        return Call(key, counters, layout, hook, origin, _NAMED, info), ""

    def find_product(self, phase: str, args: tuple[Any, ...], y: Tensor, traced: bool = False) -> Selected | None:
        """Return the call of a gated product or a SiLU that is written out, ``None`` if a product is neither.

        Args:
            phase: The phase that it belongs to.
            args: The two factors.
            y: The product.
            traced: Whether ``y`` is the fake tensor of a graph.
        """
        flow = self._forward.flow
        for factor, other in (args, args[::-1]):
            if not isinstance(factor, Tensor) or not isinstance(other, Tensor) or other is factor:
                continue
            origin = flow.origin_before(factor, y)
            gate = None if origin.site is None else self._gates.get(origin.site)
            if gate is None or factor.shape != y.shape or other.shape != y.shape:
                continue
            if origin.units is None:
                if gate.info.axis_source == "declared":
                    found = self.find_derived(phase, gate, origin, None, y, traced)
                    return None if found is None else Selected(found)
                continue
            if gate.after.units is None or origin.units.size != gate.after.units.size:
                continue  # a part of what the site gave: its gradients are not counted apart
            beside = flow.origin_before(other, y)
            if beside.state in (WEIGHT, CONSTANT):
                continue
            if beside.unit_set and beside.unit_set == origin.unit_set:  # written out, and no gated product
                if self._is_of_experts(origin.units) and _is_swish(gate, origin, beside):
                    found = self._swish(phase, gate, origin, origin.units, y, traced)
                    return Selected(found, other if torch.is_grad_enabled() else None)
                continue
            found = self.find_derived(phase, gate, origin, origin.units, y, traced)
            return None if found is None else Selected(self.with_owners(found, origin.units))
        return None

    def _is_of_experts(self, units: Units) -> bool:
        """Whether units are those of experts, of which data or a number picked the matrix from a stack."""
        if units.experts is not None:
            return True
        found = self._stacked.get(units.layer)
        if found is None:
            layers = self._forward.flow.names.layers()
            parts = [part.rpartition(".") for part in units.layer.split("+")]
            found = all(number.isdigit() and stack in layers for stack, _, number in parts)
            self._stacked[units.layer] = found = found and layers.isdisjoint(units.layer.split("+"))
        return found

    def _swish(self, phase: str, gate: Call, origin: Origin, units: Units, y: Tensor, traced: bool) -> Call:
        """Return the call of a SiLU that is written out as ``x * sigmoid(x)``, maybe with a factor inside.

        Args:
            phase: The phase that it belongs to.
            gate: The call of the sigmoid.
            origin: What its output is.
            units: The units of that.
            y: The product.
            traced: Whether ``y`` is the fake tensor of a graph.
        """
        key = SiteKey(gate.key.layer, units.text(), _SILU.name, self._forward.ordinals.number(origin, _SILU.name))
        info = replace(gate.info, activation=_SILU.name, kind=_SILU.kind, linear_when_on=False, axis=units.layout.axis)
        names = (key.name, key.layer, info.place)
        neurons = neurons_in(local_tensor(y).shape, units.layout)
        counters = self._all_counters_for(phase, key, info, names, neurons, y, units, traced)
        hook = None
        if counters is not None:
            hook = CountedGradient(self._gradients, (info.place, _SILU.name), None, counters, units.layout)
        self._units[key] = info.units
        before = self._forward.flow.origin(y)
        carries = (carry_site(key, units),)
        after = before.but(state=UNITS, units=units, site=key, carries=carries, bends=((units.layer, ACTIVATED),))
        self._forward.flow.put(y, after)
        call = self._gates[key] = Call(key, counters, units.layout, hook, after, _SILU, info)
        return self.with_owners(call, units)

    def find_derived(
        self, phase: str, gate: Call, origin: Origin, units: Units | None, y: Tensor, traced: bool, selection: str = ""
    ) -> Call | None:
        """Return the call of what is computed from the output of a site: a gated product, or what was selected of it.

        Args:
            phase: The phase that it belongs to.
            gate: The call of the site.
            origin: What its output is, as it is multiplied or selected from.
            units: The units of the result; ``None`` if the axis of the site was declared.
            y: The result.
            traced: Whether it is the fake tensor of a graph.
            selection: Name of the selection; ``""`` for a gated product.
        """
        name = selection or gate.activation.gated_name or f"gated {gate.activation.name}"
        if units is None:  # its axis was declared
            key = SiteKey(gate.key.layer, gate.key.units, name, 0)
        else:
            key = SiteKey(gate.key.layer, units.text(), name, self._forward.ordinals.number(origin, name))
        if not traced and in_transform(y):
            self.unmeasured.note(key.name, IN_TRANSFORM)
            return None
        layout = gate.layout if units is None else units.layout
        # Where ranks share a layer, the gate's units are the whole layer's.
        shared = units is None or gate.info.whole > units.size == units.width
        info = replace(
            gate.info,
            activation=name,
            kind="sparse" if selection else "gated",
            linear_when_on=False,
            axis=layout.axis,
            units=gate.info.units if units is None or shared or not gate.info.units else units.tensor_runs(),
        )
        self._units[key] = info.units
        if selection:
            self._sparse.add(key)
        names = (key.name, key.layer, info.place)
        neurons = neurons_in(local_tensor(y).shape, layout)
        counters = self._all_counters_for(phase, key, info, names, neurons, y, units, traced)
        if isinstance(counters, JoinedCounters):
            if isinstance(gate.counters, JoinedCounters):
                counters.gate_by(gate.counters)
        elif counters is not None:
            counters.gate = self._counters.get((phase, gate.key))
        before = self._forward.flow.origin(y)
        if units is None:
            return Call(key, counters, layout, None, before, gate.activation, info, gate.key)
        carries = (carry_site(key, units), *before.carries)
        after = before.but(state=UNITS, units=units, layer="", site=key, carries=carries, picks=None).inherit(())
        self._forward.flow.put(y, after)
        return Call(key, counters, layout, None, after, gate.activation, info, gate.key)

    def _shard(self, x: Tensor, layout: NeuronLayout, units: Units | None, key: SiteKey) -> NeuronShard | None:
        """Return which neurons of the layer this rank holds; ``None`` after noting why that is not known."""
        if not is_distributed(x):
            by_hand = None if units is None else self.split.shard(units.layer, neurons_in(x.shape, layout))
            if by_hand is not None:
                return by_hand
            found = self._forward.flow.shard(x, layout.axis, "" if units is None else units.layer)
            if found is None:
                self.unmeasured.note(key.name, "ranks share its layer, and it has a part of each rank's units")
            return found
        if layout.dims is not None:
            self.unmeasured.note(key.name, "ranks share it, and several dimensions hold its neurons")
            return None
        return neuron_shard(x, layout.axis)

    def _is_shared_in_graph(self, key: SiteKey) -> bool:
        """Whether ranks share the neurons of a traced site, after noting that it is not measured."""
        if not self.is_tensor_parallel():
            return False
        self.unmeasured.reasons[key.name] = (
            "torch.compile traced it, and under tensor parallelism a traced graph does not say which of the layer's "
            "neurons are this rank's: watch the model without compiling it"
        )
        return True

    def _all_counters_for(
        self,
        phase: str,
        key: SiteKey,
        info: SiteInfo,
        names: Names,
        neurons: int,
        x: Tensor,
        units: Units | None,
        traced: bool,
    ) -> Counters | None:
        """Return the counters of a site, or those of the sites of all experts; see :meth:`_counters_for`.

        A traced site gets none if its counts would be wrong in a graph, which is noted.

        Args:
            phase: The phase.
            key: The site, or the key of all experts together.
            info: What is known of it.
            names: Its names.
            neurons: Number of neurons, of one expert if there are several.
            x: A tensor on its device.
            units: The units, if they are known.
            traced: Whether ``x`` is the fake tensor of a graph.
        """
        if traced and self._is_shared_in_graph(key):
            return None
        if units is None or units.experts is None:
            new = (phase, key) not in self._counters
            alone = self._counters_for(phase, key, info, names, neurons, x)
            if new and alone is not None:
                self._add_other_experts(phase, key, info, neurons, x)
            return alone
        known = self._experts.get((phase, key))
        if known is not None and known.neurons == neurons:
            return known
        if is_capturing(x):
            self.unmeasured.note(key.name, CAPTURED)
            return None
        members = []
        for layer in units.experts.layers:
            own = key._replace(layer=layer)
            runs = tuple((layer, *run[1:]) for run in info.units)
            described = replace(info, layer=layer, units=runs, axis_source=f"layer ({layer})")
            self._units[own], self._common[own] = runs, key
            if key in self._modules:
                self._modules.add(own)
            members.append(self._counters_for(phase, own, described, (own.name, layer, names[2]), neurons, x))
        if all(member is None for member in members):
            return None
        joined = JoinedCounters(members, neurons)
        if units.experts.joined and not traced:
            return joined
        if any(member.shared or member.in_graph for member in joined.wanted):
            self.unmeasured.note(key.name, "its experts are run in two ways in one phase, of which one is counted")
            joined.leave_out_call()
            return None
        found = self._experts[phase, key] = ExpertCounters(members, neurons, x.device)
        return found

    def _add_other_experts(self, phase: str, key: SiteKey, info: SiteInfo, neurons: int, x: Tensor) -> None:
        """Make the sites of the other experts of a mixture, which are *unseen* until they are given a token.

        Args:
            phase: The phase.
            key: The site of an expert that has just been made.
            info: What is known of it.
            neurons: Number of its neurons.
            x: A tensor on its device.
        """
        for layer, place in self._forward.flow.names.other_experts(key.layer, info.place):
            own = key._replace(layer=layer)
            runs = tuple((layer, *run[1:]) for run in info.units)
            described = replace(info, layer=layer, units=runs, axis_source=f"layer ({layer})", place=place)
            self._units[own] = runs
            if key in self._modules:
                self._modules.add(own)
                self.unmeasured.idle_experts.add(place)
            self._counters_for(phase, own, described, (own.name, layer, place), neurons, x)

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
            if is_capturing(x):  # new counters would be a part of the graph
                self.unmeasured.note(key.name, CAPTURED)
                return None
            self._counters[phase, key] = self._new_counters(phase, key, info, names, neurons, x.device)
        known = self._counters[phase, key]
        if known is not None and known.neurons != neurons:
            self.unmeasured.note(
                key.name,
                f"its neurons changed from {known.neurons} to {neurons}; only calls with {known.neurons} are counted",
            )
            return None
        return known

    def expect_missed_sites(self) -> None:
        """Note that the compiler traced something while no hook was on the model, so that sites may be missed."""
        self._maybe_missed = self._positions()

    def note_missed_sites(self, step: int) -> None:
        """After an observed step, note the sites that were not seen in it, if some may have been missed."""
        if self._maybe_missed:
            now = self._positions()
            for key, positions in self._maybe_missed.items():
                if now[key] == positions:
                    self.unmeasured.note(
                        key.name,
                        f"torch.compile ran while nothing was observed, and at step {step} this site was not "
                        "seen: what was traced then is not counted. Call the compiled model before the first "
                        "`scope.step()`, or `torch._dynamo.reset()` now",
                    )
            self._maybe_missed = {}

    def _positions(self) -> dict[SiteKey, int]:
        found: dict[SiteKey, int] = {}
        for (_, key), counters in list(self._counters.items()):
            if counters is not None:
                found[key] = found.get(key, 0) + counters.totals()[0]
        return found


def _is_swish(gate: Call, origin: Origin, beside: Origin) -> bool:
    """Whether the product of a site's output and another tensor of the same units is a SiLU that is written out.

    Experts write it so. Elsewhere it is listed as not measured, so that its module gets registered.

    Args:
        gate: The site.
        origin: What its output is.
        beside: What the other factor is.
    """
    units = origin.units
    if units is None:
        return False
    own = {name for layer, name in beside.bends if layer == units.layer}
    return gate.activation.name == "sigmoid" and beside.site is None and beside.units == units and own <= _CLAMPS


def _runs(units: Units, output_units: Units, neurons: int, whole: int) -> tuple[Run, ...]:
    """Return which units of which layers the neurons of a site are; ``()`` if that is not known.

    Args:
        units: Those of the pre-activation.
        output_units: Those of the output.
        neurons: Number of the neurons that this rank has.
        whole: Number of neurons of the whole layer; 0 if ranks do not share it.
    """
    runs = output_units.tensor_runs()
    if runs and neurons < whole:
        runs = ((units.layer, 0, whole, 1),) if output_units.size == units.width else ()
    return runs if sum(len(range(*run[1:])) for run in runs) in (neurons, whole) else ()


def neurons_in(shape: Sequence[int], layout: NeuronLayout) -> int:
    """Return the number of neurons of a tensor.

    Args:
        shape: Its shape.
        layout: Where its neurons lie.
    """
    if layout.dims is None:
        return int(shape[layout.axis])  # a graph that is traced with a dynamic width is for this one
    return math.prod(size for dim in layout.dims for size, stride in dim if stride > 0)
