"""Pass intervals through functions that move elements, choose among them, or add them up with positive weights.

Each of these functions is non-decreasing in every input, so the bounds of its output are what the function itself
makes of the bounds of its inputs: views, permutations, slices, concatenation, padding, pooling, means, sums,
interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuronscope.checkpoints.model.bounds.interval import (
    Interval,
    NotKnownError,
    Rule,
    gamma,
    rule,
    widened,
    widened_by_rounding,
)
from neuronscope.checkpoints.model.traced_graph import leaves, substitute

__all__ = ["dropout", "interpolate", "monotone", "same"]

_POSITIVE_MODES = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")
# Views that can leave the last axis as it is; what is known of whole rows then still holds.
_ROW_VIEWS = ("view", "reshape", "flatten", "unflatten", "expand", "repeat_interleave")


def same(*, keeps_rows: bool) -> Rule:
    """Return the rule of a function that returns its input, in the same type or in another one.

    With ``keeps_rows``, what is known of whole rows still holds, which assumes the rounding of one type.
    """

    def bound(dtype: torch.dtype, input: Interval, *args: Any, **kwargs: Any) -> Interval:
        return widened_by_rounding(input if keeps_rows else replace(input, normed=None), dtype)

    return bound


@rule
def dropout(dtype: torch.dtype, input: Interval, p: float = 0.5, training: bool = True, *args: Any) -> Interval:
    """Bound dropout in evaluation mode, where it returns its input."""
    if training:
        raise NotKnownError
    return widened_by_rounding(input, dtype)


def monotone(function: Callable[..., Any], *, rounds: bool = False) -> Rule:
    """Return the rule of a function that is non-decreasing in every input: call it on the bounds.

    Args:
        function: The function.
        rounds: Whether it adds elements up, which rounds.
    """

    def bound(dtype: torch.dtype, *args: Any, **kwargs: Any) -> list[Interval]:
        kwargs.pop("dtype", None)
        if any(isinstance(argument, torch.dtype) for argument in args):
            raise NotKnownError  # a view of the same bits as another type
        inputs = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Interval)]
        terms = max((math.prod(x.shape[1:]) for x in inputs), default=0)
        relative = gamma(terms, dtype) if rounds else 0.0
        lows, highs = (_call_on_bounds(function, args, kwargs, side, relative) for side in (0, 1))
        outputs = [Interval(low, high, tuple(low.shape)) for low, high in zip(lows, highs, strict=True)]
        if len({x.source for x in inputs}) == 1:
            outputs = [replace(output, source=inputs[0].source) for output in outputs]
        if function is F.pad:  # the number that it pads with is rounded
            outputs = [widened_by_rounding(output, dtype) for output in outputs]
        if len(inputs) == 1 and getattr(function, "__name__", "") in _ROW_VIEWS:
            before = inputs[0]
            outputs = [
                replace(output, normed=before.normed) if output.shape[-1:] == before.shape[-1:] else output
                for output in outputs
            ]
        return outputs

    return bound


def _call_on_bounds(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], side: int, relative: float
) -> list[Tensor]:
    """Call the function with each interval replaced by its lower (``side`` 0) or upper (1) bounds."""

    def end(leaf: Any) -> Any:
        if not isinstance(leaf, Interval):
            return leaf
        bound = (leaf.full_low, leaf.full_high)[side].contiguous()  # `view` may need contiguous memory
        return widened(bound, bound, relative)[side] if relative else bound

    args, kwargs = substitute((args, dict(kwargs)), end)
    result = function(*args, **kwargs)
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [part.double() for part in parts]


def interpolate(dtype: torch.dtype, *args: Any, **kwargs: Any) -> Interval | list[Interval]:
    """Bound an interpolation whose weights are all positive; bicubic interpolation has negative ones."""
    if (args[3] if len(args) > 3 else kwargs.get("mode", "nearest")) not in _POSITIVE_MODES:
        raise NotKnownError
    return monotone(F.interpolate, rounds=True)(dtype, *args, **kwargs)
