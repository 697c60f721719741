"""Propagate intervals through a traced forward, and bound what each site's neurons can output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from neuronscope.arrays import BoolArray, FloatArray
from neuronscope.checkpoints.model.bounds.backward import RELU, tightened
from neuronscope.checkpoints.model.bounds.interval import Interval
from neuronscope.checkpoints.model.function_rules import OPERATORS
from neuronscope.checkpoints.model.traced_graph import Graph, Site, Step
from neuronscope.count.neuron_layout import NeuronLayout, neurons_first
from neuronscope.errors import UsageError

__all__ = ["Box", "SiteBounds", "box_ends", "is_positive_from", "is_zero_below_zero", "propagate_bounds", "site_bounds"]

#: Lower and upper bound of every element of the input: two numbers, or two tensors that broadcast to the input.
Box = tuple["float | Tensor", "float | Tensor"]


@dataclass(frozen=True, eq=False)
class SiteBounds:
    """Bounds of a site's ``N`` neurons that hold for every input."""

    source: str  # what the bound rests on; see ``neuronscope.checkpoints.model.bounds.interval``
    lowest: FloatArray  # lower bounds of the pre-activation, float64 ``(N,)``
    highest: FloatArray  # upper bounds of the pre-activation, float64 ``(N,)``
    output: FloatArray  # upper bounds of the output's absolute value, float64 ``(N,)``
    dead: BoolArray  # whether the output is exactly zero for every input, bool ``(N,)``


@torch.no_grad()
def propagate_bounds(graph: Graph, box: Box | None = None, *, backwards: bool = False) -> list[Interval | None]:
    """Return an interval for every tensor that depends on the input, by its number; ``None`` for constants.

    Args:
        graph: A traced forward.
        box: Bounds of the floating-point inputs; without it, nothing is assumed of them.
        backwards: Whether what each ReLU is given is bounded backwards too (:mod:`.backward`); the forward must be on
            two examples.

    Raises:
        UsageError: The box does not fit the input.
    """
    intervals: list[Interval | None] = [None] * len(graph.values)
    for number in graph.inputs:
        value = graph.values[number]
        intervals[number] = Interval.unknown(value.shape)
        if box is not None and value.dtype.is_floating_point:
            intervals[number] = Interval(*box_ends(box, value.shape), value.shape).cleaned()
    for step in graph.steps:
        if backwards and step.function in RELU and step.reads:
            intervals[step.reads[0]] = tightened(graph, intervals, step.reads[0])
        _pass_through(graph, step, intervals)
    return intervals


