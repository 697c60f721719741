"""Tell the flow of units what the graphs of a compiled model did.

``torch.compile`` traces a frame once. What its graph does to the flow is noted then: which layers it calls, what they
read, and what the tensors that it returns are. When the graph runs again, it calls no Python of ours, so that this is
repeated around its run. The sites inside a graph are constants of it: it may serve only inputs that are what they were
when it was traced, such as units of the same layer. A guard sees to that; see :meth:`PartGraph.serves`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neuronscope.attach.compiling import TracedEnd, in_autograd_function, in_backward, unwatched
from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.ordinals import Counts, Ordinals
from neuronscope.attach.origins import LOST, RAW, UNKNOWN, Origin
from neuronscope.attach.plain_sizes import plain_shape
from neuronscope.attach.tensor_map import TensorMap
from neuronscope.attach.units import has_units, resized
from neuronscope.count.compiled_graphs import KeptCounts
from neuronscope.sites import SiteKey

__all__ = ["CompiledParts", "GivenPreActivation", "PartGraph"]

_MOST_FACTS = 20_000


class GivenPreActivation(Protocol):
    """The activation of a tensor that a graph is given, and that code outside of the graph may use too."""

    def register(self, x: Tensor, again: bool) -> None:
        """Register a hook for the gradient of the tensor.

        Args:
            x: The tensor.
            again: Whether the graph runs in a backward pass, so that the tensor may have the hook already.
        """

    def give_up(self) -> None:
        """Note that its gradients are not measured."""


class CompiledParts:
    """Tracks the graphs of a compiled model.

    Args:
        flow: What each tensor is.
        ordinals: How many activations of each name were applied to which units.

    Attributes:
        exist: Whether a part of the model was traced.
        tracing: Whether what is being traced is a part of the model, and not its own forward.
        flow: The same.
        ordinals: The same.
        is_here: Returns whether the thread that asks is the counted one.
        partly_used: Tensors that a graph returned and used itself, so that their gradients outside are not all.
    """

    def __init__(self, flow: NeuronFlow, ordinals: Ordinals) -> None:
        self.exist = self.tracing = self._guarded = False
        self._in_function: bool | None = None
        self.flow = flow
        self.ordinals = ordinals
        self.is_here: Callable[[], bool] = lambda: True
        self.partly_used: TensorMap[bool] = TensorMap()
        self._known_facts: dict[tuple[Origin, ...], Hashable] = {}
        # When the graph began that is being traced: the number of calls, those that were read, ordinals, and tensors.
        self._before: tuple[int, int, Counts, dict[int, Any]] = 0, 0, {}, {}
        self._given: list[tuple[Tensor, SiteKey, GivenPreActivation]] = []  # to that graph

    def begin_graph(
        self, given: Iterable[Tensor], *, is_model: bool, guarded: bool, in_function: bool | None
    ) -> Hashable:
        """Note that a graph begins to be traced, and return what is known of what it is given.

        Args:
            given: Tensors that the traced function is given.
            is_model: Whether the function is the model's own forward or a part of it, or nothing runs around it.
            guarded: Whether the model's forward began before in eager code, so that inputs of the graph are known.
            in_function: Whether it runs in the ``forward`` of an ``autograd.Function``; ``None`` if it may serve both.
        """
        self.tracing = not is_model
        self.exist |= self.tracing
        self._guarded = guarded
        self._in_function = in_function
        flow = self.flow
        self._before = len(flow.layers), flow.read, self.ordinals.counts(), flow.all_known()
        if in_backward(False):  # what runs again has the numbers that it had
            self.ordinals.clear()
        self._given = []
        return self.facts(tuple(map(flow.given, given))) if guarded else ()

    def end_graph(self, end: TracedEnd | None, counts: Sequence[Tensor] = ()) -> PartGraph | None:
        """Note that a graph was traced, and undo what it did to the flow: it has not run, and may never do.

        Args:
            end: See :class:`~neuronscope.attach.compiling.GraphListener`.
            counts: The counts of outputs that the graph changes.

        Returns:
            What is to be done around each run of the graph; ``None`` if nothing is.
        """
        given, self._given = self._given, []
        if end is None:
            self._undo()
            return None
        followed = bool(self._guarded or given or not end.ends)
        graph = PartGraph(self, end, self._before, counts, followed=followed)
        for x, site, activation in given:
            place = next((place for place, each in enumerate(end.inputs) if each is x), None)
            if place is None:
                activation.give_up()
            else:
                graph.hooked[place, site] = activation
        if followed or in_backward(False):
            self._undo()
        return graph if followed or counts else None

    def _undo(self) -> None:
        first, read, ordinals, known = self._before
        del self.flow.layers[first:]
        self.flow.read = read
        self.flow.restore(known)
        self.ordinals.restore(ordinals)

    def note_given(self, x: Tensor, site: SiteKey, activation: GivenPreActivation) -> None:
        """Note that an input of the graph that is traced is a pre-activation.

        In the graph, its gradient is that of the uses in the graph alone. So the tensor itself gets a hook, each time
        that the graph is given it.

        Args:
            x: The tensor.
            site: The site of its activation.
            activation: Its activation.
        """
        self._given.append((x, site, activation))

    def facts(self, given: tuple[Origin, ...]) -> Hashable:
        """Return all that a graph depends on of what it is given.

        Args:
            given: What each tensor is.
        """
        found = self._known_facts.get(given)
        if found is None:
            if len(self._known_facts) >= _MOST_FACTS:
                self._known_facts.clear()
            found = self._known_facts[given] = _facts(given)
        rows = self.flow.expert_rows
        last = tuple([rows.are_last(each.units) for each in given if each.units is not None and each.units.experts])
        return (found, last)


class PartGraph:
    """A graph that was traced: for which inputs it may run, and what it does to the flow. Calls are numbered as then.

    Args:
        parts: The graphs of the model.
        end: What was traced.
        state: When the graph began: the number of calls, those that were read, ordinals, and what was known of tensors.
        counts: The counts of outputs that it changes.
        followed: Whether the flow is to know of its runs.

    Attributes:
        guarded: Whether the graph must not run for other inputs.
        hooked: Of each input that is a pre-activation, by its number, and of each site: the activation.
    """

    def __init__(
        self,
        parts: CompiledParts,
        end: TracedEnd,
        state: tuple[int, int, Counts, dict[int, Any]],
        counts: Sequence[Tensor],
        *,
        followed: bool,
    ) -> None:
        flow, (first, read, ordinals, before) = parts.flow, state
        self._is_again = in_backward(False)
        if self._is_again:
            ordinals = {}
        self._in_function = parts._in_function
        self._has_facts = parts._guarded
        self.guarded = self._has_facts or self._is_again or self._in_function is not None
        self._followed = followed
        self._counts = KeptCounts(counts)
        self._parts = parts
        self._given = tuple([flow.given(each, before) for each in end.inputs if each is not None])
        self._facts = parts.facts(self._given)
        self._first = first
        self._layers = tuple(flow.layers[first:])
        self._read = flow.read & ~read
        made = {place: count - ordinals.get(place, 0) for place, count in parts.ordinals.counts().items()}
        self._ordinals = {place: count for place, count in made.items() if count}
        known = () if self._is_again else self._ordinals
        self._before = {place: ordinals.get(place, 0) for place in known if max(place[0][0]) < first}
        self._returned = [None if each is None else flow.origin(each) for each in end.outputs]
        self._used = end.used
        self._changed = {
            place: origin
            for place, each in enumerate(end.inputs)
            if each is not None and (origin := flow.known(each)) is not None and origin is not flow.given(each, before)
        }
        self.hooked: dict[tuple[int, SiteKey], GivenPreActivation] = {}

    def serves(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the sites in the graph are those of these inputs.

        Args:
            inputs: The tensors that the graph would be given.
        """
        if self._is_again and not in_backward(False):
            return False
        if self._in_function is not None and self._in_function != in_autograd_function():
            return False
        if not self._has_facts:
            return True
        parts, given = self._parts, tuple(map(self._parts.flow.given, inputs))
        if parts.facts(given) != self._facts:
            return False
        if not self._before:
            return True
        numbers = _CallNumbers(self._given, given, self._first)
        counts = parts.ordinals.counts()
        return all(counts.get(numbers.place(place), 0) == count for place, count in self._before.items())

    def begin(self, inputs: Sequence[Any]) -> Callable[[Sequence[Any] | None], None] | None:
        """Do to the flow what tracing the graph did, because it is about to run.

        In a backward pass, where activation checkpointing runs it again, its outputs were counted before.

        Args:
            inputs: What it is given.

        Returns:
            What is to be called with its outputs; ``None`` if nothing is to be done with them.
        """
        parts, again = self._parts, in_backward(False)
        if not again and not (self._followed and parts.is_here()):
            return None
        for (place, _), activation in self.hooked.items():
            if parts.partly_used.get(inputs[place]):
                activation.give_up()
            else:
                activation.register(inputs[place], again)
        if again:
            with unwatched(), torch.no_grad():
                kept = self._counts.keep()
            return functools.partial(self._end_again, kept)
        return functools.partial(self._end, self._add_calls(inputs), inputs)

    def _end_again(self, kept: list[list[Tensor]], _: Any) -> None:
        with unwatched(), torch.no_grad():
            self._counts.put_back(kept)

    def _add_calls(self, inputs: Sequence[Any]) -> Callable[[Origin], Origin]:
        """Add the calls of the graph to the flow, and return what gives an origin of then by the numbers of now."""
        parts, flow = self._parts, self._parts.flow
        given = tuple([flow.given(each) for each in inputs if isinstance(each, Tensor)])
        numbers = _CallNumbers(self._given, given, self._first)
        numbers.shift(self._first, len(self._layers), len(flow.layers))
        flow.layers.extend(self._layers)
        flow.read |= numbers.bits(self._read)
        for key, count in self._ordinals.items():
            parts.ordinals.add(numbers.place(key), count)
        return numbers.origin

    def _end(self, renumber: Callable[[Origin], Origin], inputs: Sequence[Any], outputs: Sequence[Any] | None) -> None:
        """Note what the tensors are that the graph returned or changed.

        Args:
            renumber: Gives an origin of then by the numbers of now.
            inputs: What it was given.
            outputs: What it returned; ``None`` if it raised.
        """
        if outputs is None:
            return
        partly_used = self._parts.partly_used
        for tensor, origin, used in zip(outputs, self._returned, self._used, strict=True):
            if origin is not None:
                self._put(tensor, origin, renumber)
                if used:
                    partly_used.put(tensor, True)
        for place, origin in self._changed.items():
            self._put(inputs[place], origin, renumber)
            partly_used.put(inputs[place], True)

    def _put(self, tensor: Tensor, origin: Origin, renumber: Callable[[Origin], Origin]) -> None:
        if isinstance(tensor, nn.Parameter) or origin.state == UNKNOWN:
            return
        units = origin.units
        if units is not None:
            dims = resized(units.dims, plain_shape(tensor))
            if dims is None or len(dims) != len(units.dims):
                origin = origin.without_units(LOST)
            else:
                origin = origin.but(units=units._replace(dims=dims))
        self._parts.flow.put(tensor, renumber(origin))


