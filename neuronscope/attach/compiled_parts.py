"""Tell the flow of units what a compiled part of an eager forward gave.

``torch.compile`` traces a part once. What the part does to the flow is noted then: which layers it called, what they
read, and what the tensors that it returned are. When the part has run again, in a graph that calls no Python of ours,
the hook on its module repeats that. The sites inside a graph are constants of it, so that it may serve only inputs from
the layers that it was traced with: see :attr:`CompiledParts.inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from neuronscope.attach.compiling import TracedEnd
from neuronscope.attach.neuron_flow import NeuronFlow, nested_tensors, plain_shape
from neuronscope.attach.origins import LOST, RAW, UNKNOWN, Origin
from neuronscope.attach.units import has_units, resized
from neuronscope.sites import SiteKey

__all__ = ["CompiledParts", "GivenPreActivation"]

#: For how many kinds of inputs a module gets graphs of its own. ``torch.compile`` makes eight, in all phases together.
_MOST_KINDS = 3
#: The kind of all further inputs. What they are is not known to the graph.
_OTHER = "other"

Ordinals = dict[tuple[Any, ...], int]
#: What each tensor is that a graph returns, and its shape.
Returned = tuple[tuple[Origin, tuple[int, ...]], ...]


class _GraphEffect(NamedTuple):
    """What a graph does to the flow; calls are numbered as when it was traced.

    Attributes:
        first: Number of its first call of a layer.
        layers: The layers that it calls.
        read: Calls that its layers read, as bits.
        ordinals: How many activations of each name it applies to which units.
        returned: What it returns; ``None`` if code follows that is not compiled.
    """

    first: int
    layers: tuple[str, ...]
    read: int
    ordinals: Ordinals
    returned: Returned | None


class _ModuleGraphs(NamedTuple):
    """The graphs of one call of a module: what it was given then, the graphs, and what the last one returns."""

    given: tuple[Origin, ...]
    graphs: tuple[_GraphEffect, ...]
    returned: Returned


class GivenPreActivation(Protocol):
    """The activation of a tensor that a graph is given, and that code outside of the graph may use too."""

    def register(self, x: Tensor) -> None:
        """Register a hook for the gradient of the tensor.

        Args:
            x: The tensor.
        """

    def give_up(self) -> None:
        """Note that its gradients are not measured."""


#: By the number of the tensor among what the module is given, and the site.
GivenPreActivations = dict[tuple[int, SiteKey], GivenPreActivation]


class _ModuleCall(NamedTuple):
    """A call of a compiled module that has begun: the module, what it was given, and the kind of that.

    Attributes:
        place: The module, the kind, and all else that the graphs depend on but shapes.
        tensors: What it was given.
        hooked: Which of these got a hook for a gradient.
    """

    module: nn.Module
    given: tuple[Origin, ...]
    kind: str
    place: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    hooked: GivenPreActivations


class CompiledParts:
    """Tracks the compiled parts of a forward.

    Args:
        flow: What each tensor is.
        ordinals: How many activations of each name were applied to which units.

    Attributes:
        inputs: What kind of inputs the part that is running was given; traced code reads it, so that a graph runs only
            for inputs of the kind that it was traced with. ``""`` outside of a compiled module.
        exist: Whether a part of the model was traced.
        tracing: Whether what is being traced is a part of the model, and not its own forward.
        met_unknown: Whether a part was traced that is no compiled module with hooks. Of its inputs nothing is known
            then, because its graph would serve others too.
    """

    def __init__(self, flow: NeuronFlow, ordinals: Ordinals) -> None:
        self.inputs = ""
        self.exist = self.tracing = self.met_unknown = False
        self._flow = flow
        self._ordinals = ordinals
        self._pre_activations: GivenPreActivations = {}  # in the graph that is being traced
        self._given_at: dict[tuple[Any, ...], GivenPreActivations] = {}  # of each place
        self._before: tuple[int, int, Ordinals] = 0, 0, {}  # the flow when the graph began that is being traced
        self._traced: list[_GraphEffect] = []  # since the last module left
        self._running: list[_ModuleCall] = []
        self._kinds: dict[int, dict[tuple[Any, ...], str]] = {}  # of each module
        self._graphs: dict[tuple[Any, ...], _ModuleGraphs] = {}

    def clear(self) -> None:
        """Forget what is running, because a forward begins or did not end."""
        self.inputs = ""
        self._running.clear()
        self._traced.clear()

    def begin_graph(self, is_model: bool) -> None:
        """Note that a graph begins to be traced.

        Args:
            is_model: Whether it is the model's own forward or a part of it, or nothing runs around it.
        """
        self.tracing = not is_model
        self.exist |= self.tracing
        known = self.inputs not in ("", _OTHER) or is_model
        self.met_unknown |= not known
        if not known:
            self._flow.hide_units()
        self._before = len(self._flow.layers), self._flow.read, dict(self._ordinals)
        self._pre_activations = {}

    def end_graph(self, end: TracedEnd | None) -> None:
        """Note that a graph was traced, or undo what it did to the flow if it was dropped.

        Args:
            end: See :class:`~neuronscope.attach.compiling.GraphListener`.
        """
        flow, (first, read, ordinals) = self._flow, self._before
        flow.unhide_units()
        if end is None:
            del flow.layers[first:]
            flow.read = read
            self._ordinals.clear()
            self._ordinals.update(ordinals)
            return
        made = {place: count - ordinals.get(place, 0) for place, count in self._ordinals.items()}
        flow.note_variables(end.code, end.variables)
        self._traced.append(
            _GraphEffect(
                first,
                tuple(flow.layers[first:]),
                flow.read & ~read,
                {place: count for place, count in made.items() if count},
                None
                if end.returned is None
                else tuple((flow.origin(tensor), plain_shape(tensor)) for tensor in nested_tensors(end.returned)),
            )
        )
        self._hook_given()

    def note_given(self, x: Tensor, site: SiteKey, activation: GivenPreActivation) -> None:
        """Note that an input of the graph that is traced is a pre-activation.

        In the graph, its gradient is that of the uses in the graph alone. So the tensor itself gets a hook, each time
        that the module runs which was given it.

        Args:
            x: The tensor.
            site: The site of its activation.
            activation: Its activation.
        """
        tensors = self._running[-1].tensors if self._running else ()
        number = next((number for number, tensor in enumerate(tensors) if tensor is x), None)
        if number is None:
            activation.give_up()
        else:
            self._pre_activations[number, site] = activation

    def _hook_given(self) -> None:
        """Before a graph runs for the first time, register hooks on its inputs that are pre-activations in it."""
        if not self._running:
            return
        call, found = self._running[-1], self._pre_activations
        known = self._given_at.setdefault(call.place, found)
        for place in known.keys() ^ found.keys():  # they depend on more than is known before the module runs
            (known.get(place) or found[place]).give_up()
        for (number, site), activation in found.items():
            if (number, site) not in call.hooked:
                call.hooked[number, site] = activation
                activation.register(call.tensors[number])

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: tuple[Any, ...]
    ) -> None:
        """Note that a module begins to run that is compiled.

        Args:
            module: The module.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.
            state: All else that the graphs depend on, such as the phase.
        """
        tensors = tuple(nested_tensors((args, kwargs)))
        given = tuple(origin for origin in map(self._flow.known, tensors) if origin is not None)
        kinds = self._kinds.setdefault(id(module), {})
        facts = _facts(given)
        if facts not in kinds:
            kinds[facts] = str(len(kinds)) if len(kinds) < _MOST_KINDS else _OTHER
        self.inputs = kinds[facts]
        place = (id(module), self.inputs, torch.is_grad_enabled(), module.training, *state)
        hooked = dict(self._given_at.get(place, {}))
        for (number, _), activation in hooked.items():
            activation.register(tensors[number])
        self._running.append(_ModuleCall(module, given, self.inputs, place, tensors, hooked))

    def leave(self, module: nn.Module, output: Any, state: tuple[Any, ...]) -> None:
        """Note what the graphs did that ran in a module, if any did.

        Args:
            module: The module, which has ended.
            output: What it returned.
            state: All else that the graphs depend on, such as the phase.
        """
        call = self._running[-1] if self._running else _ModuleCall(module, (), "", (), (), {})
        tensors = list(nested_tensors(output))
        place = (id(module), call.kind, torch.is_grad_enabled(), module.training, *state)
        shapes = tuple(plain_shape(tensor) for tensor in tensors)
        graphs, self._traced = self._traced, []
        if graphs:  # what they did is in the flow already
            returned = graphs[-1].returned
            if returned is not None and tuple(shape for _, shape in returned) == shapes:
                entry = _ModuleGraphs(call.given, tuple(graphs), returned)
                self._graphs[(*place, shapes)] = self._graphs[(*place, tuple(map(len, shapes)))] = entry
                self._put(tensors, returned, lambda origin: origin)
        else:
            known = self._graphs.get((*place, shapes)) or self._graphs.get((*place, tuple(map(len, shapes))))
            if known is not None and self._came_from_graph(tensors, known):
                self._repeat(known, call.given, tensors)
        if self._running and self._running[-1].module is module:
            self._running.pop()
            self.inputs = ""

    def _came_from_graph(self, tensors: Sequence[Tensor], graphs: _ModuleGraphs) -> bool:
        """Whether the tensors were not made by functions that the flow has seen, as they are if nothing is compiled."""
        return not any(graph.layers for graph in graphs.graphs) or any(
            self._flow.known(tensor) is None for tensor in tensors
        )

    def _repeat(self, graphs: _ModuleGraphs, given: Sequence[Origin], tensors: Sequence[Tensor]) -> None:
        """Do to the flow what graphs did when they were traced."""
        flow = self._flow
        numbers = _CallNumbers(graphs.given, given, graphs.graphs[0].first)
        for graph in graphs.graphs:
            numbers.shift(graph.first, len(graph.layers), len(flow.layers))
            flow.layers.extend(graph.layers)
            flow.read |= numbers.bits(graph.read)
            for (unit_set, *name), count in graph.ordinals.items():
                place = (numbers.unit_set(unit_set), *name)
                self._ordinals[place] = self._ordinals.get(place, 0) + count
        self._put(tensors, graphs.returned, numbers.origin)

    def _put(
        self,
        tensors: Sequence[Tensor],
        returned: Returned,
        renumber: Callable[[Origin], Origin],
    ) -> None:
        for tensor, (origin, _) in zip(tensors, returned, strict=True):
            if isinstance(tensor, nn.Parameter):
                continue
            units, shape = origin.units, plain_shape(tensor)
            if units is not None:
                dims = resized(units.dims, shape)
                if dims is None or len(dims) != len(units.dims):
                    origin = origin.without_units(LOST)
                else:
                    origin = origin.but(units=units._replace(dims=dims))
            self._flow.put(tensor, renumber(origin))


def _facts(given: Sequence[Origin]) -> tuple[Any, ...]:
    """Return what is known of inputs, but for their sizes and for how many calls of layers came before them."""
    calls = sorted({call for origin in given if origin.units is not None for call in origin.units.call})
    facts: list[Any] = []
    for origin in given:
        units = origin.units
        if units is None:
            facts.append((RAW if origin.state == UNKNOWN else origin.state, origin.layer, origin.picked))
            continue
        dims = tuple(tuple(factor if factor[1] else 0 for factor in dim) if has_units(dim) else 0 for dim in units.dims)
        before = tuple(place for place, call in enumerate(calls) if origin.upstream >> call & 1)
        own = tuple(calls.index(call) for call in units.call)
        facts.append((own, before, *units[1:4], dims, origin.layer, origin.site, origin.bends, origin.carries))
    return tuple(facts)


class _CallNumbers:
    """Maps the numbers that calls had when graphs were traced to those that they have in this forward.

    Args:
        then: What the module was given when the graphs were traced.
        now: What it is given now.
        first: Number of the first call in the graphs.
    """

    def __init__(self, then: Sequence[Origin], now: Sequence[Origin], first: int) -> None:
        self._before = (1 << first) - 1
        self._given = [(old.upstream, new.upstream) for old, new in zip(then, now) if old.upstream]  # noqa: B905
        self._calls = {
            call: number
            for old, new in zip(then, now)  # noqa: B905
            if old.units is not None and new.units is not None
            for call, number in zip(old.units.call, new.units.call)  # noqa: B905
        }
        self._shifts: list[tuple[int, int, int]] = []

    def shift(self, first: int, calls: int, now: int) -> None:
        """Note where the calls of a graph lie now.

        Args:
            first: Number of its first call when it was traced.
            calls: How many it makes.
            now: Number of its first call now.
        """
        self._shifts.append((first, calls, now))

    def bits(self, bits: int) -> int:
        """Return calls, as bits, by their numbers of now."""
        found = 0
        for first, calls, now in self._shifts:
            found |= (bits >> first & (1 << calls) - 1) << now
        before = bits & self._before
        given = [new for old, new in self._given if old & ~before == 0]
        if before and not given:
            return found | before
        for upstream in given:
            found |= upstream
        return found

    def unit_set(self, unit_set: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return a set of units by the numbers of now; see :class:`~neuronscope.attach.origins.Origin`."""
        return (tuple(map(self._call, unit_set[0])), *unit_set[1:]) if unit_set else unit_set

    def origin(self, origin: Origin) -> Origin:
        """Return what a tensor is, by the numbers of now."""
        units = origin.units
        if units is not None:
            units = units._replace(call=tuple(map(self._call, units.call)))
        return origin.but(upstream=self.bits(origin.upstream), units=units)

    def _call(self, call: int) -> int:
        for first, calls, now in self._shifts:
            if first <= call < first + calls:
                return call - first + now
        return self._calls.get(call, call)
