"""Bounds: walks a traced forward with intervals, and says of each site's neurons what they can give at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuronscope.checkpoints.model.bounds.elementwise_ops import ELEMENTWISE_RULES
from neuronscope.checkpoints.model.bounds.interval import Interval
from neuronscope.checkpoints.model.bounds.shape_ops import LAYOUT_RULES
from neuronscope.checkpoints.model.bounds.weighted_ops import WEIGHTED_RULES
from neuronscope.checkpoints.model.traced_graph import Graph, Ref, Step, substitute
from neuronscope.errors import UsageError

__all__ = ["Box", "SiteBounds", "bounds_of", "site_bounds"]

#: Between which numbers every element of the input lies: two numbers, or two tensors that broadcast to it.
Box = tuple["float | Tensor", "float | Tensor"]

_RULES: Mapping[Callable[..., Any], Callable[..., Any]] = {**LAYOUT_RULES, **ELEMENTWISE_RULES, **WEIGHTED_RULES}


@dataclass(frozen=True, eq=False)
class SiteBounds:
    """What the neurons of a site can give, whatever the input (``N`` neurons).

    Attributes:
        ground: What the bound rests on; see :mod:`neuronscope.checkpoints.model.bounds.interval`.
        lowest: Lower bounds of the pre-activation, float64 ``(N,)``.
        highest: Upper bounds of the pre-activation, float64 ``(N,)``.
        dead: Whether the output is exactly zero throughout, bool ``(N,)``.
    """

    ground: str
    lowest: npt.NDArray[np.float64]
    highest: npt.NDArray[np.float64]
    dead: npt.NDArray[np.bool_]


@torch.no_grad()
def bounds_of(graph: Graph, box: Box | None = None) -> list[Interval | None]:
    """An interval for every tensor that depends on the input.

    Args:
        graph: A traced forward.
        box: Of the floating inputs; without it nothing is known of them.

    Returns:
        By number; ``None`` for constants.

    Raises:
        UsageError: The box does not fit the input.
    """
    found: list[Interval | None] = [None] * len(graph.values)
    for number in graph.inputs:
        found[number] = _input(graph, number, box)
    for step in graph.steps:
        for number, interval in zip(step.outputs, _through(graph, step, found), strict=True):
            found[number] = interval
    return found


def _input(graph: Graph, number: int, box: Box | None) -> Interval:
    value = graph.values[number]
    if box is None or not value.dtype.is_floating_point:
        return Interval.unknown(value.shape)
    ends = [torch.as_tensor(end, dtype=torch.float64) for end in box]
    try:
        low, high = (end.expand(value.shape) for end in ends)
    except RuntimeError as error:
        shapes = [tuple(end.shape) for end in ends]
        raise UsageError(
            f"Expected argument `box` to be two numbers, or two tensors that broadcast to the input's {value.shape}, "
            f"but got shapes {shapes}."
        ) from error
    if not bool((low <= high).all()):
        raise UsageError("Expected argument `box` to be (low, high) with low ≤ high throughout, but got a low above.")
    return Interval(low, high, value.shape).sound()


def _through(graph: Graph, step: Step, found: list[Interval | None]) -> list[Interval]:
    """The intervals of what a step gives: unknown wherever there is any doubt."""
    values = [graph.values[number] for number in step.outputs]
    unknown = [Interval.unknown(value.shape) for value in values]
    rule = _RULES.get(step.function)
    if rule is None or not values or not values[0].dtype.is_floating_point:
        return unknown

    def given(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        constant = graph.values[leaf.value].constant
        if constant is not None:
            return constant.cpu()
        return found[leaf.value] or Interval.unknown(graph.values[leaf.value].shape)

    args, kwargs = substitute((step.args, dict(step.kwargs)), given)
    try:
        made = rule(values[0].dtype, *args, **kwargs)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return unknown  # called in a way that we do not know: nothing is said, nothing is wrong
    intervals = list(made) if isinstance(made, (tuple, list)) else [made]
    if len(intervals) != len(values):
        return unknown
    return [
        _fitted(interval, value.shape) if interval is not None and value.dtype.is_floating_point else nothing
        for interval, value, nothing in zip(intervals, values, unknown, strict=True)
    ]


def _fitted(interval: Interval, shape: tuple[int, ...]) -> Interval:
    """The interval in the shape that the tensor really has."""
    for bound in (interval.low, interval.high):
        if bound.dim() != len(shape) or any(
            own not in (1, length) for own, length in zip(bound.shape, shape, strict=True)
        ):
            return Interval.unknown(shape)
    return replace(interval, shape=shape).sound()


def site_bounds(graph: Graph, found: list[Interval | None]) -> dict[str, SiteBounds]:
    """What each site's neurons can give, by the site's name; sites of which nothing is known are left out.

    Args:
        graph: A traced forward.
        found: What :func:`bounds_of` gave for it.
    """
    bounds: dict[str, SiteBounds] = {}
    for site in graph.sites:
        before, after = found[site.before], found[site.after]
        if before is None or after is None or len(after.shape) <= site.info.axis:
            continue
        low, high = after.along(site.info.axis)
        if before.shape[site.info.axis : site.info.axis + 1] == (site.neurons,):
            lowest, highest = before.along(site.info.axis)
        else:  # halves (GLU): what goes in has twice the neurons
            lowest, highest = torch.full_like(low, -torch.inf), torch.full_like(high, torch.inf)
        if bool(((low > -torch.inf) | (high < torch.inf)).any()):
            dead = (low == 0) & (high == 0)
            bounds[site.name] = SiteBounds(before.ground, lowest.numpy(), highest.numpy(), dead.numpy())
    return bounds
