"""Reduce tensors to counts of each neuron: the only arithmetic on the hot path.

The plain formula ``(y == 0).sum(dims)`` takes as long as 14 to 20 passes over the tensor on a CPU. Counting in blocks
that stay in the cache takes one to two: see :mod:`neuronscope.count.cpu_kernels`. While ``torch.compile`` traces, the
plain formula is used, because a compiler fuses it. On other devices :mod:`neuronscope.count.backends` counts. No
function here synchronizes with a device, draws a random number, or keeps the tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neuronscope.count.cpu_kernels import ScratchBuffers

__all__ = ["OutputCounts", "ScratchBuffers", "count_outputs", "count_zeros", "measure", "plain_outputs", "plain_zeros"]

#: Sums of magnitudes below this do not overflow float32 where a window adds up 2**18 of them (4096 times 64 rows).
_MOST_SUM = 2.0**110


class OutputCounts(NamedTuple):
    """The counts of one output tensor, ``(N,)`` each.

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
    """Count zeros as :func:`count_zeros` does, by the plain formula, which a compiler fuses.

    Args:
        tensor: Any shape, neurons along ``axis``.
        axis: Dimension of the neurons, ≥ 0.
        tolerance: ``|x| <= tolerance`` counts as zero.

    Returns:
        int64 ``(N,)``.
    """
    zero = tensor == 0 if tolerance == 0 else tensor.abs() <= tolerance
    others = _others(tensor, axis)
    return zero.sum(others) if others else zero.long()


def plain_outputs(tensor: Tensor, axis: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Count outputs as :func:`count_outputs` does, by the plain formula, which a compiler fuses.

    Args:
        tensor: Any shape, neurons along ``axis``.
        axis: Dimension of the neurons, ≥ 0.
        tolerance: ``|y| <= tolerance`` counts as zero.

    Returns:
        Zeros (int64), non-finite values (int64) and summed magnitudes, ``(N,)`` each. Magnitudes are float64 on the CPU
        and of float64 tensors, elsewhere float32: some devices have no float64.
    """
    others = _others(tensor, axis)
    magnitude = tensor.abs()
    bad = ~(magnitude < math.inf)  # one comparison fewer than `isfinite`: a compiler takes long for each operator
    magnitude = magnitude.masked_fill(bad, 0)
    wide = torch.float64 if tensor.dtype is torch.float64 or tensor.device.type == "cpu" else torch.float32
    if not others:
        return plain_zeros(tensor, axis, tolerance), bad.long(), magnitude.to(wide)
    return plain_zeros(tensor, axis, tolerance), bad.sum(others), magnitude.sum(others, dtype=wide)


def measure(tensor: Tensor, axis: int, scratch: ScratchBuffers, tolerance: float, out: Tensor) -> bool:
    """Count the zeros of a tensor, and add up its magnitudes if ``out`` has two rows, without allocating memory.

    Args:
        tensor: Any shape, neurons along ``axis``; must not require a gradient.
        axis: Dimension of the neurons, ≥ 0.
        scratch: Reusable buffers.
        tolerance: ``|x| <= tolerance`` counts as zero.
        out: float32 ``(1 or 2, N)``, is overwritten: zeros, and the sum of ``|x|``. Zeros are exact, because no count
            reaches 2**24.

    Returns:
        False if the tensor cannot be counted in this way; then the plain formula must be used.
    """
    plan = scratch.plan(tensor, axis, out.shape[0])
    if plan is None:
        return False
    plan.fill(tensor, tolerance, out)
    return True


def count_zeros(tensor: Tensor, axis: int, scratch: ScratchBuffers, tolerance: float = 0.0) -> Tensor:
    """Count the zeros of each neuron.

    Args:
        tensor: Any shape, neurons along ``axis``; must not require a gradient.
        axis: Dimension of the neurons, ≥ 0.
        scratch: Reusable buffers.
        tolerance: ``|x| <= tolerance`` counts as zero.

    Returns:
        int64 ``(N,)`` on the tensor's device.
    """
    counts = torch.empty(1, tensor.shape[axis], dtype=torch.float32, device="cpu")
    if measure(tensor, axis, scratch, tolerance, counts):
        return counts[0].long()
    return plain_zeros(tensor, axis, tolerance)


def count_outputs(tensor: Tensor, axis: int, scratch: ScratchBuffers, tolerance: float = 0.0) -> OutputCounts:
    """Count zeros and non-finite values of each neuron, and add up its magnitudes.

    Args:
        tensor: Output of an activation, any shape, neurons along ``axis``; must not require a gradient.
        axis: Dimension of the neurons, ≥ 0.
        scratch: Reusable buffers.
        tolerance: ``|y| <= tolerance`` counts as zero.

    Returns:
        The counts, on the tensor's device.
    """
    counts = torch.empty(2, tensor.shape[axis], dtype=torch.float32, device="cpu")
    if measure(tensor, axis, scratch, tolerance, counts) and fits_float32(counts):
        return OutputCounts(counts[0].long(), None, counts[1].double())
    return OutputCounts(*plain_outputs(tensor, axis, tolerance))


def fits_float32(counts: Tensor) -> bool:
    """Whether all magnitudes in ``counts`` are finite, and so small that a window adds them up in float32.

    ``counts`` is on the CPU, so this does not synchronize.
    """
    return bool(counts.sum().item() < _MOST_SUM)
