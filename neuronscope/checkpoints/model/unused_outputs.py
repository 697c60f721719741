"""Find the neurons that nothing reads: follow a traced forward backwards from what the network returned.

A neuron is unread if every weight that reads it is exactly zero, or belongs to a neuron that is proved dead or is
unread itself. The steps are visited in the reverse of the order in which they ran, so one pass finds all of them. A
call of an unknown function needs all of its inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neuronscope.arrays import BoolArray
from neuronscope.checkpoints.model.bounds.interval import Interval
from neuronscope.checkpoints.model.function_rules import OPERATORS
from neuronscope.checkpoints.model.needed_inputs import OutputsNeeded
from neuronscope.checkpoints.model.traced_graph import Graph, Step
from neuronscope.count.neuron_layout import neurons_first

__all__ = ["unread_neurons"]


def unread_neurons(graph: Graph, intervals: list[Interval | None]) -> dict[str, BoolArray]:
    """Return which neurons nothing reads after any call of a site, bool ``(N,)`` by site.

    Args:
        graph: A traced forward, of which every call was seen.
        intervals: What :func:`~neuronscope.checkpoints.model.bounds.propagate.propagate_bounds` gave for it: a reader
            whose output is the same number for every input reads nothing.
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
