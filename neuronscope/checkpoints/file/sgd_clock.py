"""SGD's clock: a momentum buffer without weight decay shrinks by the momentum μ a step once gradients stop coming.

Unlike Adam's it has no second mean to be measured by, so that a row's buffer is held against the largest of its layer:
an estimate, no bound. Living rows of one layer differ by a factor of ten as a rule; a silent one falls by ten in 22
steps at μ = .9.
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
    """The largest number of each row's momentum buffer.

    Attributes:
        rows: ``max |buffer|`` a row, float64 ``(N,)``; NaN or infinite where one is.
        least: The smallest number of the buffer's type that still decays as it should.
    """

    rows: Tensor
    least: float

    @classmethod
    def of(cls, buffer: Tensor) -> BufferPeaks:
        """Of a buffer by rows, ``(N, F)``."""
        return cls(buffer.abs().amax(dim=1).double(), 2.0 * torch.finfo(buffer.dtype).tiny)

    def join(self, other: BufferPeaks) -> BufferPeaks:
        """Of the same rows together with other numbers of theirs (a weight's rows and the bias)."""
        return BufferPeaks(torch.maximum(self.rows, other.rows), max(self.least, other.least))


@dataclass(frozen=True)
class SGDClock:
    """SGD's clock.

    Args:
        momentum: μ, in (0, 1).

    >>> round(SGDClock(0.9).silent_steps)
    80
    """

    momentum: float

    @property
    def rate(self) -> float:
        """By how many e-foldings a buffer falls a step without gradient."""
        return -math.log(self.momentum)

    @property
    def silent_steps(self) -> float:
        """Steps from which on a row is said to get no gradient."""
        return SILENT_FOLDS / self.rate

    @property
    def sure_steps(self) -> float:
        """Steps from which on that is inferred and not only suspected."""
        return SURE_FOLDS / self.rate

    def read(self, peaks: Mapping[str, BufferPeaks]) -> dict[str, ClockReading]:
        """Read the clock of all layers of one optimizer.

        Args:
            peaks: By layer.
        """
        largest = self.largest(peaks.values())
        return {name: self.read_layer(layer, largest) for name, layer in peaks.items()}

    def largest(self, layers: Iterable[BufferPeaks]) -> float:
        """Return the largest number of all layers, by which a layer that is silent as a whole is measured."""
        return max(map(self._peak, layers), default=0.0)

    def read_layer(self, layer: BufferPeaks, largest: float) -> ClockReading:
        """Read the clock of one layer.

        Args:
            layer: Its rows.
            largest: See :meth:`largest`.
        """
        peak = self._peak(layer)
        # A layer that lies this far below the loudest is silent as a whole: then it is measured by that one.
        return self._read(layer, largest if peak < largest * math.exp(-SILENT_FOLDS) else peak)

    @staticmethod
    def _peak(layer: BufferPeaks) -> float:
        sound = layer.rows[torch.isfinite(layer.rows)]
        return float(sound.max()) if sound.numel() else 0.0

    def _read(self, layer: BufferPeaks, reference: float) -> ClockReading:
        told = torch.isfinite(layer.rows) & (layer.rows >= layer.least)
        steps = torch.where(told, torch.log(reference / layer.rows) / self.rate, torch.inf).round().clamp(min=0.0)
        never = layer.rows == 0
        not_finite = ~torch.isfinite(layer.rows)
        faded = ~told & ~never & ~not_finite
        end = math.floor(math.log(max(reference, layer.least) / layer.least) / self.rate)
        floor = torch.where(faded, float(end), torch.nan)
        return ClockReading(steps, floor, never, not_finite, torch.zeros_like(never))
