"""From tensors to per-neuron counts: the only arithmetic on the hot path.

The obvious ``(y == 0).sum(dims)`` costs 14 to 20 passes over a tensor on a CPU. Here a cache-sized block is compared
into a float buffer, and a product with ones adds it up, at the speed of the matrix product: a block's float32 count is
exact below 2**24, and is added to int64. On other devices, and where ``torch.compile`` traces, the plain formula
stands: a compiler fuses it. No path waits for a device, none draws a random number, and none keeps the tensor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OutputCounts", "Scratch", "count_outputs", "count_zeros", "plain_outputs", "plain_zeros"]

#: Elements compared at a time: 1 MB of float32, which stays in a core's cache.
BLOCK = 1 << 18
#: Largest count that float32 holds exactly.
_EXACT = 1 << 24


class Scratch(threading.local):
    """A buffer and a vector of ones, made once a thread and reused, so that counting allocates next to nothing."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.float32, device="cpu")
        self.ones = torch.empty(0, dtype=torch.float32, device="cpu")

    def take(self, elements: int) -> tuple[Tensor, Tensor]:
        """A float32 buffer of at least ``elements`` and as many ones."""
        if self.buffer.numel() < elements:
            with torch.inference_mode(False):
                self.buffer = torch.empty(max(elements, BLOCK), dtype=torch.float32, device="cpu")
                self.ones = torch.ones(max(elements, BLOCK), dtype=torch.float32, device="cpu")
        return self.buffer, self.ones


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


def _blocked(tensor: Tensor) -> bool:
    """Whether blocks are the quick way for this tensor; otherwise the plain formula is."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_floating_point()
        and type(tensor) is Tensor
        and tensor.numel() > 0
    )


class _Blocks:
    """A tensor laid out as a matrix whose rows or columns are neurons, to be reduced block by block.

    With neurons innermost the matrix is ``(positions, N)`` and its columns are added up; otherwise it is
    ``(outer × N, inner)``, its rows are added up and then the outer parts.
    """

    def __init__(self, tensor: Tensor, axis: int, scratch: Scratch) -> None:
        self.neurons = tensor.shape[axis]
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda dimension: (-strides[dimension], dimension))
        if order != list(range(tensor.dim())):
            dense = tensor.permute(order)
            if dense.is_contiguous():  # channels_last, or a transpose: walk memory in its own order
                tensor, axis = dense, order.index(axis)
        self.columns = axis == tensor.dim() - 1
        if self.columns:
            self.matrix = tensor.reshape(-1, self.neurons)
        else:
            self.matrix = tensor.reshape(math.prod(tensor.shape[: axis + 1]), -1)
        length = self.matrix.shape[1]
        self.rows_at_once = max(1, BLOCK // length)
        self.buffer, self.ones = scratch.take(length * min(self.rows_at_once, self.matrix.shape[0]))
        if self.ones.numel() < self.rows_at_once:
            self.buffer, self.ones = scratch.take(self.rows_at_once)

    def zeros(self, tolerance: float) -> Tensor:
        """Zero elements of each neuron, int64 ``(N,)``."""
        if tolerance == 0:
            return self._reduce(lambda block, out: torch.eq(block, 0, out=out)).long()
        return self._reduce(lambda block, out: torch.le(block.abs(), tolerance, out=out)).long()

    def abs_sum(self) -> Tensor:
        """Sum of magnitudes of each neuron, float64 ``(N,)``; not finite where an element is not."""
        return self._reduce(lambda block, out: out.copy_(block).abs_())

    def _reduce(self, fill: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Fill the buffer from each block, and add up each neuron's part of it, float64 ``(N,)``."""
        matrix, rows, length = self.matrix, self.matrix.shape[0], self.matrix.shape[1]
        if self.columns:
            total = torch.zeros(length, dtype=torch.float64, device="cpu")
            part = torch.empty(1, length, dtype=torch.float32, device="cpu")
        else:
            parts = torch.empty(rows, dtype=torch.float32, device="cpu")
        for start in range(0, rows, self.rows_at_once):
            block = matrix[start : start + self.rows_at_once]
            height = block.shape[0]
            work = self.buffer[: height * length].view(height, length)
            fill(block, work)
            if self.columns:
                torch.mm(self.ones[:height].view(1, height), work, out=part)
                total += part[0]
            else:
                torch.mv(work, self.ones[:length], out=parts[start : start + height])
        if self.columns:
            return total
        return parts.view(-1, self.neurons).sum(0, dtype=torch.float64)


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
    if _blocked(tensor) and tensor.numel() // tensor.shape[axis] < _EXACT:
        return _Blocks(tensor, axis, scratch).zeros(tolerance)
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
    if not _blocked(tensor) or tensor.numel() // tensor.shape[axis] >= _EXACT:
        return OutputCounts(*plain_outputs(tensor, axis, tolerance))
    blocks = _Blocks(tensor, axis, scratch)
    abs_sum = blocks.abs_sum()
    if math.isfinite(abs_sum.sum().item()):  # on the CPU: no device to wait for
        return OutputCounts(blocks.zeros(tolerance), None, abs_sum)
    return OutputCounts(*plain_outputs(tensor, axis, tolerance))
