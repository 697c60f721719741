"""Intervals: a lower and an upper bound of every element of a tensor, for every input.

Bounds are float64 and rounded outward: an interval contains what the network would compute in exact arithmetic, and
what it computes in its own type, where sums of products may be added up in any order.

A computed sum of ``n`` terms is ``Σ tᵢ(1 + δᵢ)`` with ``|δᵢ| ≤ γ = n·u/(1 − n·u)``, ``u`` the unit roundoff (Higham,
*Accuracy and Stability of Numerical Algorithms*, 2002, ch. 3), so each term is widened before it is added.
:func:`gamma` is more than twice that, which covers our own rounding too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BACKWARD",
    "INTERVAL",
    "LAYER_NORM",
    "Interval",
    "NormalisedRows",
    "NotKnownError",
    "Rule",
    "gamma",
    "product",
    "rule",
    "widened",
    "widened_by_rounding",
]

#: Where a bound comes from, as in ``neuronscope.checkpoints.verdict.evidence.Evidence.source`` names them.
INTERVAL = "interval bound"
LAYER_NORM = "layer norm bound"
BACKWARD = "backward bound"


@dataclass(frozen=True, eq=False)
class NormalisedRows:
    """What is known of normalised rows: each is ``z·scale + shift`` with ``Σz² ≤ d`` over the last axis."""

    scale: Tensor  # float64 ``(d,)``
    shift: Tensor  # float64 ``(d,)``
    centred: bool  # whether also ``Σz = 0``, as in layer norm but not in RMS norm


@dataclass(frozen=True, eq=False)
class Interval:
    """Bounds of every element of one tensor.

    >>> Interval.between(0.0, 1.0, (2, 3)).low.shape
    torch.Size([1, 1])
    """

    #: Lower bounds, float64, with as many dimensions as the tensor; a dimension along which all bounds are equal may
    #: have size 1.
    low: Tensor
    high: Tensor  # upper bounds, of the same form
    shape: tuple[int, ...]  # the tensor's shape
    source: str = INTERVAL  # what the bounds rest on: ``INTERVAL``, ``LAYER_NORM`` or ``BACKWARD``
    normed: NormalisedRows | None = None  # what is known of whole rows, if they were normalised

    @classmethod
    def between(cls, low: float, high: float, shape: tuple[int, ...]) -> Interval:
        """Return an interval of a shape in which every element has the same two bounds.

        Args:
            low: The lower bound.
            high: The upper bound.
            shape: The tensor's shape.
        """
        ones = (1,) * len(shape)
        return cls(
            torch.full(ones, low, dtype=torch.float64), torch.full(ones, high, dtype=torch.float64), tuple(shape)
        )

    @classmethod
    def unknown(cls, shape: tuple[int, ...]) -> Interval:
        """Return an interval without bounds."""
        return cls.between(-torch.inf, torch.inf, shape)

    @property
    def full_low(self) -> Tensor:
        """Lower bounds, expanded to the tensor's shape."""
        return self.low.expand(self.shape)

    @property
    def full_high(self) -> Tensor:
        """Upper bounds, expanded to the tensor's shape."""
        return self.high.expand(self.shape)

    @property
    def is_never_negative(self) -> bool:
        """Whether no element is below zero."""
        return bool((self.low >= 0).all())

    def along(self, axis: int) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest bound of each index along ``axis``, both ``(shape[axis],)``."""
        others = [dimension for dimension in range(self.low.dim()) if dimension != axis]
        low = self.low.amin(others) if others else self.low
        high = self.high.amax(others) if others else self.high
        return low.expand(self.shape[axis]), high.expand(self.shape[axis])

    def cleaned(self) -> Interval:
        """Replace bounds that are NaN (∞ − ∞) by infinite ones, and reduce dimensions of equal bounds to size 1."""
        low = torch.nan_to_num(self.low, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        high = torch.nan_to_num(self.high, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        for dimension, length in enumerate(low.shape):
            if length > 1:
                first = low.narrow(dimension, 0, 1), high.narrow(dimension, 0, 1)
                if bool((low == first[0]).all()) and bool((high == first[1]).all()):
                    low, high = first
        return Interval(low, high, self.shape, self.source, self.normed)


#: Gives the interval of what a torch function returns, or one for each tensor. A rule takes the type that the network
#: computes in, and then the function's own arguments, under their names, whether it needs them or not: an interval for
#: each tensor that depends on the input, and any other argument as it is. It raises where it knows nothing, and where
#: the function was called in a way that it does not know.
Rule = Callable[..., "Interval | list[Interval]"]


class NotKnownError(ValueError):
    """A rule knows nothing of the output."""


def rule(bound: Callable[..., Interval]) -> Callable[..., Interval]:
    """Decorate the rule of a function of one tensor: its first argument depends on the input, and no other does.

    The rule is called only then, and without ``inplace``, which changes no number.
    """

    @wraps(bound)
    def checked(dtype: torch.dtype, *args: Any, **kwargs: Any) -> Interval:
        first, *others = (*args, *kwargs.values()) if args else (kwargs.pop("input"), *kwargs.values())
        if not isinstance(first, Interval) or any(isinstance(other, Interval) for other in others):
            raise NotKnownError
        kwargs.pop("inplace", None)
        return bound(dtype, first, *args[1:], **kwargs)

    return checked


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Return a bound on the relative rounding error of each term of a sum; ∞ if the type is too coarse for a bound.

    Args:
        terms: How many terms the sum has.
        dtype: The type that it is computed in.

    >>> gamma(100, torch.float32) < 2e-5
    True
    """
    error = (terms + 8) * torch.finfo(dtype).eps / 2
    return 2.5 * error / (1 - error) if error < 0.5 else torch.inf


def widened(low: Tensor, high: Tensor, relative: float) -> tuple[Tensor, Tensor]:
    """Move both bounds outward by a fraction of their size; exact zeros stay.

    Args:
        low: Lower bounds.
        high: Upper bounds, of any shape.
        relative: The fraction; may be ∞.
    """

    def margin(bound: Tensor) -> Tensor:
        return torch.where(bound == 0, 0.0, bound.abs() * relative)

    return low - margin(low), high + margin(high)


def widened_by_rounding(interval: Interval, dtype: torch.dtype) -> Interval:
    """Widen an interval for one rounding of the exact result.

    Args:
        interval: Bounds of the exact result.
        dtype: The type that it is rounded to.
    """
    low, high = widened(interval.low, interval.high, gamma(0, dtype))
    return Interval(low, high, interval.shape, interval.source, interval.normed)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply element by element, with 0 · ∞ = 0: zero times any finite number is zero.

    Args:
        left: Bounds of one factor.
        right: Bounds of the other, broadcast to the first.
    """
    return torch.where((left == 0) | (right == 0), 0.0, left * right)
