"""Examine the neurons of a network with a checkpoint's weights, without data.

One forward on an example is traced. Evidence comes from bounds that hold for every input, from batch norm's parameters,
and from a search for neurons that nothing reads. What is *proved* holds in evaluation mode for every finite input of
the example's shape with any batch size; see ``docs/bounds.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from neuronscope.arrays import BoolArray
from neuronscope.attach.layer_names import layer_name
from neuronscope.checkpoints.model.batchnorm_evidence import (
    batch_norm_parameters,
    batch_norm_statistics,
    negligible_neurons,
)
from neuronscope.checkpoints.model.bounds.interval import BACKWARD, LAYER_NORM, Interval
from neuronscope.checkpoints.model.bounds.propagate import Box, SiteBounds, propagate_bounds, site_bounds
from neuronscope.checkpoints.model.example_inputs import Example, examples_for, two_examples
from neuronscope.checkpoints.model.function_rules import OPERATORS, step_kind
from neuronscope.checkpoints.model.needed_inputs import OutputsNeeded
from neuronscope.checkpoints.model.trace import ForwardError, trace
from neuronscope.checkpoints.model.traced_graph import Graph, Site, Step
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence, evidence_on_site
from neuronscope.checkpoints.verdict.join_units import places_but_gates, wherever_seen
from neuronscope.count.neuron_layout import neurons_first
from neuronscope.errors import UsageError

__all__ = ["Examination", "examine_model"]

_SOURCE = "model"
_READERS = "readers"
_METHODS = {
    LAYER_NORM: "the norm of its weights after a layer norm",
    BACKWARD: "linear bounds that are passed backwards to the input",
}


class Examination(NamedTuple):
    """What was found about a network."""

    evidence: tuple[Evidence, ...]  # evidence on the neurons of its sites
    abstentions: tuple[Abstention, ...]  # what could not be decided, and why
    sites: tuple[Site, ...] = ()  # the sites that ran, one call of each
    readers_known: bool = False  # whether every consumer of every neuron was traced
    #: Sites with a normalisation before their activation or before their layer's weights.
    normalised: Collection[str] = ()
    #: Paths of the layers whose weights were used, if it is known which of them an activation follows; else empty.
    layers: Collection[str] = ()
    example: Example | None = None  # the input that it was run on

    @property
    def linear(self) -> frozenset[str]:
        """Paths of the layers that no activation follows; empty if this is not known."""
        followed = {layer for site in self.sites for layer, *_ in site.units}
        return frozenset(self.layers) - followed - {site.normalises for site in self.sites}


def examine_model(
    model: nn.Module,
    *,
    example: Any = None,
    batch: Any = None,
    box: Box | None = None,
    training_step: int | None = None,
) -> Examination:
    """Examine a network that holds a checkpoint's weights; return evidence, abstentions, and the sites.

    Args:
        model: The network, on the CPU.
        example: An input to run it on once: a tensor, a tuple of arguments, or a mapping of named ones.
        batch: A batch of the user's data, used if there is no example.
        box: Bounds of every element of the input, ``(low, high)``; without it, proofs hold for every input.
        training_step: The checkpoint's number of optimizer steps, for dates.

    Raises:
        UsageError: An argument is invalid, or the network fails on the given example.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2), nn.ReLU())
    >>> _ = net[2].weight.data.fill_(1), net[2].bias.data.copy_(torch.tensor([-3.5, 0]))
    >>> [(one.layer, one.claim, one.basis, one.neurons.tolist()) for one in examine_model(net).evidence]
    [('2/relu', 'dead', 'proved', [0])]
    """
    if box is not None and (not isinstance(box, (tuple, list)) or len(box) != 2):
        raise UsageError(f"Expected argument `box` to be (low, high), but got {box!r}.")
    graph, traced_example, failures = _trace_example(model, example, batch)
    if graph is None or traced_example is None:
        inputs = f"Tried: {'; '.join(failures)}." if failures else "No weighted layer to guess an input from."
        needed = "The network could not be run once, which is needed to find its sites."
        return Examination((), (Abstention(_SOURCE, "", f"{needed} {inputs} Give an example input, or data."),))
    sites = graph.first_calls()
    judged = places_but_gates(sites)
    abstentions = [Abstention(_SOURCE, name, f"Not seen: {reason}.") for name, reason in graph.not_seen.items()]
    normalised = _normalised_sites(graph)
    hidden = graph.unseen_tensors or graph.not_seen or any(site.info.assumed for site in sites)
    layers = set() if hidden else set(_layers_used(graph))
    evidence = [*batch_norm_parameters(graph)]
    if graph.branches:
        reason = (
            f"The network's Python code reads numbers that depend on the input ({', '.join(graph.branches)}), so that "
            "another input may take another path: nothing is proved of it."
        )
        abstentions.append(Abstention(_SOURCE, "", reason))
        return Examination(tuple(evidence), tuple(abstentions), sites, False, normalised, layers, traced_example)
    scope = f"of the shape {traced_example.shapes} ({traced_example.origin}), with any batch size"
    free = propagate_bounds(graph)
    evidence += batch_norm_statistics(graph, free, _batches_counted(model), training_step)
    in_box = propagate_bounds(graph, box) if box is not None else free
    bounds, inside = site_bounds(graph, free), f"for every finite input {scope}"
    evidence += _proved_dead(sites, bounds, inside, judged)
    if box is not None:
        others = {name: mask.copy() for name, mask in judged.items()}
        for one in evidence:
            if one.basis == "proved" and one.claim == "dead":
                others[one.site][one.neurons] = False
        inside = f"for every input between {_end(box[0])} and {_end(box[1])} {scope}"
        bounds = site_bounds(graph, in_box)
        for tried in (bounds, _backward_bounds(model, traced_example, box, sites)):
            for one in _proved_dead(sites, tried, inside, others):
                others[one.site][one.neurons] = False
                evidence.append(one)
    evidence += negligible_neurons(graph, bounds, inside, judged)
    readers_known = not (graph.unseen_tensors or graph.output_not_searchable)
    if readers_known:
        where = "for every finite input" if box is None else "for every input in the box"
        unread = _unread_neurons(graph, in_box)
        found = {name: mask & unread[name] for name, mask in judged.items()}
        evidence += _unread(sites, wherever_seen(found, judged, sites), f"{where} {scope}")
    else:
        what = "computes with calls that were not seen"
        if graph.output_not_searchable:
            what = "returns objects that cannot be searched for tensors"
        reason = f"The network {what}: it is not known what reads each neuron, so none is called unread."
        abstentions.append(Abstention(_READERS, "", reason))
    return Examination(tuple(evidence), tuple(abstentions), sites, readers_known, normalised, layers, traced_example)


def _trace_example(model: nn.Module, given: Any, batch: Any) -> tuple[Graph | None, Example | None, list[str]]:
    """Trace the first example that the network runs on; return its graph, the example, and why others failed."""
    failures = []
    for example in examples_for(model, given, batch):
        try:
            graph = trace(model, example.args, example.kwargs)
        except ForwardError as error:
            if given is not None:
                raise UsageError(
                    f"Expected argument `example` to be an input that {type(model).__name__} runs on, but "
                    f"{example.shapes} gave {error}. Give another shape, type or number of inputs, as in "
                    "`1x3x224x224,1x16:int64`, or the `package.module:name` of a function that makes the example."
                ) from error
            failures.append(f"{example.origin} ({example.shapes}): {error}")
            continue
        return graph, example, failures
    return None, None, failures


def _batches_counted(model: nn.Module) -> dict[str, int]:
    """Return how many training batches each batch norm has counted, by path; converted files may have counted none."""
    end = ".num_batches_tracked"
    counters = ((name, int(buffer)) for name, buffer in model.named_buffers() if name.endswith(end))
    return {name.removesuffix(end): count for name, count in counters if count > 0}


def _layers_used(graph: Graph) -> Iterator[str]:
    """Yield the path of each layer whose weights the forward used."""
    for step in graph.steps:
        for number in step.reads:
            module, _, leaf = graph.values[number].name.rpartition(".")
            if leaf:
                yield layer_name(module, leaf)


def _normalised_sites(graph: Graph) -> set[str]:
    """Return the names of the sites with a normalisation before their activation or before their layer's weights.

    >>> import torch
    >>> network = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    >>> _normalised_sites(trace(network, (torch.zeros(1, 3),)))
    {'1/relu'}
    """
    return {name for name, calls in graph.calls.items() if all(_is_normalised(graph, call) for call in calls)}


def _is_normalised(graph: Graph, site: Site) -> bool:
    layers = 0
    number: int | None = site.before
    while number is not None and layers < 2:
        kind = step_kind(graph.producers.get(number))
        if kind == "norm":
            return True
        layers += kind == "mixes"
        inputs = [] if kind == "other" else graph.variable_inputs(graph.producers[number])
        number = inputs[0] if len(inputs) == 1 else None
    return False


def _end(end: float | Tensor) -> str:
    if isinstance(end, Tensor):
        return f"{end.item():g}" if end.numel() == 1 else f"given bounds ({end.min().item():g} to {end.max().item():g})"
    return f"{end:g}"


def _proved_dead(
    sites: Iterable[Site], bounds: Mapping[str, SiteBounds], scope: str, judged: Mapping[str, BoolArray]
) -> Iterator[Evidence]:
    for site in sites:
        found = bounds.get(site.name)
        if found is None:
            continue
        mask = found.dead & judged[site.name]
        method = _METHODS.get(found.source, "interval arithmetic")
        yield from evidence_on_site(
            site.name,
            mask,
            found.highest,
            source=found.source,
            claim="dead",
            basis="proved",
            measure="pre-activation, at most",
            text=f"In evaluation mode its output is exactly zero {scope}: by {method}, which allows for rounding.",
        )


def _backward_bounds(model: nn.Module, example: Example, box: Box, sites: Iterable[Site]) -> dict[str, SiteBounds]:
    """Return bounds of each site that are tighter than intervals; none if it is not traced on two examples."""
    two = two_examples(example)
    if two is None:
        return {}
    try:
        graph = trace(model, two.args, two.kwargs)
        bounds = site_bounds(graph, propagate_bounds(graph, box, backwards=True))
    except (ForwardError, UsageError):  # such as a box that is not the same for all examples
        return {}
    widths = {site.name: site.neurons for site in sites}
    found = {name: replace(one, source=BACKWARD) for name, one in bounds.items() if one.dead.size == widths.get(name)}
    return {} if graph.branches else found


def _unread(sites: Iterable[Site], unread: Mapping[str, BoolArray], scope: str) -> Iterator[Evidence]:
    for site in sites:
        text = (
            f"In evaluation mode its output changes nothing that the network returns, {scope}: every weight that reads "
            "it is exactly zero, or leads to a neuron that is proved dead or is unread itself."
        )
        yield from evidence_on_site(
            site.name, unread[site.name], source=_READERS, claim="unread", basis="proved", text=text
        )


def _unread_neurons(graph: Graph, intervals: list[Interval | None]) -> dict[str, BoolArray]:
    """Return which neurons nothing reads after any call of a site, bool ``(N,)`` by site; every call must be seen.

    A neuron is unread if every weight that reads it is exactly zero, or belongs to a neuron that is proved dead or is
    unread itself. The steps are visited in the reverse of the order in which they ran, so one pass finds all of them.
    A call of an unknown function needs all of its inputs; a reader whose interval is one number reads nothing.
    """
    masks = {number: torch.ones(graph.values[number].shape, dtype=torch.bool) for number in graph.outputs}
    for step in reversed(graph.steps):
        if not any(number in masks and bool(masks[number].any()) for number in step.outputs):
            continue
        for number, mask in _needed_inputs(graph, step, masks, intervals):
            masks[number] = masks[number] | mask if number in masks else mask
    unread: dict[str, BoolArray] = {}
    for site in graph.sites:
        mask, axis = neurons_first(_mask(graph, site.after, masks), *site.layout)
        others = [dimension for dimension in range(mask.dim()) if dimension != axis]
        here = ~(mask.any(dim=others) if others else mask).numpy()
        before = unread.get(site.name, here)
        unread[site.name] = here & before if here.shape == before.shape else np.zeros_like(before)
    return unread


def _mask(graph: Graph, number: int, masks: dict[int, Tensor]) -> Tensor:
    """Return which elements of a tensor are needed, as found up to now; bool, of the tensor's shape."""
    return masks.get(number, torch.zeros((), dtype=torch.bool)).expand(graph.values[number].shape)


def _needed_inputs(
    graph: Graph, step: Step, masks: dict[int, Tensor], intervals: list[Interval | None]
) -> list[tuple[int, Tensor]]:
    """Return the needed elements of each input of a step that depends on the network's input."""
    rule = OPERATORS.get(step.function)
    if rule is not None and rule.needed_inputs is not None and step.outputs:
        needed = [_mask(graph, number, masks) for number in step.outputs]
        try:
            return [
                (number, mask.expand(graph.values[number].shape))
                for number, mask in rule.needed_inputs(OutputsNeeded(graph, step, needed, intervals))
            ]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            pass  # called in a way that the rule does not know
    return [
        (number, torch.ones(graph.values[number].shape, dtype=torch.bool)) for number in graph.variable_inputs(step)
    ]
