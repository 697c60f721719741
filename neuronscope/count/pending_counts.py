"""Keep the counts of several calls in rows, and add them up together, because each torch call costs time.

Each call of a site writes its counts, as float32, into the next free row. When no row is free, or when the counts are
read, the 64-bit sums and the steps at which neurons fired are computed for all rows at once. A count in a row is below
2**24, which float32 holds exactly; rows are added up in 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuronscope.count.counter_tensors import NEVER

__all__ = ["PendingCounts"]

#: Maximal number of rows, and of numbers in them (128 kB of float32).
_ROWS, _NUMBERS = 64, 1 << 15


class PendingCounts:
    """Rows for the counts ``(quantities, N)`` of several calls, on the CPU.

    Attributes:
        room: How many there are; 0 for so wide a layer that not even two fit.

    Args:
        quantities: 1 for zeros, 2 for zeros and magnitudes.
        neurons: Number of neurons, ``N``.

    >>> rows = PendingCounts(1, 3)
    >>> _ = rows.next().copy_(torch.tensor([[4.0, 1.0, 0.0]]))
    >>> rows.add_rows(4, [7])
    >>> last, first = rows.active()
    >>> rows.zeros(), last, first.eq(NEVER)
    (tensor([4, 1, 0]), tensor([-1,  7,  7]), tensor([ True, False, False]))
    """

    def __init__(self, quantities: int, neurons: int) -> None:
        room = min(_ROWS, _NUMBERS // max(quantities * neurons, 1))
        self.room = room if room > 1 else 0
        self._shape = (self.room, quantities, neurons)
        with torch.inference_mode(False):
            self._rows = torch.empty(0, dtype=torch.float32, device="cpu")  # made when it is needed
        self._each: list[Tensor] = []  # views, made once
        self._positions: list[int] = []
        self._steps: list[int] = []

    def __len__(self) -> int:
        return len(self._steps)

    def next(self) -> Tensor:
        """Return the next free row, float32 ``(quantities, N)``. After writing it, call :meth:`add_rows`."""
        if not self._each:
            self._make_room()
        return self._each[len(self._steps)]

    def next_rows(self, number: int) -> Tensor:
        """Return ``number`` free rows, float32 ``(number, quantities, N)``. Then call :meth:`add_rows`."""
        if not self._each:
            self._make_room()
        return self._rows[len(self._steps) : len(self._steps) + number]

    def _make_room(self) -> None:
        with torch.inference_mode(False):
            self._rows = torch.empty(self._shape, dtype=torch.float32, device="cpu")
            self._each = list(self._rows)

    def add_rows(self, positions: int, steps: Sequence[int]) -> None:
        """Note that the next free rows were written.

        Args:
            positions: Number of positions of each tensor, below 2**24.
            steps: Optimizer step of each tensor.
        """
        self._positions += [positions] * len(steps)
        self._steps += steps

    def clear(self) -> None:
        """Forget all rows."""
        self._positions.clear()
        self._steps.clear()

    @property
    def full(self) -> bool:
        """Whether no row is free."""
        return len(self._steps) == self.room

    @property
    def span(self) -> tuple[int, int, int]:
        """The positions of all rows together, their first step and their last one."""
        return sum(self._positions), min(self._steps), max(self._steps)

    def zeros(self) -> Tensor:
        """Return the zeros of all rows together, int64 ``(N,)``."""
        return self._kept(0).sum(0, dtype=torch.float64).long()  # whole numbers below 2**53: exact

    def magnitudes(self) -> Tensor:
        """Return the magnitudes of all rows together, float64 ``(N,)``."""
        return self._kept(1).sum(0, dtype=torch.float64)

    def active(self) -> tuple[Tensor, Tensor]:
        """Return the last and the first step at which each neuron fired, int64 ``(N,)``; −1 and ``NEVER`` if none."""
        positions, steps = torch.tensor([self._positions, self._steps], dtype=torch.int64, device="cpu")[:, :, None]
        fired = self._kept(0) < positions
        return torch.where(fired, steps, -1).amax(0), torch.where(fired, steps, NEVER).amin(0)

    def _kept(self, quantity: int) -> Tensor:
        return self._rows[: len(self), quantity]
