"""From tensors to per-neuron counts: the only arithmetic on the hot path.

The obvious ``(y == 0).sum(dims)`` costs 14 to 20 passes over a tensor on a CPU. Here a cache-sized block is compared into
a float buffer, and a product with ones adds it up, at the speed of the matrix product: a block's float32 count is exact
below 2**24, and is added to int64. On other devices, and where ``torch.compile`` traces, the plain formula stands: a
compiler fuses it. No path waits for a device, none draws a random number, and none keeps the tensor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NEVER", "Meter", "OutputCounts", "Scratch", "add_gradients", "add_outputs", "ask_gradients", "count_outputs", "count_zeros", "gate_half"]

#: Elements compared at a time: 1 MB of float32, which stays in a core's cache.
BLOCK = 1 << 18
#: Largest count that float32 holds exactly.
_EXACT = 1 << 24
#: ``first_active_step`` of a neuron that was not seen to fire.
NEVER = 1 << 62


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


def _plain_zeros(tensor: Tensor, axis: int, tolerance: float) -> Tensor:
    zero = tensor == 0 if tolerance == 0 else tensor.abs() <= tolerance
    others = _others(tensor, axis)
    return zero.sum(others) if others else zero.long()


def _plain_outputs(tensor: Tensor, axis: int, tolerance: float) -> OutputCounts:
    others = _others(tensor, axis)
    finite = torch.isfinite(tensor)
    magnitude = torch.where(finite, tensor.abs(), 0)
    wide = torch.float64 if tensor.device.type == "cpu" else torch.float32
    if not others:
        return OutputCounts(_plain_zeros(tensor, axis, tolerance), (~finite).long(), magnitude.to(torch.float64))
    return OutputCounts(
        _plain_zeros(tensor, axis, tolerance),
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
        order = sorted(range(tensor.dim()), key=lambda dimension: (-tensor.stride(dimension), dimension))
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
    return _plain_zeros(tensor, axis, tolerance)


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
        return _plain_outputs(tensor, axis, tolerance)
    blocks = _Blocks(tensor, axis, scratch)
    abs_sum = blocks.abs_sum()
    if math.isfinite(abs_sum.sum().item()):  # on the CPU: no device to wait for
        return OutputCounts(blocks.zeros(tolerance), None, abs_sum)
    return _plain_outputs(tensor, axis, tolerance)


class Meter:
    """The running counts of one site in one phase, on the site's device, until they are read.

    Counters are updated in place and keep their identity over resets, so that a compiled graph may hold them. What a
    compiled graph adds to Python's own integers goes through ``traced``. A gated product has no gradient counts of its own:
    its pre-activation is its gate's, whose meter is ``gate``.

    Args:
        neurons: ``N``.
        device: Where the activation lives.
    """

    def __init__(self, neurons: int, device: torch.device) -> None:
        self.neurons = neurons
        self.open = True
        self.gate: Meter | None = None
        with torch.inference_mode(False):
            self.zero_outputs = torch.zeros(neurons, dtype=torch.int64, device=device)
            self.zero_gradients = torch.zeros(neurons, dtype=torch.int64, device=device)
            self.not_finite = torch.zeros(neurons, dtype=torch.int64, device=device)
            self.abs_sum = torch.zeros(neurons, dtype=torch.float64, device=device)
            self.last_active = torch.full((neurons,), -1, dtype=torch.int64, device=device)
            self.first_active = torch.full((neurons,), NEVER, dtype=torch.int64, device=device)
            self.traced = torch.zeros(3, dtype=torch.int64, device=device)
        self.positions = 0
        self.gradient_positions = 0
        self.examples = 0

    def totals(self) -> tuple[int, int, int]:
        """Positions, gradient positions and examples so far. Waits for the device."""
        traced = self.traced.tolist()
        return self.positions + traced[0], self.gradient_positions + traced[1], self.examples + traced[2]

    def reset(self) -> None:
        """Start again from nothing, in the same tensors."""
        with torch.inference_mode(False), torch.no_grad():
            for counter in (self.zero_outputs, self.zero_gradients, self.not_finite, self.abs_sum, self.traced):
                counter.zero_()
            self.last_active.fill_(-1)
            self.first_active.fill_(NEVER)
        self.positions = self.gradient_positions = self.examples = 0


def add_outputs(
    meter: Meter, y: Tensor, axis: int, examples: int, step: int | Tensor, scratch: Scratch, tolerance: float
) -> None:
    """Count one output tensor.

    A function and no method, since ``torch.compile`` traces no method of an object that it holds as a constant.

    Args:
        meter: The site's meter.
        y: Output ``(…, N, …)``, detached.
        axis: The neurons' dimension.
        examples: Independent examples behind it.
        step: The optimizer step it belongs to: a tensor where ``torch.compile`` traces, else an integer.
        scratch: Reusable buffers.
        tolerance: See :class:`neuronscope.verdicts.Policy`.
    """
    if torch.compiler.is_compiling():
        counters = (meter.zero_outputs, meter.not_finite, meter.abs_sum, meter.last_active, meter.first_active)
        _add_outputs_in_graph(y, axis, examples, step, tolerance, meter.traced, *counters)
        return
    positions = y.numel() // meter.neurons
    counts = count_outputs(y, axis, scratch, tolerance)
    meter.zero_outputs.add_(counts.zeros)
    meter.abs_sum.add_(counts.abs_sum)
    idle = counts.zeros
    if counts.not_finite is not None:
        meter.not_finite.add_(counts.not_finite)
        idle = idle + counts.not_finite
    fired = idle < positions
    meter.last_active.masked_fill_(fired, step)
    meter.first_active.masked_fill_(fired.logical_and_(meter.first_active == NEVER), step)
    meter.positions += positions
    meter.examples += examples


def add_gradients(meter: Meter, gradient: Tensor, axis: int, scratch: Scratch) -> None:
    """Count one gradient at the pre-activation, ``(…, N, …)``, detached; the rest as in :func:`add_outputs`."""
    meter.zero_gradients.add_(count_zeros(gradient, axis, scratch))
    meter.gradient_positions += gradient.numel() // meter.neurons


def ask_gradients(x: Tensor, axis: int, halved: int | None, meter: Meter) -> None:
    """Count the gradient of ``x`` when it comes, in a graph that ``torch.compile`` traces.

    Args:
        x: The pre-activation.
        axis: The neurons' dimension.
        halved: The dimension whose second half is the gate (GLU), else ``None``.
        meter: The site's meter.
    """
    _ask_gradients_in_graph(x, axis, halved, meter.zero_gradients, meter.traced)


def gate_half(gradient: Tensor, halved: int | None) -> Tensor:
    """The part of a gradient that belongs to the gate: the second half along ``halved``, or all of it."""
    if halved is None:
        return gradient
    half = gradient.shape[halved] // 2
    return gradient.narrow(halved, half, half)


# In a compiled graph these are single calls, that the compiler's back end opens and fuses with what is around them.


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator, unused-ignore]
def _add_outputs_in_graph(
    y: Tensor,
    axis: int,
    examples: int,
    step: Tensor,
    tolerance: float,
    traced: Tensor,
    zero_outputs: Tensor,
    not_finite: Tensor,
    abs_sum: Tensor,
    last_active: Tensor,
    first_active: Tensor,
) -> None:
    counts = _plain_outputs(y.detach(), axis, tolerance)
    assert counts.not_finite is not None
    positions = y.numel() // y.shape[axis]
    zero_outputs.add_(counts.zeros)
    not_finite.add_(counts.not_finite)
    abs_sum.add_(counts.abs_sum)
    fired = counts.zeros + counts.not_finite < positions
    last_active.copy_(torch.where(fired, step, last_active))
    first_active.copy_(torch.where(fired & (first_active == NEVER), step, first_active))
    traced[0].add_(positions)
    traced[2].add_(examples)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator, unused-ignore]
def _ask_gradients_in_graph(x: Tensor, axis: int, halved: int | None, zero_gradients: Tensor, traced: Tensor) -> None:
    def count(gradient: Tensor) -> None:
        part = gate_half(gradient, halved).detach()
        zero_gradients.add_(_plain_zeros(part, axis, 0.0))
        traced[1].add_(part.numel() // part.shape[axis])

    x.register_hook(count)
