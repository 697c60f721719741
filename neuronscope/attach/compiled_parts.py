"""Tell the flow of units what a compiled part of an eager forward gave.

``torch.compile`` traces a part once. What the part does to the flow is noted then: which layers it called, what they
read, and what the tensors that it returned are. When the part has run again, in a graph that calls no Python of ours,
the hook on its module repeats that. The sites inside a graph are constants of it, so that it may serve only inputs from
the layers that it was traced with: see :attr:`CompiledParts.inputs`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from neuronscope.attach.compiling import TracedEnd, code_of_forward, is_compiled
from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.ordinals import Counts, Ordinals
from neuronscope.attach.origins import LOST, RAW, UNKNOWN, Origin
from neuronscope.attach.plain_sizes import plain_shape
from neuronscope.attach.tensor_map import nested_tensors
from neuronscope.attach.units import has_units, resized
from neuronscope.sites import SiteKey

__all__ = ["CompiledParts", "GivenPreActivation"]

#: For how many kinds of inputs a module gets graphs of its own. ``torch.compile`` makes eight, in all phases together.
_MOST_KINDS = 3
#: The kind of all further inputs. What they are is not known to the graph.
_OTHER = "other"

#: What each tensor is that a graph returns, and its shape.
Returned = tuple[tuple[Origin, tuple[int, ...]], ...]


class _GraphEffect(NamedTuple):
    """What a graph does to the flow; calls are numbered as when it was traced.

    Attributes:
        first: Number of its first call of a layer.
        layers: The layers that it calls.
        read: Calls that its layers read, as bits.
        ordinals: How many activations of each name it applies to which units.
        left: What it returns; if code of its function follows that is not compiled, what that code is about to use.
        ends: Whether its function ends with it.
    """

    first: int
    layers: tuple[str, ...]
    read: int
    ordinals: Counts
    left: Returned
    ends: bool


class _ModuleGraphs(NamedTuple):
    """Graphs that run one after another: what was given before them, the graphs, and what is given behind them."""

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


#: By the number of the tensor, and the site.
GivenPreActivations = dict[tuple[int, SiteKey], GivenPreActivation]


class _Offer(NamedTuple):
    """Tensors that eager code gives to graphs: what a module was given, or what the last module returned.

    Attributes:
        place: Where that was, and all that the graphs depend on but shapes.
        tensors: References to the tensors.
        hooked: Which of these got a hook for a gradient.
    """

    place: tuple[Any, ...]
    tensors: tuple[weakref.ref[Tensor], ...]
    hooked: GivenPreActivations


class _ModuleCall(NamedTuple):
    """A call of a compiled module that has begun: the module, what it was given, and the kind of that."""

    module: nn.Module
    given: tuple[Origin, ...]
    kind: str
    offer: _Offer


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
        met_unknown: Whether a part was traced that is no module with hooks. Of its inputs nothing is known then,
            because its graph would serve others too.
    """

    def __init__(self, flow: NeuronFlow, ordinals: Ordinals) -> None:
        self.inputs = ""
        self.exist = self.tracing = self.met_unknown = self._whole = False
        self._flow = flow
        self._ordinals = ordinals
        self._pre_activations: list[GivenPreActivations] = []  # in the graph that is being traced, of each offer
        self._returned: _Offer | None = None
        #: Of each place and function that was traced there.
        self._given_at: dict[tuple[Any, ...], dict[str, GivenPreActivations]] = {}
        self._before: tuple[int, int, Counts] = 0, 0, {}  # the flow when the graph began that is being traced
        self._traced: list[_GraphEffect] = []  # since the last module began or ended
        self._last: tuple[Any, ...] = ()  # which module that was
        self._given: tuple[Origin, ...] = ()  # what it was given, or returned
        self._passed = 0  # how many modules have begun or ended since the outermost one began
        self._running: list[_ModuleCall] = []
        self._kinds: dict[int, dict[tuple[Any, ...], str]] = {}  # of each module
        self._numbers = itertools.count()  # no kinds of two modules are equal
        self._graphs: dict[tuple[Any, ...], _ModuleGraphs] = {}

    def clear(self) -> None:
        """Forget what is running, because a forward begins or did not end."""
        if not (self._passed or self._traced):
            return
        self.inputs = ""
        self._running.clear()
        self._traced.clear()
        self._start()

    def _start(self) -> None:
        self._last, self._given, self._returned, self._passed = (), (), None, 0

    def begin_graph(self, is_model: bool, code: CodeType, owner: Any) -> None:
        """Note that a graph begins to be traced.

        Args:
            is_model: Whether it is the model's own forward or a part of it, or nothing runs around it.
            code: See :class:`~neuronscope.attach.compiling.GraphListener`.
            owner: See there.
        """
        self._whole |= is_model
        self.tracing = not is_model
        self.exist |= self.tracing
        module = self._running[-1].module if self._running else None
        is_module = module is not None and (
            is_compiled(module) or owner is module or (owner is None and code == code_of_forward(module))
        )
        known = (is_module and self.inputs != _OTHER) or is_model
        self.met_unknown |= not known
        if not known:
            self._flow.hide_units()
        self._before = len(self._flow.layers), self._flow.read, self._ordinals.counts()
        self._pre_activations = [{} for _ in self._offers()]

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
            self._ordinals.restore(ordinals)
            return
        made = {place: count - ordinals.get(place, 0) for place, count in self._ordinals.counts().items()}
        flow.note_variables(end.code, end.variables)
        self._traced.append(
            _GraphEffect(
                first,
                tuple(flow.layers[first:]),
                flow.read & ~read,
                {place: count for place, count in made.items() if count},
                tuple((flow.origin(tensor), plain_shape(tensor)) for tensor in nested_tensors(end.left)),
                end.ends,
            )
        )
        self._hook_given(end.function)

    def note_given(self, x: Tensor, site: SiteKey, activation: GivenPreActivation) -> None:
        """Note that an input of the graph that is traced is a pre-activation.

        In the graph, its gradient is that of the uses in the graph alone. So the tensor itself gets a hook, each time
        that a module is given it or has returned it.

        Args:
            x: The tensor.
            site: The site of its activation.
            activation: Its activation.
        """
        for offer, found in zip(self._offers(), self._pre_activations, strict=True):
            for number, tensor in enumerate(offer.tensors):
                if tensor() is x:
                    found[number, site] = activation
                    return
        activation.give_up()

    def _offers(self) -> list[_Offer]:
        given = self._running[-1].offer if self._running else None
        return [offer for offer in (given, self._returned) if offer is not None]

    def _hook_given(self, function: str) -> None:
        """Before a graph runs for the first time, register hooks on its inputs that are pre-activations in it."""
        for offer, found in zip(self._offers(), self._pre_activations, strict=True):
            known = self._given_at.setdefault(offer.place, {}).setdefault(function, found)
            for place in known.keys() ^ found.keys():  # they depend on more than is known before the graph runs
                (known.get(place) or found[place]).give_up()
            self._hook(offer, found)

    def _hook(self, offer: _Offer, found: GivenPreActivations) -> None:
        for place, activation in found.items():
            tensor = offer.tensors[place[0]]()
            if place not in offer.hooked and tensor is not None:
                offer.hooked[place] = activation
                activation.register(tensor)

    def _offer(self, place: tuple[Any, ...], tensors: Sequence[Tensor]) -> _Offer:
        """Return what eager code gives to graphs, after registering hooks on what is known to be a pre-activation."""
        offer = _Offer(place, tuple(map(weakref.ref, tensors)), {})
        for found in self._given_at.get(place, {}).values():
            self._hook(offer, found)
        return offer

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
        if not self._running and not self._whole:
            self._start()
        self._pass_graphs(tensors, (True, id(module)), (torch.is_grad_enabled(), module.training, *state))
        given = tuple(origin for origin in map(self._flow.known, tensors) if origin is not None)
        kinds = self._kinds.setdefault(id(module), {})
        facts = _facts(given)
        if facts not in kinds:
            kinds[facts] = str(next(self._numbers)) if len(kinds) < _MOST_KINDS else _OTHER
        self.inputs = kinds[facts]
        self._last, self._given = (True, id(module), self.inputs), given
        offer = self._offer((*self._last, torch.is_grad_enabled(), module.training, *state), tensors)
        self._running.append(_ModuleCall(module, given, self.inputs, offer))

    def leave(self, module: nn.Module, output: Any, state: tuple[Any, ...]) -> None:
        """Note what the graphs did that ran in a module, if any did.

        Args:
            module: The module, which has ended.
            output: What it returned.
            state: All else that the graphs depend on, such as the phase.
        """
        tensors = tuple(nested_tensors(output))
        self._pass_graphs(tensors, (False, id(module)), (torch.is_grad_enabled(), module.training, *state))
        if self._running and self._running[-1].module is module:
            call = self._running.pop()
            self.inputs = self._running[-1].kind if self._running else ""
            self._last, self._given = (False, id(module), call.kind), ()
            place = (*self._last, self._passed, torch.is_grad_enabled(), module.training, *state)
            self._returned = self._offer(place, tensors)

    def _pass_graphs(self, tensors: Sequence[Tensor], module: tuple[bool, int], state: tuple[Any, ...]) -> None:
        """Note what the graphs did that ran since a module began or ended the last time, or repeat it.

        Args:
            tensors: What the module that begins now is given, or what the one that ends returned.
            module: Whether it begins, and its ``id``.
            state: All else that the graphs depend on.
        """
        begins, number = module
        is_all = not begins and self._last[:2] == (True, number)  # all graphs of a module that calls no other one
        place = (self._last, *module, *state, -1 if is_all else self._passed)
        self._passed += 1
        shapes = tuple(plain_shape(tensor) for tensor in tensors)
        graphs, self._traced = self._traced, []
        if graphs:  # what they did is in the flow already
            left = graphs[-1].left
            if begins:
                left = left[max(0, len(left) - len(shapes)) :]
            if graphs[-1].ends is not begins and tuple(shape for _, shape in left) == shapes:
                entry = _ModuleGraphs(self._given, tuple(graphs), left)
                self._graphs[(*place, shapes)] = self._graphs[(*place, tuple(map(len, shapes)))] = entry
                self._put(tensors, left, lambda origin: origin)
        else:
            known = self._graphs.get((*place, shapes)) or self._graphs.get((*place, tuple(map(len, shapes))))
            if known is not None and self._came_from_graph(tensors, known):
                self._repeat(known, self._given, tensors)

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
                self._ordinals.add((numbers.unit_set(unit_set), *name), count)
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
