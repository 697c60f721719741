"""Count by the plain formula, on any device, in pieces, so that what is made for them stays small.

The formula ``(y == 0).sum(dims)`` and its like make whole tensors in between: two and a half times the activation. Here
a piece of at most 2**22 elements, or one position, is looked at, in buffers that all pieces share: 20 MB whatever the
activation. ``|y|`` is computed once, and everything is counted from it. Only operations are used that every device has:
float64 only where the device has it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neuronscope.count.counter_tensors import NEVER, CounterTensors
from neuronscope.count.neuron_layout import NeuronLayout, neuron_dims_first
from neuronscope.count.positions import mask_dims

__all__ = ["Pieces", "TensorToCount"]

#: Most bytes of the magnitudes of a piece: 2**22 numbers of float32.
_BYTES = 1 << 24


class TensorToCount(NamedTuple):
    """An output or a gradient that is to be counted, and how.

    Attributes:
        tensor: ``(…, N, …)``, detached.
        layout: Where its neurons lie.
        step: Number of the optimizer step.
        tolerance: ``|y| <= tolerance`` counts as zero in an output; ``None`` for a gradient.
        mask: Which positions are counted, bool ``(B, T)``; ``None`` = all. The host has added all: those that it leaves
            out are taken off the positions that are counted on the device.
        clock: Where to read the step instead, int64 without dimensions, if a captured graph counts the tensor.
        positions: Positions to add on the device: those of the tensor in a captured graph; 0 if the host adds them.
        examples: The same for examples.
    """

    tensor: Tensor
    layout: NeuronLayout
    step: int = 0
    tolerance: float | None = None
    mask: Tensor | None = None
    clock: Tensor | None = None
    positions: int = 0
    examples: int = 0

    @property
    def limit(self) -> float:
        """The tolerance as torch compares it with numbers of the tensor's type: in that type."""
        dtype = self.tensor.dtype.to_real() if self.tensor.is_complex() else self.tensor.dtype
        return float(torch.tensor(self.tolerance, dtype=dtype, device="cpu").item()) if self.tolerance else 0.0

    def kept(self) -> Tensor | None:
        """Return which positions are counted, or ``None`` for all: a view of the mask, of the positions' shape.

        A mask applies only if one dimension indexes the neurons.
        """
        shape, axis, mask = self.tensor.shape, self.layout.axis, self.mask
        covered = 0 if mask is None or self.layout.dims is not None else mask_dims(shape, axis, mask.shape)
        if mask is None or not covered:
            return None
        places = [size for dim, size in enumerate(shape) if dim != axis]
        rows = mask.to(self.tensor.device).reshape(places[:covered])
        return rows.reshape(places[:covered] + [1] * (len(places) - covered)).expand(places)


class Pieces:
    """Counts tensors of any device by the plain formula, in pieces. Waits for no device.

    >>> from neuronscope.count.counters import SiteCounters
    >>> counters = SiteCounters(2, torch.device("cpu")).tensors
    >>> y = torch.tensor([[0.0, 1.5], [0.0, 0.0]])
    >>> Pieces().count(counters, TensorToCount(y, NeuronLayout(1), step=7, tolerance=0.0))
    >>> counters.zero_outputs.tolist(), counters.abs_sum.tolist(), counters.last_active.tolist()
    ([2, 1], [0.0, 1.5], [-1, 7])
    """

    def count(self, counters: CounterTensors, what: TensorToCount) -> None:
        """Count one output or gradient.

        Args:
            counters: The counters of the site, on the device of the tensor.
            what: The tensor.
        """
        work = _Work(what)
        if what.tolerance is None:
            counters.zero_gradients.add_(work.count_zeros())
            work.add_positions(counters.traced_gradients[0])
            return
        zeros, finite, sums = work.count(what.limit, counters.abs_sum.dtype)
        fired = zeros < finite  # neither zero nor broken: a zero is finite
        step: int | Tensor = what.step if what.clock is None else what.clock
        counters.zero_outputs.add_(zeros)
        counters.not_finite.add_(work.kept - finite)
        counters.abs_sum.add_(sums)
        last, first = counters.last_active, counters.first_active
        torch.maximum(last, torch.where(fired, step, -1), out=last)
        torch.minimum(first, torch.where(fired, step, NEVER), out=first)
        work.add_positions(counters.traced[0])
        if what.examples:
            counters.traced[1].add_(what.examples)


