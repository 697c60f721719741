"""Pass intervals through elementwise functions: activations, sums, products, choices.

Each rule has the signature of the torch function that it stands for, after the type that the network computes in. A
tensor that depends on the input comes as an :class:`Interval`, any other argument as it is; a rule returns ``None``
where it knows nothing. The output of a non-decreasing function is bounded by its values at the ends of the interval.
GELU, SiLU, Mish and Hardswish fall to one minimum and rise from there: their upper bound is their value at one of the
ends, and their lower bound is the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.model.bounds.interval import Interval, gamma, product, widened, widened_by_rounding
from neuronscope.checkpoints.model.traced_graph import substitute

__all__ = [
    "absolute",
    "add",
    "between",
    "divide",
    "divide_into",
    "falling_then_rising",
    "increasing",
    "leaky_relu",
    "masked_fill",
    "multiply",
    "negative",
    "power",
    "square",
    "subtract",
    "subtract_from",
    "threshold_function",
    "where",
    "with_positive_scales",
]

Rule = Callable[..., "Interval | None"]


def _is_constant(values: tuple[Any, ...]) -> bool:
    """Whether the arguments besides the input are plain numbers and constant tensors."""
    return not any(isinstance(value, Interval) for value in values)


def _as_rounded(dtype: torch.dtype, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the arguments as they are, and with each float rounded to float32 and to ``dtype``, as a kernel may."""
    yield args, kwargs
    for rounded in {torch.float32, dtype}:

        def round_float(leaf: Any, to: torch.dtype = rounded) -> Any:
            return torch.tensor(leaf, dtype=to).item() if isinstance(leaf, float) else leaf

        yield substitute((args, dict(kwargs)), round_float)


def increasing(function: Callable[..., Tensor], *, rounds: bool = True, floor: float = -math.inf) -> Rule:
    """Return the rule of a non-decreasing function of one tensor.

    Args:
        function: The function.
        rounds: Whether its result is rounded.
        floor: A number that the result is never below, however it is rounded.
    """

    def rule(dtype: torch.dtype, input: Any, *args: Any, **kwargs: Any) -> Interval | None:
        if not isinstance(input, Interval) or not _is_constant((*args, *kwargs.values())):
            return None
        kwargs.pop("inplace", None)
        ends = [
            (
                function(input.low, *rounded_args, **rounded_kwargs),
                function(input.high, *rounded_args, **rounded_kwargs),
            )
            for rounded_args, rounded_kwargs in _as_rounded(dtype, args, kwargs)
        ]
        low, high = _envelope(ends)
        if rounds:
            tiny = 2 * torch.finfo(dtype).tiny
            wider = widened_by_rounding(Interval(low, high, input.shape), dtype)
            low = torch.where(low == 0, low, wider.low - tiny).clamp_min(floor)
            high = torch.where(high == 0, high, wider.high + tiny)
        return Interval(low, high, input.shape)

    return rule


