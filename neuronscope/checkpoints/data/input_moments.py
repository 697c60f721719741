"""Compute mean and standard deviation of the network's input, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["InputMoments"]


class InputMoments:
    """Mean and standard deviation of each feature of the first tensor ``(B, …)`` in each batch, over all examples.

    >>> moments = InputMoments()
    >>> moments.add(torch.tensor([[3.0, 9.0], [5.0, 11.0]]))
    >>> moments.offset()  # means 4 and 10, deviations 1 and 1: √116 / √2
    7.61577310586390...
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None
        self._count = 0

    def add(self, batch: Any) -> None:
        """Add a batch. Skip it if its input is not floating-point or has another shape than the first batch's.

        Args:
            batch: A tensor ``(B, …)``, a tuple or list that begins with one, or a mapping that contains one.
        """
        tensor = batch
        if isinstance(batch, Mapping):
            tensor = next((value for value in batch.values() if isinstance(value, Tensor)), None)
        elif isinstance(batch, (tuple, list)):
            tensor = batch[0] if batch else None
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() < 2:
            return
        values = tensor.detach().to("cpu", torch.float64)
        if self._sum is None or self._squares is None:
            self._sum, self._squares = torch.zeros_like(values[0]), torch.zeros_like(values[0])
        if values.shape[1:] != self._sum.shape:
            return
        self._sum += values.sum(dim=0)
        self._squares += (values * values).sum(dim=0)
        self._count += len(values)

    def offset(self) -> float | None:
        """Return ‖mean‖ / ‖standard deviation‖ over the features; ``None`` without batches, or if it is not finite."""
        if self._sum is None or self._squares is None or not self._count:
            return None
        mean = self._sum / self._count
        spread = (self._squares / self._count - mean * mean).clamp(min=0.0).sum().sqrt()
        offset = float(mean.norm() / spread)
        return offset if math.isfinite(offset) else None
