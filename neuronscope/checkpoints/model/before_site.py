"""Find what a traced forward computed right before an activation site."""

from __future__ import annotations

from neuronscope.checkpoints.model.function_rules import OPERATORS
from neuronscope.checkpoints.model.traced_graph import Graph, Site, Step

__all__ = ["normalised_sites", "step_before_copies"]


def normalised_sites(graph: Graph) -> set[str]:
    """Return the names of the sites with a normalisation before their activation or before their layer's weights.

    >>> from torch import nn, zeros
    >>> from neuronscope.checkpoints.model.trace import trace
    >>> network = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    >>> normalised_sites(trace(network, (zeros(1, 3),)))
    {'1/relu'}
    """
    others = {site.name for site in graph.sites if not _is_normalised(graph, site)}
    return {site.name for site in graph.sites} - others


def _is_normalised(graph: Graph, site: Site) -> bool:
    layers = 0
    number: int | None = site.before
    while number is not None and layers < 2:
        kind = _kind(graph.producers.get(number))
        if kind == "norm":
            return True
        layers += kind == "mixes"
        inputs = [] if kind == "other" else graph.variable_inputs(graph.producers[number])
        number = inputs[0] if len(inputs) == 1 else None
    return False


def _kind(step: Step | None) -> str:
    """Return what a step does to neurons: the ``kind`` of its operator's rule, or ``other``."""
    rule = OPERATORS.get(step.function) if step is not None else None
    return "other" if rule is None else rule.kind


def step_before_copies(graph: Graph, number: int) -> Step | None:
    """Return the step that computed a tensor, before copies, casts and dropout.

    Args:
        graph: A traced forward.
        number: The tensor's number.
    """
    step = graph.producers.get(number)
    while step is not None and _kind(step) == "same" and step.reads:
        step = graph.producers.get(step.reads[0])
    return step
