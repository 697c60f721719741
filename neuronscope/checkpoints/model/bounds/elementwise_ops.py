"""Pass intervals through elementwise functions: activations, sums, products, choices.

The output of a non-decreasing function is bounded by its values at the ends of the interval. GELU, SiLU, Mish and
Hardswish fall to one minimum and rise from there: their upper bound is their value at one of the ends, and their lower
bound is the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.model.bounds.interval import (
    Interval,
    NotKnownError,
    Rule,
    gamma,
    product,
    rule,
    widened,
    widened_by_rounding,
)
from neuronscope.checkpoints.model.traced_graph import substitute

__all__ = [
    "absolute",
    "add",
    "between",
    "divide",
    "falling_then_rising",
    "increasing",
    "leaky_relu",
    "masked_fill",
    "multiply",
    "negative",
    "power",
    "square",
    "subtract",
    "swapped",
    "threshold_function",
    "where",
]


def _as_rounded(dtype: torch.dtype, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the arguments as they are, and with each float rounded to float32 and to ``dtype``, as a kernel may."""
    yield args, kwargs
    for rounded in {torch.float32, dtype}:

        def round_float(leaf: Any, to: torch.dtype = rounded) -> Any:
            return torch.tensor(leaf, dtype=to).item() if isinstance(leaf, float) else leaf

        yield substitute((args, dict(kwargs)), round_float)


def increasing(
    function: Callable[..., Tensor], *, rounds: bool = True, floor: float = -math.inf, positive: bool = False
) -> Rule:
    """Return the rule of a non-decreasing function of one tensor.

    Args:
        function: The function.
        rounds: Whether its result is rounded.
        floor: A number that the result is never below, however it is rounded.
        positive: Whether it is non-decreasing only if all its numeric arguments are positive.
    """

    @rule
    def bound(dtype: torch.dtype, input: Interval, *args: Any, **kwargs: Any) -> Interval:
        if positive and not all(scale > 0 for scale in (*args, *kwargs.values()) if not isinstance(scale, bool)):
            raise NotKnownError
        low, high = _envelope(
            (function(input.low, *rounded, **named), function(input.high, *rounded, **named))
            for rounded, named in _as_rounded(dtype, args, kwargs)
        )
        if rounds:
            tiny = 2 * torch.finfo(dtype).tiny
            wider = widened_by_rounding(Interval(low, high, input.shape), dtype)
            low = torch.where(low == 0, low, wider.low - tiny).clamp_min(floor)
            high = torch.where(high == 0, high, wider.high + tiny)
        return Interval(low, high, input.shape)

    return bound


