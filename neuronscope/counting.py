"""From tensors to per-neuron counts: the only arithmetic on the hot path.

The obvious ``(y == 0).sum(dims)`` costs 14 to 20 passes over a tensor on a CPU. Here a cache-sized block is compared
into a float buffer, its magnitudes go into the buffer beside it, and one sum adds up both while they are in the cache:
a block's float32 count is exact below 2**24. How a tensor of one shape is cut, and the views of the buffer that this
takes, are a *plan*, made once. On other devices, and where ``torch.compile`` traces, the plain formula stands: a
compiler fuses it. No path waits for a device, none draws a random number, and none keeps the tensor.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OutputCounts", "Scratch", "count_outputs", "count_zeros", "measure", "plain_outputs", "plain_zeros"]

#: Elements compared at a time: 1 MB of float32, which stays in a core's cache.
BLOCK = 1 << 18
#: Largest count that float32 holds exactly.
_EXACT = 1 << 24
#: Plans kept at once; input of ever new lengths makes ever new ones.
_PLANS = 256


class OutputCounts(NamedTuple):
    """What one output tensor gives, per neuron ``(N,)``.

    Attributes:
        zeros: Positions with zero output, int64.
        not_finite: Positions with NaN or infinite output, int64; ``None`` where there is none.
        abs_sum: Sum of ``|y|`` over finite outputs, float64.
    """

    zeros: Tensor
    not_finite: Tensor | None
    abs_sum: Tensor


def _others(tensor: Tensor, axis: int) -> list[int]:
    return [dimension for dimension in range(tensor.dim()) if dimension != axis]


def plain_zeros(tensor: Tensor, axis: int, tolerance: float) -> Tensor:
    """:func:`count_zeros` by the plain formula, which a compiler fuses."""
    zero = tensor == 0 if tolerance == 0 else tensor.abs() <= tolerance
    others = _others(tensor, axis)
    return zero.sum(others) if others else zero.long()


def plain_outputs(tensor: Tensor, axis: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`count_outputs` by the plain formula, which a compiler fuses; ``not_finite`` is always given."""
    others = _others(tensor, axis)
    finite = torch.isfinite(tensor)
    magnitude = torch.where(finite, tensor.abs(), 0)
    wide = torch.float64 if tensor.device.type == "cpu" else torch.float32
    if not others:
        return plain_zeros(tensor, axis, tolerance), (~finite).long(), magnitude.to(torch.float64)
    return (
        plain_zeros(tensor, axis, tolerance),
        (~finite).sum(others),
        magnitude.sum(others, dtype=wide).to(torch.float64),
    )


