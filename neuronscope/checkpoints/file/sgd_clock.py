r"""Estimate how many steps ago a row got its last gradient, from SGD's momentum buffer.

Without gradients and weight decay, a momentum buffer shrinks by the factor μ (the momentum) per step. Unlike Adam, SGD
keeps no second mean to compare it with. A row's buffer is therefore compared with the largest of its layer: this gives
an estimate, not a bound. Living rows of one layer usually differ by a factor of ten; a row without gradient shrinks by
ten in 22 steps at μ = .9.

Weight decay λ adds λw to the gradient. Without a gradient of the loss, all pairs (weight, buffer) of a row then follow
the same linear map, whatever the learning rates are. What remains of the last gradients shrinks by about μ per step, so
that the buffer becomes ``c w``, with one number ``c ≈ λ (1 − dampening) / (1 − μ)`` for the whole row. So the clock is
read from the part of the buffer that is not a multiple of the weights. It ends where this part is as small as rounding
makes it: relative to the buffer, each of the last 1 / (1 − μ) steps adds a few roundings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from neuronscope.checkpoints.file.adam_clock import FASTEST_FADING, SILENT_FOLDS, Clock, ClockReading, by_chunks

__all__ = ["SILENT_FOLDS_BELOW_LARGEST", "BufferPeaks", "SGDClock"]

#: A row counts as without gradient if it is this many e-foldings below its layer's largest, and for 80 steps. Adam's
#: rows must be farther below the supremum, since living rows are far below it themselves.
SILENT_FOLDS_BELOW_LARGEST = 5.0
#: Roundings of a decayed buffer per step that it averages. Of 629 rows that were silent for 200 steps and more, all had
#: less than 1, and .6 % of 6,741 living ones less than 1.5.
_ROUNDINGS = 1.5
#: ``c`` is looked for within this factor of ``λ (1 − dampening) / (1 − μ)``: learning rates move it a little.
_RANGE = 2.0
#: A buffer this many times smaller than weight decay makes it was not made by this rule.
_FAR_BELOW = 100.0


class BufferPeaks(NamedTuple):
    """The largest absolute value in each row of a momentum buffer, without what weight decay alone puts there."""

    rows: Tensor  # ``max |buffer|`` of each row, float64 ``(N,)``; NaN or infinite if the row contains such an element
    least: Tensor  # the smallest such number that can be told from rounding, float64 ``(N,)``
    zero: Tensor  # true if the whole row of the buffer is exactly zero, bool ``(N,)``
    unknown: Tensor  # true if the row shows nothing, bool ``(N,)``

    @classmethod
    def of(cls, buffer: Tensor) -> BufferPeaks:
        """Return the peaks of a buffer ``(N, F)`` without weight decay."""
        rows = buffer.abs().amax(dim=1).double()
        least = torch.full_like(rows, 2.0 * torch.finfo(buffer.dtype).tiny)
        return cls(rows, least, rows == 0, torch.zeros_like(rows, dtype=torch.bool))

    @classmethod
    def of_decayed(cls, buffer: Tensor, weight: Tensor, decay: float, clock: SGDClock) -> BufferPeaks:
        """Return the peaks of a buffer with weight decay.

        Args:
            buffer: The momentum buffer, ``(N, F)``.
            weight: The weights that it belongs to, ``(N, F)``.
            decay: λ (1 − dampening), above 0.
            clock: The optimizer's clock.
        """
        return cls(*by_chunks(partial(cls._of_decayed, decay, clock), buffer, weight))

    @classmethod
    def _of_decayed(cls, decay: float, clock: SGDClock, buffer: Tensor, weight: Tensor) -> BufferPeaks:
        plain = cls.of(buffer)
        b, w = buffer.double(), weight.double()
        low, high = (decay / (1.0 - momentum) for momentum in (clock.least, clock.momentum))
        square = w.square().sum(dim=1)
        factor = torch.where(square > 0, (b * w).sum(dim=1) / square, 0.0).clamp(low / _RANGE, high * _RANGE)
        rows = (b - factor[:, None] * w).abs().amax(dim=1)
        epsilon = max(torch.finfo(buffer.dtype).eps, torch.finfo(weight.dtype).eps)
        least = plain.least + plain.rows * epsilon * _ROUNDINGS / (1.0 - clock.momentum)
        # A single number is always a multiple of another one.
        informative = ((b != 0) | (w != 0)).sum(dim=1) > 1
        not_by_this_rule = plain.rows * _FAR_BELOW < low * w.abs().amax(dim=1)
        return cls(rows, least, plain.zero, ~informative | not_by_this_rule)

    def join(self, other: BufferPeaks) -> BufferPeaks:
        """Return the peaks of the same rows with further elements (a weight's rows and the bias)."""
        first, second = (torch.where(part.unknown, 0.0, part.rows) for part in (self, other))
        return BufferPeaks(
            torch.maximum(first, second),
            torch.maximum(self.least, other.least),
            self.zero & other.zero,
            self.unknown & other.unknown,
        )

    def repeat(self, rows: int) -> BufferPeaks:
        """Return the peaks of so many rows, each with this one's."""
        return BufferPeaks(*(one.repeat(rows) for one in self))

    @property
    def largest(self) -> float:
        """The largest peak that can be told from rounding; 0 if all peaks are smaller."""
        shown = torch.isfinite(self.rows) & (self.rows >= self.least) & ~self.unknown
        return float(self.rows[shown].max()) if shown.any() else 0.0


@dataclass(frozen=True)
class SGDClock(Clock):
    """Estimates the steps since the last gradient of parameters that SGD with momentum updates.

    Args:
        momentum: μ, in (0, 1); the largest one if a schedule cycles it.
        least_momentum: The least momentum, if a schedule cycles it; ``None`` = ``momentum``.

    >>> round(SGDClock(0.9).silent_steps), round(SGDClock(0.95).silent_steps)
    (80, 97)
    """

    momentum: float
    least_momentum: float | None = None

    silent_folds = SILENT_FOLDS_BELOW_LARGEST
    unknown_reason = (
        "weight decay is part of their momentum buffers, and the rest is too small or too short to be told from it"
    )

    @property
    def least(self) -> float:
        """The least momentum."""
        return self.momentum if self.least_momentum is None else self.least_momentum

    @property
    def rate(self) -> float:
        """The number of e-foldings by which a buffer shrinks in a step without gradient, at least."""
        return -math.log(self.momentum)

    @property
    def fastest_rate(self) -> float:
        """The same, at most."""
        return -math.log(self.least)

    def read_layer(self, layer: BufferPeaks, largest: float) -> ClockReading:
        """Read the clock of one layer.

        Args:
            layer: The peaks of its rows.
            largest: The largest peak of all layers. A layer far below it gets no gradient as a whole, and is compared
                with it.
        """
        reference = largest if layer.largest < largest * math.exp(-SILENT_FOLDS) else layer.largest
        finite = torch.isfinite(layer.rows)
        decaying = finite & (layer.rows >= layer.least)
        steps = torch.where(decaying, torch.log(reference / layer.rows) / self.rate, torch.inf).round().clamp(min=0.0)
        never = layer.zero & (self.momentum > FASTEST_FADING)
        end = (torch.log(layer.least.clamp(min=reference) / layer.least) / self.rate).floor()
        faded = ~decaying & ~never & finite
        unknown = ~never & finite & (layer.unknown | (faded & (end * self.rate <= SILENT_FOLDS)))
        return ClockReading(
            steps=torch.where(unknown, torch.inf, steps),
            least_steps=torch.where(faded & ~unknown, end, torch.nan),
            never=never,
            not_finite=~finite,
            unknown=unknown,
        )