def _envelope(ends: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the lowest of the lower bounds and the highest of the upper bounds, each of one shape."""
    lows, highs = zip(*ends, strict=True)
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def falling_then_rising(
    function: Callable[..., Tensor], least: float, zero_below: float, *, only_short: bool = True
) -> Rule:
    """Return the rule of a function that falls from 0 to its minimum and rises from there.

    Args:
        function: The function.
        least: A number below its minimum.
        zero_below: At and below this input the result is exactly zero, however it is computed.
        only_short: Whether that holds in types of 16 and 32 bits only.
    """

    @rule
    def bound(dtype: torch.dtype, input: Interval, *args: Any, **kwargs: Any) -> Interval:
        low, high = (
            torch.where(torch.isinf(end), end.clamp_min(0), function(end, *args, **kwargs))
            for end in (input.low, input.high)
        )
        wider = widened_by_rounding(Interval(low, torch.maximum(low, high), input.shape), dtype)
        tiny = 2 * torch.finfo(dtype).tiny
        low = torch.where(input.low >= 0, wider.low - tiny, least)
        high = wider.high + tiny
        if dtype != torch.float64 or not only_short:
            zero = input.high <= zero_below
            low, high = torch.where(zero, 0.0, low), torch.where(zero, 0.0, high)
        return Interval(low, high, input.shape)

    return bound


@rule
def leaky_relu(
    dtype: torch.dtype, input: Interval, negative_slope: Any = 0.01, *args: Any, weight: Tensor | None = None
) -> Interval:
    """Bound LeakyReLU, which has one slope, and PReLU, whose weight has one, ``(1,)``, or one for each channel."""
    slope = torch.as_tensor(negative_slope if weight is None else weight, dtype=torch.float64).detach()
    if slope.numel() > 1 and len(input.shape) > 1:
        slope = slope.view(1, -1, *(1 for _ in input.shape[2:]))
    # For a slope of either sign, the extremes are at the ends, or at 0 where it lies between them.
    low, high = (torch.where(end >= 0, end, product(end, slope)) for end in (input.low, input.high))
    inside = torch.where((input.low < 0) & (input.high > 0), 0.0, high)
    ends = torch.stack(torch.broadcast_tensors(low, high, inside))
    return widened_by_rounding(Interval(ends.amin(0), ends.amax(0), input.shape), dtype)


def _bounds(dtype: torch.dtype, value: Any, rank: int) -> tuple[Tensor, Tensor]:
    """Return the bounds of an operand, rounded as the network rounds it, with at least ``rank`` dimensions."""
    if isinstance(value, Interval):
        low, high = value.low, value.high
    elif not isinstance(value, (Tensor, int, float)):
        raise NotKnownError
    else:
        low = high = torch.as_tensor(value, dtype=torch.float64).detach()
        if not torch.equal(low.to(dtype).double(), low):
            low, high = widened(low, high, gamma(0, dtype))  # a constant is rounded before it is used
    missing = (1,) * (rank - low.dim())
    return low.reshape((*missing, *low.shape)), high.reshape((*missing, *high.shape))


def _of_two(combine: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Interval]:
    """Return the rule of a function of two operands that are broadcast; ``combine`` makes its bounds of theirs."""

    def bound(dtype: torch.dtype, left: Any, right: Any, *, alpha: float = 1, rounding_mode: Any = None) -> Interval:
        if alpha != 1 or rounding_mode is not None:
            raise NotKnownError
        shapes = [tuple(value.shape) for value in (left, right) if isinstance(value, (Interval, Tensor))]
        rank = max(map(len, shapes))
        low, high = combine(*_bounds(dtype, left, rank), *_bounds(dtype, right, rank))
        return widened_by_rounding(Interval(low, high, tuple(torch.broadcast_shapes(*shapes))), dtype)

    return bound


def _products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.stack(torch.broadcast_tensors(product(a, c), product(a, d), product(b, c), product(b, d)))
    return ends.amin(0), ends.amax(0)


def _quotients(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(((c > 0) | (d < 0)).all()):
        raise NotKnownError  # the divisor may be zero
    return _products(a, b, 1 / d, 1 / c)


add = _of_two(lambda a, b, c, d: (a + c, b + d))
subtract = _of_two(lambda a, b, c, d: (a - d, b - c))
divide = _of_two(_quotients)
_multiply = _of_two(_products)
_either = _of_two(lambda a, b, c, d: (torch.minimum(a, c), torch.maximum(b, d)))


def swapped(bound: Rule) -> Rule:
    """Return the rule of torch's reversed function, whose operands are in the other order."""
    return lambda dtype, left, right: bound(dtype, right, left)


def multiply(dtype: torch.dtype, left: Any, right: Any) -> Interval:
    """Bound ``left * right``; a tensor times itself is never negative."""
    return square(dtype, left) if left is right else _multiply(dtype, left, right)


@rule
def power(dtype: torch.dtype, input: Interval, exponent: Any) -> Interval:
    """Bound ``input ** 2``; nothing is known of other exponents."""
    if exponent != 2:
        raise NotKnownError
    return square(dtype, input)


@rule
def square(dtype: torch.dtype, input: Interval) -> Interval:
    """Bound ``input ** 2``."""
    size = absolute(dtype, input)
    return widened_by_rounding(Interval(size.low**2, size.high**2, size.shape), dtype)


@rule
def absolute(dtype: torch.dtype, input: Interval) -> Interval:
    """Bound ``|input|``."""
    low, high = input.low.abs(), input.high.abs()
    least = torch.where((input.low <= 0) & (input.high >= 0), 0.0, torch.minimum(low, high))
    return Interval(least, torch.maximum(low, high), input.shape)


@rule
def negative(dtype: torch.dtype, input: Interval) -> Interval:
    """Bound ``-input``."""
    return Interval(-input.high, -input.low, input.shape)


def between(low: float, high: float) -> Rule:
    """Return the rule of a function whose values always lie between two numbers.

    Args:
        low: The lower number.
        high: The upper number.
    """

    @rule
    def bound(dtype: torch.dtype, input: Interval, *args: Any, **kwargs: Any) -> Interval:
        return widened_by_rounding(Interval.between(low, high, input.shape), dtype)

    return bound


def where(dtype: torch.dtype, condition: Interval | Tensor, left: Any, right: Any) -> Interval:
    """Bound a choice, element by element, between two operands."""
    found = _either(dtype, left, right)
    lead = (1,) * (len(condition.shape) - len(found.shape))
    low, high = found.low.reshape(*lead, *found.low.shape), found.high.reshape(*lead, *found.high.shape)
    return Interval(low, high, (*lead, *found.shape))


def masked_fill(dtype: torch.dtype, input: Any, mask: Interval | Tensor, value: Any) -> Interval:
    """Bound ``input`` where a mask, which is broadcast to it, replaces some elements by ``value``."""
    return where(dtype, mask, input, value)


@rule
def threshold_function(dtype: torch.dtype, input: Interval, threshold: float, value: float, *args: Any) -> Interval:
    """Bound ``input`` where it is above the threshold, and ``value`` elsewhere."""
    rounded = _as_rounded(dtype, (threshold, value), {})
    return Interval(*_envelope(_above_threshold(input, *numbers) for numbers, _ in rounded), input.shape)


def _above_threshold(input: Interval, threshold: float, value: float) -> tuple[Tensor, Tensor]:
    """Return the bounds for one rounding of the two numbers."""
    kept_low, kept_high = input.low.clamp_min(threshold), input.high
    can_be_off, can_be_on = input.low <= threshold, input.high > threshold
    low = torch.where(
        can_be_off, torch.where(can_be_on, torch.minimum(kept_low, kept_low * 0 + value), value), kept_low
    )
    high = torch.where(can_be_on, torch.where(can_be_off, kept_high.clamp_min(value), kept_high), value)
    return low, high
