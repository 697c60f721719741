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

__all__ = ["CountedAt", "Pieces", "keep_view", "rounded"]

#: Most bytes of the magnitudes of a piece: 2**22 numbers of float32.
_BYTES = 1 << 24
#: Positions of a piece for which adding up to rows of neurons pays, if the tensor has so many.
_POSITIONS = 64


class CountedAt(NamedTuple):
    """When a tensor is counted, and what of it is counted on the host.

    Attributes:
        step: Number of the optimizer step.
        clock: Where to read that number instead, int64 without dimensions, if a captured graph counts the tensor.
        positions: Positions to add on the device: those of the tensor in a captured graph; 0 if the host adds them.
        examples: Examples to add on the device.
    """

    step: int
    clock: Tensor | None = None
    positions: int = 0
    examples: int = 0


class Pieces:
    """Counts tensors of any device by the plain formula, in pieces. Waits for no device.

    >>> from neuronscope.count.counters import SiteCounters
    >>> counters = SiteCounters(2, torch.device("cpu")).tensors
    >>> Pieces().add_outputs(counters, torch.tensor([[0.0, 1.5], [0.0, 0.0]]), NeuronLayout(1), None, CountedAt(7), 0.0)
    >>> counters.zero_outputs.tolist(), counters.abs_sum.tolist(), counters.last_active.tolist()
    ([2, 1], [0.0, 1.5], [-1, 7])
    """

    def add_outputs(
        self,
        counters: CounterTensors,
        y: Tensor,
        layout: NeuronLayout,
        mask: Tensor | None,
        moment: CountedAt,
        tolerance: float,
    ) -> None:
        """Count one output tensor.

        Args:
            counters: The counters of the site, on the device of the tensor.
            y: Output ``(…, N, …)``, detached.
            layout: Where its neurons lie.
            mask: Which positions are counted, bool ``(B, T)``; ``None`` = all. Positions that it leaves out are taken
                off ``counters.traced``, since the host has added all.
            moment: When.
            tolerance: ``|y| <= tolerance`` counts as zero.
        """
        work = _Work(y, layout, mask)
        step: int | Tensor = moment.step if moment.clock is None else moment.clock
        for part in work.neurons():
            zeros, finite, sums = part.count(rounded(tolerance, y.dtype.to_real() if y.is_complex() else y.dtype))
            bad = work.kept - finite
            fired = zeros < finite  # neither zero nor broken: a zero is finite
            part.of(counters.zero_outputs).add_(zeros)
            part.of(counters.not_finite).add_(bad)
            part.of(counters.abs_sum).add_(sums)
            last, first = part.of(counters.last_active), part.of(counters.first_active)
            torch.maximum(last, torch.where(fired, step, -1), out=last)
            torch.minimum(first, torch.where(fired, step, NEVER), out=first)
        work.add_positions(counters.traced[0], moment)
        if moment.examples:
            counters.traced[1].add_(moment.examples)

    def add_gradients(
        self, counters: CounterTensors, gradient: Tensor, layout: NeuronLayout, mask: Tensor | None, moment: CountedAt
    ) -> None:
        """Count one gradient at the pre-activation.

        Args:
            counters: As in :meth:`add_outputs`, and so are the others.
            gradient: Gradient ``(…, N, …)``, detached.
            layout: Where its neurons lie.
            mask: Which positions are counted.
            moment: When.
        """
        work = _Work(gradient, layout, mask)
        for part in work.neurons():
            part.of(counters.zero_gradients).add_(part.count_zeros())
        work.add_positions(counters.traced_gradients[0], moment)


class _Work:
    """A tensor that is counted: cut into parts of its neurons, and these into pieces of positions.

    Attributes:
        kept: Number of positions that are counted of each neuron; on the device if a mask says which.
    """

    def __init__(self, tensor: Tensor, layout: NeuronLayout, mask: Tensor | None) -> None:
        view, count = neuron_dims_first(tensor, layout)
        self.keep = keep_view(tensor, layout, mask)
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

    def add_positions(self, counted: Tensor, moment: CountedAt) -> None:
        """Add to the positions that are counted on the device; take off what the mask leaves out.

        Args:
            counted: int64 without dimensions.
            moment: See :class:`CountedAt`.
        """
        if self.keep is not None:
            counted.add_(self.kept - (self.positions - moment.positions))
        elif moment.positions:
            counted.add_(moment.positions)


class _SomeNeurons:
    """Some of the neurons of a tensor, at all positions."""

    def __init__(self, work: _Work, place: tuple[slice, ...]) -> None:
        self._work, self._place = work, place
        self._shape = work.view[place].shape[: work.count]
        self._dims = list(range(work.count, work.view.dim()))

    def of(self, counter: Tensor) -> Tensor:
        """Return the view of a counter ``(N,)`` of these neurons."""
        return counter.view(self._work.view.shape[: self._work.count])[self._place]

    def count(self, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the zeros, the finite values and the sums of the magnitudes of the neurons.

        Args:
            tolerance: ``|y| <= tolerance`` counts as zero.
        """
        zeros, finite, sums = self._row(torch.int64), self._row(torch.int64), self._row(self._work.numbers.dtype)
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


def keep_view(tensor: Tensor, layout: NeuronLayout, mask: Tensor | None) -> Tensor | None:
    """Return which positions of a tensor are counted, or ``None`` for all: a view of the mask, of the positions' shape.

    Args:
        tensor: ``(…, N, …)``.
        layout: Where its neurons lie. A mask applies only if one dimension indexes them.
        mask: Which positions are counted, bool ``(B, T)``.
    """
    axis = layout.axis
    covered = 0 if mask is None or layout.dims is not None else mask_dims(tensor.shape, axis, mask.shape)
    if mask is None or not covered:
        return None
    shape = [size for dim, size in enumerate(tensor.shape) if dim != axis]
    rows = mask.to(tensor.device).reshape(shape[:covered])
    return rows.reshape(shape[:covered] + [1] * (len(shape) - covered)).expand(shape)


def rounded(tolerance: float, dtype: torch.dtype) -> float:
    """Return a tolerance as torch compares it with numbers of a type: in that type.

    Args:
        tolerance: The tolerance.
        dtype: The type.

    >>> rounded(0.1, torch.bfloat16)
    0.10009765625
    """
    return 0.0 if tolerance == 0 else float(torch.tensor(tolerance, dtype=dtype, device="cpu").item())


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
