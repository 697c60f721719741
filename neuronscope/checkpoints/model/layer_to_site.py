"""Ties: which weights lead into which activation site, read off a traced forward.

From a site's pre-activation the way goes back through what only moves or scales elements and through normalisations,
to the first layer that mixes them. A sum of two branches ends it: a neuron behind a residual sum is no row of one
weight alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from neuronscope.checkpoints.model.bounds.elementwise_ops import ELEMENTWISE_RULES
from neuronscope.checkpoints.model.bounds.shape_ops import MOVES, SAME
from neuronscope.checkpoints.model.bounds.weighted_ops import WEIGHTED_RULES
from neuronscope.checkpoints.model.traced_graph import Graph, Ref, Site, Step

__all__ = ["LayerSites", "normalised_sites", "producers", "through_same", "ties_of"]

_NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")
_SCALINGS = (
    "add",
    "add_",
    "sub",
    "sub_",
    "mul",
    "mul_",
    "div",
    "div_",
    "neg",
    "__add__",
    "__mul__",
    "__radd__",
    "__rmul__",
)


class LayerSites(NamedTuple):
    """Which site each weighted layer leads into.

    Attributes:
        sites: Path of the module that holds the weights → name of the site.
        shared: Path of a layer that leads into several sites → their names.
    """

    sites: Mapping[str, str]
    shared: Mapping[str, tuple[str, ...]]


def ties_of(graph: Graph) -> LayerSites:
    """Tie the layers of a traced forward to its sites.

    >>> from torch import nn, zeros
    >>> from neuronscope.checkpoints.model.trace import trace
    >>> dict(ties_of(trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (zeros(1, 3),))).sites)
    {'0': '1'}
    """
    made_by = producers(graph)
    found: dict[str, list[str]] = {}
    for site in graph.sites:
        for path in _paths(graph, made_by, site):
            sites = found.setdefault(path, [])
            if site.name not in sites:
                sites.append(site.name)
    single = {path: names[0] for path, names in found.items() if len(names) == 1}
    return LayerSites(single, {path: tuple(names) for path, names in found.items() if len(names) > 1})


def normalised_sites(graph: Graph) -> set[str]:
    """Names of the sites before whose activation, or before whose weights, a normalisation stands.

    Args:
        graph: A traced forward.
    """
    made_by = producers(graph)
    return {site.name for site in graph.sites if _is_normalised(graph, made_by, site)}


def _is_normalised(graph: Graph, made_by: Mapping[int, Step], site: Site) -> bool:
    weights = 0
    step = made_by.get(site.before)
    while step is not None and weights < 2:
        if _name(step) in _NORMS:
            return True
        weights += step.function in WEIGHTED_RULES
        data = [read for read in dict.fromkeys(step.reads) if graph.values[read].constant is None]
        step = made_by.get(data[0]) if len(data) == 1 and _leads_on(step) else None
    return False


def _leads_on(step: Step) -> bool:
    """Whether a step mixes, moves or scales elements, and does nothing else to them."""
    return (
        step.function in WEIGHTED_RULES
        or step.function in SAME
        or step.function in MOVES
        or (step.function in ELEMENTWISE_RULES and _name(step) in _SCALINGS)
    )


def _name(step: Step) -> str:
    return str(getattr(step.function, "__name__", "")).rstrip("_")


def producers(graph: Graph) -> dict[int, Step]:
    """Which step made each tensor."""
    return {number: step for step in graph.steps for number in step.outputs}


def through_same(made_by: Mapping[int, Step], number: int) -> Step | None:
    """The step that made a tensor, before copies, casts and dropout."""
    step = made_by.get(number)
    while step is not None and step.function in SAME and step.reads:
        step = made_by.get(step.reads[0])
    return step


def _paths(graph: Graph, made_by: Mapping[int, Step], site: Site) -> Iterator[str]:
    start = site.before
    if site.name.endswith(".gated"):  # what the gate multiplies
        product = made_by.get(site.after)
        others = [number for number in product.reads if number != site.before] if product is not None else []
        if len(others) != 1:
            return
        start = others[0]
    number: int | None = start
    while number is not None:
        step = made_by.get(number)
        if step is None:
            return
        data = [read for read in dict.fromkeys(step.reads) if graph.values[read].constant is None]
        name = getattr(step.function, "__name__", "").rstrip("_")
        if len(data) != 1:
            return
        if step.function in WEIGHTED_RULES:
            yield from _holders(graph, step, site.neurons)
            number = data[0] if name in _NORMS else None
        elif (
            step.function in SAME
            or step.function in MOVES
            or (step.function in ELEMENTWISE_RULES and name in _SCALINGS)
        ):
            number = data[0]
        else:
            return


def _holders(graph: Graph, step: Step, neurons: int) -> Iterator[str]:
    """Paths of the modules that hold a step's weights, where those have one row (or entry) a neuron."""
    for argument in (*step.args, *step.kwargs.values()):
        value = graph.values[argument.value] if isinstance(argument, Ref) else None
        if value is not None and value.name.rpartition(".")[2] in ("weight", "bias") and neurons in value.shape:
            yield value.name.rpartition(".")[0]
