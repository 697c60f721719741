"""Intervals: between which two numbers every element of a tensor lies, whatever the input.

Bounds are float64 and outward: an interval holds not only what the network would give in exact arithmetic but what it
gives in its own, where sums of products may be added up in any order. A computed sum of ``n`` terms is ``Σ tᵢ(1 +
δᵢ)`` with ``|δᵢ| ≤ γ = n·u/(1 − n·u)``, ``u`` the unit roundoff (Higham, *Accuracy and Stability of Numerical
Algorithms*, 2002, ch. 3), so that each term is widened before it is added. :func:`gamma` takes more than twice that,
which pays for our own rounding too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "INTERVAL",
    "LAYER_NORM",
    "Interval",
    "NormalisedRows",
    "gamma",
    "product",
    "unit_roundoff",
    "widened",
    "widened_by_rounding",
]

#: Grounds of a bound, as :attr:`neuronscope.checkpoints.verdict.evidence.Evidence.source` names them.
INTERVAL = "interval bound"
LAYER_NORM = "layer norm bound"


@dataclass(frozen=True, eq=False)
class NormalisedRows:
    """An elementwise affine image of normalised rows: ``z·scale + shift`` with ``Σz² ≤ d`` over the last axis.

    Attributes:
        scale: float64 ``(d,)``.
        shift: float64 ``(d,)``.
        centred: Whether ``Σz = 0`` too: layer norm, not RMS norm.
    """

    scale: Tensor
    shift: Tensor
    centred: bool


@dataclass(frozen=True, eq=False)
class Interval:
    """Bounds of every element of one tensor.

    Attributes:
        low: Lower bounds, float64, of the tensor's rank; a dimension along which all are equal may be 1.
        high: Upper bounds, likewise.
        shape: The tensor's shape.
        ground: :data:`INTERVAL` or :data:`LAYER_NORM`.
        normed: What is known of its rows as a whole, if anything.

    >>> Interval.between(0.0, 1.0, (2, 3)).low.shape
    torch.Size([1, 1])
    """

    low: Tensor
    high: Tensor
    shape: tuple[int, ...]
    source: str = INTERVAL
    normed: NormalisedRows | None = None

    @classmethod
    def between(cls, low: float, high: float, shape: tuple[int, ...]) -> Interval:
        """Every element lies between these two."""
        ones = (1,) * len(shape)
        return cls(
            torch.full(ones, low, dtype=torch.float64), torch.full(ones, high, dtype=torch.float64), tuple(shape)
        )

    @classmethod
    def unknown(cls, shape: tuple[int, ...]) -> Interval:
        """Nothing is known of any element."""
        return cls.between(-torch.inf, torch.inf, shape)

    @classmethod
    def exactly(cls, tensor: Tensor) -> Interval:
        """Every element is what it is in ``tensor``."""
        wide = tensor.detach().to("cpu", torch.float64)
        return cls(wide, wide, tuple(tensor.shape))

    @property
    def full_low(self) -> Tensor:
        """Lower bounds in the tensor's own shape."""
        return self.low.expand(self.shape)

    @property
    def full_high(self) -> Tensor:
        """Upper bounds in the tensor's own shape."""
        return self.high.expand(self.shape)

    @property
    def is_known(self) -> bool:
        """Whether anything at all is known."""
        return self.normed is not None or bool(((self.low > -torch.inf) | (self.high < torch.inf)).any())

    def along(self, axis: int) -> tuple[Tensor, Tensor]:
        """Lowest and highest bound of each index along ``axis``, both ``(shape[axis],)``."""
        others = [dimension for dimension in range(self.low.dim()) if dimension != axis]
        low = self.low.amin(others) if others else self.low
        high = self.high.amax(others) if others else self.high
        return low.expand(self.shape[axis]), high.expand(self.shape[axis])

    def cleaned(self) -> Interval:
        """The same, where a bound that came out as NaN (∞ − ∞, say) bounds nothing, and equal dimensions are 1."""
        low = torch.nan_to_num(self.low, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        high = torch.nan_to_num(self.high, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        for dimension, length in enumerate(low.shape):
            if length > 1:
                first = low.narrow(dimension, 0, 1), high.narrow(dimension, 0, 1)
                if bool((low == first[0]).all()) and bool((high == first[1]).all()):
                    low, high = first
        return Interval(low, high, self.shape, self.source, self.normed)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of a floating type: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype) -> float:
    """By how much, relatively, each term of a sum may come out wrong; ∞ where the type is too coarse to say.

    >>> gamma(100, torch.float32) < 2e-5
    True
    """
    error = (terms + 8) * unit_roundoff(dtype)
    return 2.5 * error / (1 - error) if error < 0.5 else torch.inf


def widened(low: Tensor, high: Tensor, relative: float) -> tuple[Tensor, Tensor]:
    """Both bounds moved outward by a share of their size; exact zeros stay."""
    return low - _share(low, relative), high + _share(high, relative)


def _share(bound: Tensor, relative: float) -> Tensor:
    return torch.where(bound == 0, 0.0, bound.abs() * relative)


def widened_by_rounding(interval: Interval, dtype: torch.dtype) -> Interval:
    """After an operation that rounds its exact result: a few units wider."""
    low, high = widened(interval.low, interval.high, gamma(0, dtype))
    return Interval(low, high, interval.shape, interval.source, interval.normed)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Elementwise product where 0 · ∞ is 0: an element that is zero stays zero whatever finite number it meets."""
    return torch.where((left == 0) | (right == 0), 0.0, left * right)
