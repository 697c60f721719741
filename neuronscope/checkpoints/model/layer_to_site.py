"""Find which layer's weights feed which activation site, from a traced forward.

From a site's pre-activation, the search goes back through functions that only move or scale elements and through
normalisations, to the first layer that mixes elements. It stops at a sum of two branches, since a neuron after a
residual sum does not correspond to one row of one weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from neuronscope.checkpoints.model.function_rules import OPERATORS
from neuronscope.checkpoints.model.traced_graph import Graph, Site, Step, TensorRef

__all__ = ["LayerSites", "match_layers_to_sites", "normalised_sites", "producing_steps", "step_before_copies"]


class LayerSites(NamedTuple):
    """Which site each weighted layer feeds.

    Attributes:
        sites: Path of the module that holds the weights → name of the site.
        shared: Path of a layer that feeds several sites → their names.
    """

    sites: Mapping[str, str]
    shared: Mapping[str, tuple[str, ...]]


def match_layers_to_sites(graph: Graph) -> LayerSites:
    """Find which site each layer of a traced forward feeds.

    >>> from torch import nn, zeros
    >>> from neuronscope.checkpoints.model.trace import trace
    >>> dict(match_layers_to_sites(trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (zeros(1, 3),))).sites)
    {'0': '1'}
    """
    steps = producing_steps(graph)
    found: dict[str, list[str]] = {}
    for site in graph.sites:
        for path in dict.fromkeys(_layer_paths(graph, steps, site)):
            found.setdefault(path, []).append(site.name)
    single = {path: names[0] for path, names in found.items() if len(names) == 1}
    return LayerSites(single, {path: tuple(names) for path, names in found.items() if len(names) > 1})


def normalised_sites(graph: Graph) -> set[str]:
    """Return the names of the sites with a normalisation before their activation or before their layer's weights.

    Args:
        graph: A traced forward.
    """
    steps = producing_steps(graph)
    return {site.name for site in graph.sites if _is_normalised(graph, steps, site)}


def _is_normalised(graph: Graph, steps: Mapping[int, Step], site: Site) -> bool:
    layers = 0
    number: int | None = site.before
    while number is not None and layers < 2:
        kind = _kind(steps.get(number))
        if kind == "norm":
            return True
        layers += kind == "mixes"
        number = None if kind == "other" else _only_input(graph, steps[number])
    return False


def _kind(step: Step | None) -> str:
    """Return what a step does to neurons: the ``kind`` of its operator's rule, or ``other``."""
    rule = OPERATORS.get(step.function) if step is not None else None
    return "other" if rule is None else rule.kind


def _only_input(graph: Graph, step: Step) -> int | None:
    """Return the number of the one tensor that a step reads and that depends on the input, if there is just one."""
    inputs = {number for number in step.reads if graph.values[number].constant is None}
    return inputs.pop() if len(inputs) == 1 else None


def producing_steps(graph: Graph) -> dict[int, Step]:
    """Return the step that made each tensor, by the tensor's number."""
    return {number: step for step in graph.steps for number in step.outputs}


def step_before_copies(steps: Mapping[int, Step], number: int) -> Step | None:
    """Return the step that computed a tensor, before copies, casts and dropout.

    Args:
        steps: What :func:`producing_steps` returned.
        number: The tensor's number.
    """
    step = steps.get(number)
    while step is not None and _kind(step) == "same" and step.reads:
        step = steps.get(step.reads[0])
    return step


def _layer_paths(graph: Graph, steps: Mapping[int, Step], site: Site) -> Iterator[str]:
    """Yield the paths of the layers that feed a site: a normalisation, and the layer before it."""
    number: int | None = site.before
    if site.name.endswith(".gated"):  # the other factor of the gated product
        product = steps.get(site.after)
        others = [read for read in product.reads if read != site.before] if product is not None else []
        number = others[0] if len(others) == 1 else None
    while number is not None:
        step = steps.get(number)
        kind = _kind(step)
        number = _only_input(graph, step) if step is not None and kind != "other" else None
        if step is not None and number is not None and kind in ("mixes", "norm"):
            yield from _weight_paths(graph, step, site.neurons)
            if kind == "mixes":
                return


def _weight_paths(graph: Graph, step: Step, neurons: int) -> Iterator[str]:
    """Yield the paths of the modules that hold a step's weights, if these have one row (or entry) per neuron."""
    for argument in (*step.args, *step.kwargs.values()):
        value = graph.values[argument.value] if isinstance(argument, TensorRef) else None
        if value is not None and value.name.rpartition(".")[2] in ("weight", "bias") and neurons in value.shape:
            yield value.name.rpartition(".")[0]