class _Work:
    """A tensor that is counted: cut along its positions into pieces, each of which has all neurons.

    Attributes:
        kept: Number of positions that are counted of each neuron; on the device if a mask says which.
    """

    def __init__(self, what: TensorToCount) -> None:
        view, count = neuron_dims_first(what.tensor, what.layout)
        if view.dim() == count:  # one position
            view = view.unsqueeze(-1)
        self._view, self._count = view, count
        self._keep, self._added = what.kept(), what.positions
        self._positions = math.prod(view.shape[count:])
        self.kept: int | Tensor = self._positions if self._keep is None else self._keep.sum()
        wide = torch.float64 if view.dtype in (torch.float64, torch.complex128) else torch.float32
        neurons = math.prod(view.shape[:count])
        self._cuts = _cuts(view.shape[count:], view.stride()[count:], _BYTES // wide.itemsize // max(neurons, 1))
        most = neurons * math.prod(self._cuts)
        self._numbers = torch.empty(most, dtype=wide, device=view.device)
        self._flags = torch.empty(most, dtype=torch.bool, device=view.device)

    def add_positions(self, counted: Tensor) -> None:
        """Add to the positions that are counted on the device, int64 without dimensions; take off what is left out."""
        if self._keep is not None:
            counted.add_(self.kept - (self._positions - self._added))
        elif self._added:
            counted.add_(self._added)

    def count(self, tolerance: float, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the zeros up to a tolerance, the finite values and, in a wide type, the sums of the magnitudes.

        Each is of all neurons, ``(N,)``.
        """
        zeros, finite, sums = self._sums(torch.int64), self._sums(torch.int64), self._sums(wide)
        for piece, keep, numbers, flags in self._pieces():
            if piece.dtype is numbers.dtype or piece.is_complex():
                torch.abs(piece, out=numbers)
            else:
                numbers.copy_(piece).abs_()
            torch.le(numbers, tolerance, out=flags)
            zeros.add(flags if keep is None else flags.logical_and_(keep))
            torch.lt(numbers, math.inf, out=flags)  # NaN is not
            finite.add(flags if keep is None else flags.logical_and_(keep))
            numbers.nan_to_num_(nan=0.0, posinf=0.0)
            sums.add(numbers if keep is None else numbers.mul_(keep))
        return zeros.total.flatten(), finite.total.flatten(), sums.total.flatten()

    def count_zeros(self) -> Tensor:
        """Return the exact zeros of all neurons, ``(N,)``."""
        zeros = self._sums(torch.int64)
        for piece, keep, _, flags in self._pieces():
            torch.eq(piece, 0, out=flags)
            zeros.add(flags if keep is None else flags.logical_and_(keep))
        return zeros.total.flatten()

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
        """Yield pieces, which of their positions are counted, and a buffer of numbers and one of flags for each."""
        sizes = self._view.shape[self._count :]
        slices = [
            [slice(start, start + cut) for start in range(0, size, max(cut, 1))]
            for size, cut in zip(sizes, self._cuts, strict=True)
        ]
        for place in itertools.product(*slices):
            piece = self._view[(slice(None),) * self._count + place]
            size, shape = piece.numel(), piece.shape
            keep = None if self._keep is None else self._keep[place]
            yield piece, keep, self._numbers[:size].view(shape), self._flags[:size].view(shape)

    def _sums(self, dtype: torch.dtype) -> _NeuronSums:
        return _NeuronSums(self._view, self._count, dtype, several=self._cuts != self._view.shape[self._count :])


class _NeuronSums:
    """A sum for each neuron of a view, over all pieces: ``total`` has the view's dimensions of neurons."""

    def __init__(self, view: Tensor, count: int, dtype: torch.dtype, *, several: bool) -> None:
        self._dims = list(range(count, view.dim()))
        self.total = torch.zeros(view.shape[:count], dtype=dtype, device=view.device)
        self._one = torch.empty_like(self.total) if several else self.total

    def add(self, piece: Tensor) -> None:
        """Add up a piece over its positions."""
        torch.sum(piece, self._dims, dtype=self.total.dtype, out=self._one)
        if self._one is not self.total:
            self.total.add_(self._one)


def _cuts(shape: Sequence[int], strides: Sequence[int], most: int) -> tuple[int, ...]:
    """Return how long a piece of so many positions at most is along each dimension; the outermost are cut first."""
    cuts = list(shape)
    for dim in sorted(range(len(cuts)), key=lambda dim: -strides[dim]):
        positions = math.prod(cuts)
        if positions > most:
            cuts[dim] = max(1, most * cuts[dim] // positions)
    return tuple(cuts)
