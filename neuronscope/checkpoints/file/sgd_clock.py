"""Estimate how many steps ago a row got its last gradient, from SGD's momentum buffer.

Without gradients and weight decay, a momentum buffer shrinks by the factor μ (the momentum) per step. Unlike Adam, SGD
keeps no second mean to compare it with. A row's buffer is therefore compared with the largest of its layer: this gives
an estimate, not a bound. Living rows of one layer usually differ by a factor of ten; a row without gradient shrinks by
ten in 22 steps at μ = .9.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neuronscope.checkpoints.file.adam_clock import SILENT_FOLDS, SURE_FOLDS, ClockReading

__all__ = ["BufferPeaks", "SGDClock"]


@dataclass(frozen=True)
class BufferPeaks:
    """The largest absolute value in each row of a momentum buffer.

    Attributes:
        rows: ``max |buffer|`` of each row, float64 ``(N,)``; NaN or infinite if the row contains such an element.
        least: The smallest number of the buffer's dtype that still decays by the full factor.
    """

    rows: Tensor
    least: float

    @classmethod
    def of(cls, buffer: Tensor) -> BufferPeaks:
        """Return the peaks of a buffer ``(N, F)``."""
        return cls(buffer.abs().amax(dim=1).double(), 2.0 * torch.finfo(buffer.dtype).tiny)

    def join(self, other: BufferPeaks) -> BufferPeaks:
        """Return the peaks of the same rows with further elements (a weight's rows and the bias)."""
        return BufferPeaks(torch.maximum(self.rows, other.rows), max(self.least, other.least))


@dataclass(frozen=True)
class SGDClock:
    """Estimates the steps since the last gradient of parameters that SGD with momentum updates.

    Args:
        momentum: μ, in (0, 1).

    >>> round(SGDClock(0.9).silent_steps)
    80
    """

    momentum: float

    @property
    def rate(self) -> float:
        """The number of e-foldings by which a buffer shrinks in a step without gradient."""
        return -math.log(self.momentum)

    @property
    def silent_steps(self) -> float:
        """The estimate above which a row counts as without gradient, in steps."""
        return SILENT_FOLDS / self.rate

    @property
    def sure_steps(self) -> float:
        """The estimate above which this is inferred and not only suspected, in steps."""
        return SURE_FOLDS / self.rate

    def read(self, peaks: Mapping[str, BufferPeaks]) -> dict[str, ClockReading]:
        """Read the clock of all layers of one optimizer.

        Args:
            peaks: The peaks of each layer's rows, by layer.
        """
        largest = self.largest(peaks.values())
        return {name: self.read_layer(layer, largest) for name, layer in peaks.items()}

    def largest(self, layers: Iterable[BufferPeaks]) -> float:
        """Return the largest peak of all layers, with which a layer without any gradient is compared."""
        return max(map(self._peak, layers), default=0.0)

    def read_layer(self, layer: BufferPeaks, largest: float) -> ClockReading:
        """Read the clock of one layer.

        Args:
            layer: The peaks of its rows.
            largest: See :meth:`largest`.
        """
        peak = self._peak(layer)
        # A layer this far below the largest peak gets no gradient as a whole; it is compared with that peak.
        return self._read(layer, largest if peak < largest * math.exp(-SILENT_FOLDS) else peak)

    @staticmethod
    def _peak(layer: BufferPeaks) -> float:
        finite = layer.rows[torch.isfinite(layer.rows)]
        return float(finite.max()) if finite.numel() else 0.0

    def _read(self, layer: BufferPeaks, reference: float) -> ClockReading:
        decaying = torch.isfinite(layer.rows) & (layer.rows >= layer.least)
        steps = torch.where(decaying, torch.log(reference / layer.rows) / self.rate, torch.inf).round().clamp(min=0.0)
        never = layer.rows == 0
        not_finite = ~torch.isfinite(layer.rows)
        faded = ~decaying & ~never & ~not_finite
        end = math.floor(math.log(max(reference, layer.least) / layer.least) / self.rate)
        least_steps = torch.where(faded, float(end), torch.nan)
        return ClockReading(steps, least_steps, never, not_finite, torch.zeros_like(never))
