"""Count by the plain formula, on any device, in pieces, so that what is made for them stays small.

The formula ``(y == 0).sum(dims)`` and its like make whole tensors in between: two and a half times the activation. Here
a piece of at most 2**22 elements is looked at, in buffers that all pieces share: 20 MB whatever the activation. ``|y|``
is computed once, and everything is counted from it. Only operations are used that every device has: float64 only where
the device has it.
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
#: Positions of a piece for which adding up to rows of neurons pays, if the tensor has so many.
_POSITIONS = 64


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
            for part in work.neurons():
                part.of(counters.zero_gradients).add_(part.count_zeros())
            work.add_positions(counters.traced_gradients[0])
            return
        step: int | Tensor = what.step if what.clock is None else what.clock
        limit = what.limit
        for part in work.neurons():
            zeros, finite, sums = part.count(limit, counters.abs_sum.dtype)
            bad = work.kept - finite
            fired = zeros < finite  # neither zero nor broken: a zero is finite
            part.of(counters.zero_outputs).add_(zeros)
            part.of(counters.not_finite).add_(bad)
            part.of(counters.abs_sum).add_(sums)
            last, first = part.of(counters.last_active), part.of(counters.first_active)
            torch.maximum(last, torch.where(fired, step, -1), out=last)
            torch.minimum(first, torch.where(fired, step, NEVER), out=first)
        work.add_positions(counters.traced[0])
        if what.examples:
            counters.traced[1].add_(what.examples)


class _Work:
    """A tensor that is counted: cut into parts of its neurons, and these into pieces of positions.

    Attributes:
        kept: Number of positions that are counted of each neuron; on the device if a mask says which.
    """

    def __init__(self, what: TensorToCount) -> None:
        tensor = what.tensor
        view, count = neuron_dims_first(tensor, what.layout)
        self.keep, self._added = what.kept(), what.positions
        if view.dim() == count:  # one position
            view = view.unsqueeze(-1)
        self.view, self.count = view, count
        self.positions = math.prod(view.shape[count:])
        self.kept: int | Tensor = self.positions if self.keep is None else self.keep.sum()
        wide = torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32
        self.cuts = _cuts(view, count, _BYTES // wide.itemsize)
        most = math.prod(self.cuts)
        self.numbers = torch.empty(most, dtype=wide, device=tensor.device)
        self.flags = torch.empty(most, dtype=torch.bool, device=tensor.device)

    def neurons(self) -> Iterator[_SomeNeurons]:
        """Yield the parts of the neurons."""
        if self.view.numel():
            for place in _places(self.view.shape[: self.count], self.cuts[: self.count]):
                yield _SomeNeurons(self, place)

    def add_positions(self, counted: Tensor) -> None:
        """Add to the positions that are counted on the device, int64 without dimensions; take off what is left out."""
        if self.keep is not None:
            counted.add_(self.kept - (self.positions - self._added))
        elif self._added:
            counted.add_(self._added)


class _SomeNeurons:
    """Some of the neurons of a tensor, at all positions."""

    def __init__(self, work: _Work, place: tuple[slice, ...]) -> None:
        self._work, self._place = work, place
        self._shape = work.view[place].shape[: work.count]
        self._dims = list(range(work.count, work.view.dim()))

    def of(self, counter: Tensor) -> Tensor:
        """Return the view of a counter ``(N,)`` of these neurons."""
        return counter.view(self._work.view.shape[: self._work.count])[self._place]

    def count(self, tolerance: float, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the zeros, the finite values and the sums of the magnitudes of the neurons.

        Args:
            tolerance: ``|y| <= tolerance`` counts as zero.
            wide: The type in which magnitudes are added up.
        """
        zeros, finite, sums = self._row(torch.int64), self._row(torch.int64), self._row(wide)
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
        return zeros.total, finite.total, sums.total

    def count_zeros(self) -> Tensor:
        """Return the zeros of the neurons, exact ones."""
        zeros = self._row(torch.int64)
        for piece, keep, _, flags in self._pieces():
            torch.eq(piece, 0, out=flags)
            zeros.add(flags if keep is None else flags.logical_and_(keep))
        return zeros.total

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
        """Yield pieces, which of their positions are counted, and a buffer of numbers and one of flags for each."""
        work = self._work
        view = work.view[self._place]
        for place in _places(view.shape[work.count :], work.cuts[work.count :]):
            piece = view[(slice(None),) * work.count + place]
            size, shape = piece.numel(), piece.shape
            keep = None if work.keep is None else work.keep[place]
            yield piece, keep, work.numbers[:size].view(shape), work.flags[:size].view(shape)

    def _row(self, dtype: torch.dtype) -> _NeuronSums:
        work = self._work
        several = work.cuts[work.count :] != tuple(work.view.shape[work.count :])
        return _NeuronSums(self._shape, self._dims, dtype, work.view.device, several=several)


class _NeuronSums:
    """A sum for each neuron of a part, over all pieces.

    Attributes:
        total: The sums so far.
    """

    def __init__(
        self, shape: torch.Size, dims: list[int], dtype: torch.dtype, device: torch.device, *, several: bool
    ) -> None:
        self._dims = dims
        self.total = torch.zeros(shape, dtype=dtype, device=device)
        self._one = torch.empty_like(self.total) if several else self.total

    def add(self, piece: Tensor) -> None:
        """Add up a piece over its positions."""
        torch.sum(piece, self._dims, dtype=self.total.dtype, out=self._one)
        if self._one is not self.total:
            self.total.add_(self._one)


def _cuts(view: Tensor, count: int, most: int) -> tuple[int, ...]:
    """Return how long a piece is along each dimension of a view; the outermost in memory are cut first.

    Args:
        view: The first ``count`` dimensions index neurons.
        count: Their number.
        most: Most elements of a piece.
    """
    cuts = list(view.shape)
    outermost = sorted(range(view.dim()), key=lambda dim: -view.stride()[dim])
    for least in (_POSITIONS, 1):
        for dim in outermost:
            size = math.prod(cuts)
            if size > most:
                fits = max(1, most * cuts[dim] // size)
                if dim >= count:
                    others = math.prod(cuts[count:]) // cuts[dim]
                    fits = max(fits, min(cuts[dim], -(-least // others)))
                cuts[dim] = fits
    return tuple(cuts)


def _places(shape: Sequence[int], cuts: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield the slices of all pieces."""
    yield from itertools.product(
        *(
            [slice(start, start + cut) for start in range(0, size, max(cut, 1))]
            for size, cut in zip(shape, cuts, strict=True)
        )
    )