def _envelope(ends: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the lowest of the lower bounds and the highest of the upper bounds, each of one shape."""
    lows, highs = zip(*ends, strict=True)
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def with_positive_scales(rule: Rule) -> Rule:
    """Return the rule for the case that all numeric arguments are positive; otherwise nothing is known."""

    def checked(dtype: torch.dtype, input: Any, *args: Any, **kwargs: Any) -> Interval | None:
        scales = [number for number in (*args, *kwargs.values()) if not isinstance(number, bool)]
        return rule(dtype, input, *args, **kwargs) if all(scale > 0 for scale in scales) else None

    return checked


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

    def rule(dtype: torch.dtype, input: Any, *args: Any, **kwargs: Any) -> Interval | None:
        if not isinstance(input, Interval) or not _is_constant((*args, *kwargs.values())):
            return None
        kwargs.pop("inplace", None)
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

    return rule


def leaky_relu(
    dtype: torch.dtype, input: Any, slope: Any = 0.01, inplace: bool = False, **kwargs: Any
) -> Interval | None:
    """Bound LeakyReLU, which has one slope, and PReLU, which has one per channel.

    Args:
        dtype: The type that the network computes in.
        input: The interval of the input, ``(B, C, …)`` if there is a slope per channel.
        slope: Factor of negative values: a number, or a tensor ``(1,)`` or ``(C,)``.
        inplace: Ignored.
        kwargs: May hold the slope under the names that torch uses.
    """
    slope = kwargs.get("negative_slope", kwargs.get("weight", slope))
    if not isinstance(input, Interval) or isinstance(slope, Interval):
        return None
    if isinstance(slope, Tensor):
        slope = slope.detach().double()
        if slope.numel() > 1 and len(input.shape) > 1:
            slope = slope.view(1, -1, *(1 for _ in input.shape[2:]))
    else:
        slope = torch.tensor(float(slope), dtype=torch.float64)
    # For a slope of either sign, the extremes are at the ends, or at 0 where it lies between them.
    low, high = (torch.where(end >= 0, end, product(end, slope)) for end in (input.low, input.high))
    inside = torch.where((input.low < 0) & (input.high > 0), 0.0, high)
    ends = torch.broadcast_tensors(low, high, inside)
    return widened_by_rounding(Interval(torch.stack(ends).amin(0), torch.stack(ends).amax(0), input.shape), dtype)


def _bounds(dtype: torch.dtype, value: Any, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return the bounds of an operand, rounded as the network rounds it, with at least ``rank`` dimensions."""
    if isinstance(value, Interval):
        low, high = value.low, value.high
    elif isinstance(value, Tensor):
        low = high = value.detach().double()
    elif isinstance(value, (int, float)):
        low = high = torch.tensor(float(value), dtype=torch.float64)
    else:
        return None
    if not isinstance(value, Interval) and not torch.equal(low.to(dtype).double(), low):
        low, high = widened(low, high, gamma(0, dtype))  # a constant is rounded before it is used
    missing = (1,) * (rank - low.dim())
    return low.reshape((*missing, *low.shape)), high.reshape((*missing, *high.shape))


def _combine(
    dtype: torch.dtype, left: Any, right: Any, combine: Callable[..., tuple[Tensor, Tensor]]
) -> Interval | None:
    """Bound a function of two operands that are broadcast: ``combine`` maps their four bounds to the result's two."""
    rank = max((len(value.shape) for value in (left, right) if isinstance(value, (Interval, Tensor))), default=0)
    ends = _bounds(dtype, left, rank), _bounds(dtype, right, rank)
    if ends[0] is None or ends[1] is None:
        return None
    low, high = combine(*ends[0], *ends[1])
    shapes = [tuple(value.shape) for value in (left, right) if isinstance(value, (Interval, Tensor))]
    return widened_by_rounding(Interval(low, high, tuple(torch.broadcast_shapes(*shapes))), dtype)


def add(dtype: torch.dtype, left: Any, right: Any, *, alpha: float = 1) -> Interval | None:
    """Bound ``left + right``.

    Args:
        dtype: The type that the network computes in.
        left: An interval, tensor or number.
        right: An interval, tensor or number, broadcast against ``left``.
        alpha: Factor of ``right``; nothing is known unless it is 1.
    """
    return _combine(dtype, left, right, lambda a, b, c, d: (a + c, b + d)) if alpha == 1 else None


def subtract(dtype: torch.dtype, left: Any, right: Any, *, alpha: float = 1) -> Interval | None:
    """Bound ``left - right``.

    Args:
        dtype: The type that the network computes in.
        left: An interval, tensor or number.
        right: An interval, tensor or number, broadcast against ``left``.
        alpha: Factor of ``right``; nothing is known unless it is 1.
    """
    return _combine(dtype, left, right, lambda a, b, c, d: (a - d, b - c)) if alpha == 1 else None


def subtract_from(dtype: torch.dtype, left: Any, right: Any) -> Interval | None:
    """Bound ``right - left``: torch's reversed subtraction.

    Args:
        dtype: The type that the network computes in.
        left: An interval, tensor or number.
        right: An interval, tensor or number, broadcast against ``left``.
    """
    return subtract(dtype, right, left)


def _products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.stack(torch.broadcast_tensors(product(a, c), product(a, d), product(b, c), product(b, d)))
    return ends.amin(0), ends.amax(0)


def multiply(dtype: torch.dtype, left: Any, right: Any) -> Interval | None:
    """Bound ``left * right``; a tensor times itself is never negative.

    Args:
        dtype: The type that the network computes in.
        left: An interval, tensor or number.
        right: An interval, tensor or number, broadcast against ``left``.
    """
    if left is right and isinstance(left, Interval):
        return square(dtype, left)
    return _combine(dtype, left, right, _products)


def divide(dtype: torch.dtype, left: Any, right: Any, *, rounding_mode: str | None = None) -> Interval | None:
    """Bound ``left / right`` where the divisor cannot be zero.

    Args:
        dtype: The type that the network computes in.
        left: An interval, tensor or number.
        right: An interval, tensor or number, broadcast against ``left``.
        rounding_mode: Nothing is known unless it is ``None``.
    """
    ends = _bounds(dtype, right, 0)
    if rounding_mode is not None or ends is None or not bool(((ends[0] > 0) | (ends[1] < 0)).all()):
        return None  # the divisor may be zero

    def combine(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return _products(a, b, 1 / d, 1 / c)

    return _combine(dtype, left, right, combine)


def divide_into(dtype: torch.dtype, left: Any, right: Any) -> Interval | None:
    """Bound ``right / left``: torch's reversed division.

    Args:
        dtype: The type that the network computes in.
        left: An interval, tensor or number.
        right: An interval, tensor or number, broadcast against ``left``.
    """
    return divide(dtype, right, left)


def power(dtype: torch.dtype, left: Any, exponent: Any) -> Interval | None:
    """Bound ``left ** 2``; nothing is known of other exponents.

    Args:
        dtype: The type that the network computes in.
        left: An interval, tensor or number.
        exponent: The exponent.
    """
    return square(dtype, left) if isinstance(left, Interval) and exponent == 2 else None


def square(dtype: torch.dtype, x: Any) -> Interval | None:
    """Bound ``x ** 2``.

    Args:
        dtype: The type that the network computes in.
        x: The interval of the input, of any shape.
    """
    size = absolute(dtype, x)
    return None if size is None else widened_by_rounding(Interval(size.low**2, size.high**2, size.shape), dtype)


def absolute(dtype: torch.dtype, x: Any) -> Interval | None:
    """Bound ``|x|``.

    Args:
        dtype: The type that the network computes in.
        x: The interval of the input, of any shape.
    """
    if not isinstance(x, Interval):
        return None
    low, high = x.low.abs(), x.high.abs()
    least = torch.where((x.low <= 0) & (x.high >= 0), 0.0, torch.minimum(low, high))
    return Interval(least, torch.maximum(low, high), x.shape)


def negative(dtype: torch.dtype, x: Any) -> Interval | None:
    """Bound ``-x``.

    Args:
        dtype: The type that the network computes in.
        x: The interval of the input, of any shape.
    """
    return Interval(-x.high, -x.low, x.shape) if isinstance(x, Interval) else None


def between(low: float, high: float) -> Rule:
    """Return the rule of a function whose values always lie between two numbers.

    Args:
        low: The lower number.
        high: The upper number.
    """

    def rule(dtype: torch.dtype, input: Any, *args: Any, **kwargs: Any) -> Interval | None:
        if not isinstance(input, Interval):
            return None
        return widened_by_rounding(Interval.between(low, high, input.shape), dtype)

    return rule


def where(dtype: torch.dtype, condition: Any, left: Any, right: Any) -> Interval | None:
    """Bound a choice, element by element, between two operands.

    Args:
        dtype: The type that the network computes in.
        condition: Which elements come from ``left``.
        left: An interval, tensor or number.
        right: An interval, tensor or number, broadcast against ``left``.
    """

    def combine(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return torch.minimum(a, c), torch.maximum(b, d)

    found = _combine(dtype, left, right, combine)
    rank = len(condition.shape) if isinstance(condition, (Interval, Tensor)) else 0
    if found is None or rank <= len(found.shape):
        return found
    lead = (1,) * (rank - len(found.shape))
    low, high = found.low.reshape(*lead, *found.low.shape), found.high.reshape(*lead, *found.high.shape)
    return Interval(low, high, (*lead, *found.shape))


def masked_fill(dtype: torch.dtype, x: Any, mask: Any, value: Any) -> Interval | None:
    """Bound ``x`` where some elements are replaced by ``value``.

    Args:
        dtype: The type that the network computes in.
        x: The interval of the input, of any shape.
        mask: Which elements are replaced; broadcast to ``x``.
        value: The number that replaces them.
    """
    return where(dtype, mask, x, value)


def threshold_function(
    dtype: torch.dtype, input: Any, threshold: float, value: float, inplace: bool = False
) -> Interval | None:
    """Bound ``input`` where it is above the threshold, and ``value`` elsewhere.

    Args:
        dtype: The type that the network computes in.
        input: The interval of the input, of any shape.
        threshold: The threshold.
        value: The value below it.
        inplace: Ignored.
    """
    if not isinstance(input, Interval):
        return None
    ends = [_above_threshold(input, *numbers) for numbers, _ in _as_rounded(dtype, (threshold, value), {})]
    return Interval(*_envelope(ends), input.shape)


def _above_threshold(input: Interval, threshold: float, value: float) -> tuple[Tensor, Tensor]:
    """Return the bounds for one rounding of the two numbers."""
    kept_low, kept_high = input.low.clamp_min(threshold), input.high
    can_be_off, can_be_on = input.low <= threshold, input.high > threshold
    low = torch.where(
        can_be_off, torch.where(can_be_on, torch.minimum(kept_low, kept_low * 0 + value), value), kept_low
    )
    high = torch.where(can_be_on, torch.where(can_be_off, kept_high.clamp_min(value), kept_high), value)
    return low, high