def _facts(given: Sequence[Origin]) -> tuple[Any, ...]:
    """Return what is known of inputs, but for their sizes and for how many calls of layers came before them."""
    calls = sorted({call for origin in given if origin.units is not None for call in origin.units.call})
    facts: list[Any] = []
    for origin in given:
        units = origin.units
        if units is None:
            state = RAW if origin.state == UNKNOWN else origin.state
            picks = origin.picks and (origin.picks.units.layer, origin.picks.site)
            facts.append((state, origin.layer, origin.picked, origin.cuts, origin.zeros, origin.turned, picks))
            continue
        dims = tuple(tuple(factor if factor[1] else 0 for factor in dim) if has_units(dim) else 0 for dim in units.dims)
        before = tuple(place for place, call in enumerate(calls) if origin.upstream >> call & 1)
        own = tuple(calls.index(call) for call in units.call)
        which = (*units[1:4], units.explicit, units.experts, dims)
        facts.append((own, before, *which, origin.layer, origin.site, origin.bends, origin.carries))
    return tuple(facts)


class _CallNumbers:
    """Maps the numbers that calls had when a graph was traced to those that they have in this forward.

    Args:
        then: What the graph was given when it was traced.
        now: What it is given now.
        first: Number of the first call in the graph.
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
        self._parts = {
            (old.units.call, old.part): new.part
            for old, new in zip(then, now)  # noqa: B905
            if old.units is not None and old.part and new.part
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

    def place(self, place: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return a place of ordinals, which begins with a set of units, by the numbers and the positions of now."""
        (calls, *unit_set), name, *part = place
        now = tuple(map(self._call, calls))
        return ((now, *unit_set), name, *(self._parts.get((calls, each), each) for each in part))

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