class Scratch(threading.local):
    """A buffer and plans of its use, made once a thread: counting a tensor like one before allocates nothing."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.buffer = torch.empty(2, 0, dtype=torch.float32, device="cpu")
            self.zero = torch.zeros((), dtype=torch.float32, device="cpu")  # quicker to compare with than a number
        self._plans: dict[tuple[torch.Size, tuple[int, ...], int, int], _Plan] = {}

    def plan(self, tensor: Tensor, axis: int, quantities: int) -> _Plan | None:
        """How to count this tensor in blocks; ``None`` where the plain formula must do it.

        Args:
            tensor: On whatever device, of whatever type.
            axis: The neurons' dimension.
            quantities: 1 for zeros, 2 for zeros and magnitudes.
        """
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.layout is not torch.strided:
            return None
        key = (tensor.shape, tensor.stride(), axis, quantities)
        plan = self._plans.get(key)
        if plan is None:
            positions = tensor.numel() // max(tensor.shape[axis], 1)
            if not tensor.is_floating_point() or not 0 < positions < _EXACT:
                return None
            with torch.inference_mode(False):
                plan = self._make(tensor, axis, quantities)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _make(self, tensor: Tensor, axis: int, quantities: int) -> _Plan:
        elements = min(tensor.numel(), BLOCK)
        if self.buffer.shape[1] < elements:
            self._plans.clear()  # their views are of the old buffer
            size = BLOCK if elements > BLOCK >> 4 else BLOCK >> 4  # a network of small layers needs no megabytes
            self.buffer = torch.empty(2, size, dtype=torch.float32, device="cpu")
        return _Plan(tensor, axis, self.buffer[:quantities], self.zero)


class _Plan:
    """How tensors of one shape and one order in memory are reduced to their neurons.

    A tensor of up to a block is compared as it is into a part of the buffer that has its shape. A larger one is seen
    as ``(outer, N, inner)`` and cut along all three.

    Args:
        tensor: One of these tensors.
        axis: The neurons' dimension.
        buffer: ``(quantities, elements)``: for zeros, or for zeros and magnitudes.
        zero: A tensor of it.
    """

    def __init__(self, tensor: Tensor, axis: int, buffer: Tensor, zero: Tensor) -> None:
        strides = tensor.stride()
        self._order = sorted(range(tensor.dim()), key=lambda dimension: (-strides[dimension], dimension))
        sizes = [tensor.shape[dimension] for dimension in self._order]  # in the order of memory
        place = self._order.index(axis)
        self._shape = (math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :]))
        self._buffer = buffer
        self._zero = zero
        self._single = tensor.numel() <= BLOCK
        if self._single:
            self._work = _flat(buffer[:, : tensor.numel()].view(-1, *self._shape))
            back = sorted(range(tensor.dim()), key=self._order.__getitem__)
            self._parts = [part.view(sizes).permute(back) for part in buffer[:, : tensor.numel()]]

    def fill(self, tensor: Tensor, tolerance: float, out: Tensor) -> None:
        """Count zeros, and add up magnitudes where the plan has room for them.

        Args:
            tensor: The tensor.
            tolerance: ``|x| <= tolerance`` counts as zero.
            out: float32 ``(quantities, N)``; magnitudes are not finite where an element is not.
        """
        if self._single:
            self._compare(tensor, tolerance, self._parts)
            _sum_of_positions(*self._work, out)
            return
        cube = tensor.permute(self._order).reshape(self._shape)
        total = torch.zeros(out.shape, dtype=torch.float64, device="cpu")
        for images, neurons, positions in self._cuts():
            block = cube[images, neurons, positions]
            work = self._buffer[:, : block.numel()].view(-1, *block.shape)
            self._compare(block, tolerance, list(work))
            part = torch.empty(work.shape[0], work.shape[2], dtype=torch.float32, device="cpu")
            _sum_of_positions(*_flat(work), part)
            total[:, neurons] += part
        out.copy_(total)

    def _cuts(self) -> Iterator[tuple[slice, slice, slice]]:
        outer, neurons, inner = self._shape
        images = min(max(BLOCK // (neurons * inner), 1), outer)
        some = min(max(BLOCK // inner, 1), neurons)
        positions = min(BLOCK, inner)
        yield from itertools.product(_slices(outer, images), _slices(neurons, some), _slices(inner, positions))

    def _compare(self, block: Tensor, tolerance: float, parts: list[Tensor]) -> None:
        if tolerance == 0:
            torch.eq(block, self._zero, out=parts[0])
        else:
            torch.le(block.abs(), tolerance, out=parts[0])
        if len(parts) > 1:
            if block.dtype is torch.float32:
                torch.abs(block, out=parts[1])
            else:
                parts[1].copy_(block).abs_()


def _slices(length: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, length)) for start in range(0, length, at_once)]


def _flat(work: Tensor) -> tuple[Tensor, int]:
    """``(quantities, outer, N, inner)`` without an end that is 1, and the dimension to sum; −1 where none is."""
    if work.shape[3] == 1:
        return work.squeeze(3), 1
    if work.shape[1] == 1:
        return work.squeeze(1), 2
    return work, -1


def _sum_of_positions(work: Tensor, dimension: int, out: Tensor) -> None:
    """What :func:`_flat` gave → ``(quantities, N)``; two plain sums are quicker than one over both ends."""
    if dimension < 0:
        work, dimension = work.sum(3), 1
    torch.sum(work, dimension, out=out)


def measure(tensor: Tensor, axis: int, scratch: Scratch, tolerance: float, out: Tensor) -> bool:
    """Count a tensor's zeros, and add up its magnitudes where ``out`` has two rows, without allocating.

    Args:
        tensor: Any shape, neurons along ``axis``; must not require a gradient.
        axis: The neurons' dimension, ≥ 0.
        scratch: Reusable buffers.
        tolerance: ``|x| <= tolerance`` counts as zero.
        out: float32 ``(1 or 2, N)``: zeros, and the sum of ``|x|``. Exact: no count reaches 2**24.

    Returns:
        Whether it could be; if not, the plain formula must do it.
    """
    plan = scratch.plan(tensor, axis, out.shape[0])
    if plan is None:
        return False
    plan.fill(tensor, tolerance, out)
    return True


def count_zeros(tensor: Tensor, axis: int, scratch: Scratch, tolerance: float = 0.0) -> Tensor:
    """Zeros of each neuron.

    Args:
        tensor: Any shape, neurons along ``axis``; must not require a gradient.
        axis: The neurons' dimension, ≥ 0.
        scratch: Reusable buffers.
        tolerance: ``|x| <= tolerance`` counts as zero.

    Returns:
        int64 ``(N,)`` on the tensor's device.
    """
    counts = torch.empty(1, tensor.shape[axis], dtype=torch.float32, device="cpu")
    if measure(tensor, axis, scratch, tolerance, counts):
        return counts[0].long()
    return plain_zeros(tensor, axis, tolerance)


def count_outputs(tensor: Tensor, axis: int, scratch: Scratch, tolerance: float = 0.0) -> OutputCounts:
    """Zeros, non-finite values and summed magnitudes of each neuron.

    Args:
        tensor: Output of an activation, any shape, neurons along ``axis``; must not require a gradient.
        axis: The neurons' dimension, ≥ 0.
        scratch: Reusable buffers.
        tolerance: ``|y| <= tolerance`` counts as zero.

    Returns:
        See :class:`OutputCounts`; on the tensor's device.
    """
    counts = torch.empty(2, tensor.shape[axis], dtype=torch.float32, device="cpu")
    if measure(tensor, axis, scratch, tolerance, counts) and is_finite(counts):
        return OutputCounts(counts[0].long(), None, counts[1].double())
    return OutputCounts(*plain_outputs(tensor, axis, tolerance))


def is_finite(counts: Tensor) -> bool:
    """Whether the magnitudes among counts on the CPU are all finite (zeros always are); no device is waited for."""
    return math.isfinite(counts.sum().item())