def box_ends(box: Box, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the lower and the upper bound of each element of an input, both float64 of its shape.

    Args:
        box: The bounds as the user gave them.
        shape: Shape of the input.

    Raises:
        UsageError: The box does not fit the input.
    """
    ends = [torch.as_tensor(end, dtype=torch.float64) for end in box]
    try:
        low, high = (end.expand(shape) for end in ends)
    except RuntimeError as error:
        shapes = [tuple(end.shape) for end in ends]
        raise UsageError(
            f"Expected argument `box` to be two numbers, or two tensors that broadcast to the input's {shape}, "
            f"but got shapes {shapes}."
        ) from error
    if not bool((low <= high).all()):
        raise UsageError("Expected argument `box` to be (low, high) with low ≤ high throughout, but got a low above.")
    return low, high


def _pass_through(graph: Graph, step: Step, intervals: list[Interval | None]) -> None:
    """Add the intervals of a step's outputs: unknown wherever there is any doubt."""
    values = [graph.values[number] for number in step.outputs]
    for number, value in zip(step.outputs, values, strict=True):
        intervals[number] = Interval.unknown(value.shape)
    rule = OPERATORS.get(step.function)
    if rule is None or not values or not values[0].dtype.is_floating_point:
        return

    def interval_or_constant(number: int) -> Interval | Tensor:
        value = graph.values[number]
        return intervals[number] or Interval.unknown(value.shape) if value.constant is None else value.constant.cpu()

    args, kwargs = step.arguments(interval_or_constant)
    try:
        made = rule.bounds(values[0].dtype, *args, **kwargs)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return
    bounds = made if isinstance(made, list) else [made]
    if len(bounds) == len(values):
        for number, value, bound in zip(step.outputs, values, bounds, strict=True):
            if value.dtype.is_floating_point:
                intervals[number] = _with_shape(bound, value.shape)


def _with_shape(interval: Interval, shape: tuple[int, ...]) -> Interval:
    """Return the interval with the tensor's actual shape, or an unknown one if the two do not fit."""
    for bound in (interval.low, interval.high):
        if bound.dim() != len(shape) or any(
            own not in (1, length) for own, length in zip(bound.shape, shape, strict=True)
        ):
            return Interval.unknown(shape)
    return replace(interval, shape=shape).cleaned()


def is_zero_below_zero(graph: Graph, site: Site) -> bool:
    """Whether a site's output is exactly zero wherever its pre-activation is not above zero.

    Args:
        graph: A traced forward.
        site: A call of a site in it.
    """
    result = _site_output(graph, site, -torch.inf, 0.0)
    return result is not None and bool(((result.low == 0) & (result.high == 0)).all())


def is_positive_from(graph: Graph, site: Site, lowest: float) -> bool:
    """Whether a site's output is above zero wherever its pre-activation is not below ``lowest``.

    Args:
        graph: A traced forward.
        site: A call of a site in it.
        lowest: The least pre-activation.
    """
    result = _site_output(graph, site, lowest, torch.inf)
    return result is not None and bool((result.low > 0).all())


@torch.no_grad()
def _site_output(graph: Graph, site: Site, low: float, high: float) -> Interval | None:
    """Return the interval of a site's output for pre-activations between two ends; ``None`` if it is not known."""
    before, after = graph.values[site.before], graph.values[site.after]
    if before.shape != after.shape:
        return None
    intervals: list[Interval | None] = [None] * len(graph.values)
    intervals[site.before] = Interval.between(low, high, before.shape)
    for step in graph.steps[graph.steps_until(site.before) : graph.steps_until(site.after)]:
        _pass_through(graph, step, intervals)
    return intervals[site.after]


def site_bounds(graph: Graph, intervals: list[Interval | None]) -> dict[str, SiteBounds]:
    """Return the bounds of each site that hold for all of its calls; sites of which nothing is known are left out.

    Args:
        graph: A traced forward.
        intervals: What :func:`propagate_bounds` gave for it.
    """
    bounds: dict[str, SiteBounds] = {}
    for name, calls in graph.calls.items():
        found = [_call_bounds(call, intervals[call.before], intervals[call.after]) for call in calls]
        known = [one for one in found if one is not None]
        if len(known) == len(found) and len({one.dead.size for one in known}) == 1:
            bounds[name] = SiteBounds(
                source=known[0].source,
                lowest=np.min([one.lowest for one in known], axis=0),
                highest=np.max([one.highest for one in known], axis=0),
                output=np.max([one.output for one in known], axis=0),
                dead=np.all([one.dead for one in known], axis=0),
            )
    return bounds


def _call_bounds(site: Site, before: Interval | None, after: Interval | None) -> SiteBounds | None:
    """Return the bounds of one call of a site, or ``None`` if nothing is known of it."""
    if before is None or after is None or len(after.shape) <= site.layout.axis:
        return None
    low, high = _by_neuron(after, site.layout)
    if not bool(((low > -torch.inf) | (high < torch.inf)).any()):
        return None
    if before.shape == after.shape:
        lowest, highest = _by_neuron(before, site.layout)
    else:  # GLU: the input has twice as many features as there are neurons
        lowest, highest = torch.full_like(low, -torch.inf), torch.full_like(high, torch.inf)
    dead = (low == 0) & (high == 0)
    output = torch.maximum(low.abs(), high.abs())
    return SiteBounds(before.source, lowest.numpy(), highest.numpy(), output.numpy(), dead.numpy())


def _by_neuron(interval: Interval, layout: NeuronLayout) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest bound of each neuron, both ``(N,)``."""
    if layout.dims is None:
        return interval.along(layout.axis)
    low, _ = neurons_first(interval.low.expand(interval.shape), *layout)
    high, _ = neurons_first(interval.high.expand(interval.shape), *layout)
    return low.amin(1), high.amax(1)
