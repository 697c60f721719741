"""From tensors to per-neuron counts: the only arithmetic on the hot path.

The obvious ``(y == 0).sum(dims)`` costs 14 to 20 passes over a tensor on a CPU, blocks that stay in its cache one to
two (see :mod:`neuronscope.count.cpu_kernels`). On other devices, and where ``torch.compile`` traces, the plain formula
stands: a compiler fuses it. No path waits for a device, none draws a random number, and none keeps the tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neuronscope.count.cpu_kernels import ScratchBuffers

__all__ = ["OutputCounts", "ScratchBuffers", "count_outputs", "count_zeros", "measure", "plain_outputs", "plain_zeros"]


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


def measure(tensor: Tensor, axis: int, scratch: ScratchBuffers, tolerance: float, out: Tensor) -> bool:
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


def count_zeros(tensor: Tensor, axis: int, scratch: ScratchBuffers, tolerance: float = 0.0) -> Tensor:
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


def count_outputs(tensor: Tensor, axis: int, scratch: ScratchBuffers, tolerance: float = 0.0) -> OutputCounts:
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
