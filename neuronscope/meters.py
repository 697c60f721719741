"""Meter: the running counts of one site, updated in place on its device, in eager mode and in compiled graphs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neuronscope.counting import Scratch, is_finite, measure, plain_outputs, plain_zeros
from neuronscope.rows import NEVER, Rows

__all__ = ["NEVER", "Counters", "Meter", "add_gradients", "add_outputs", "ask_gradients", "gate_half"]


class Counters(NamedTuple):
    """The running counts of one site, ``(N,)`` each, on its device; see :class:`neuronscope.census.Tally`.

    Attributes:
        zero_outputs: int64.
        zero_gradients: int64.
        not_finite: int64.
        abs_sum: float64.
        last_active: int64; −1 = never.
        first_active: int64; ``NEVER`` = never.
        traced: int64 ``(3,)``: positions, gradient positions and examples that compiled graphs have added.
    """

    zero_outputs: Tensor
    zero_gradients: Tensor
    not_finite: Tensor
    abs_sum: Tensor
    last_active: Tensor
    first_active: Tensor
    traced: Tensor


class Meter:
    """The running counts of one site in one phase, on the site's device, until they are read.

    ``counters`` are updated in place and keep their identity over resets, so that a compiled graph may hold them; what
    it adds to Python's own integers goes through ``traced``. On the CPU, what is counted in eager mode waits in rows
    and is settled before anything is read. A gated product has no gradient counts of its own: its pre-activation is
    its gate's, whose meter is ``gate``. What is counted of a distributed tensor is cut as ``cut`` says: see
    :func:`neuronscope.shards.cut`.

    Args:
        neurons: ``N``.
        device: Where the activation lives.
    """

    def __init__(self, neurons: int, device: torch.device) -> None:
        self.neurons = neurons
        self.open = True
        self.gate: Meter | None = None
        self.cut: tuple[int | None, ...] = ()
        with torch.inference_mode(False):
            long, double = (torch.zeros(neurons, dtype=kind, device=device) for kind in (torch.int64, torch.float64))
            self.counters = Counters(
                zero_outputs=long,
                zero_gradients=long.clone(),
                not_finite=long.clone(),
                abs_sum=double,
                last_active=torch.full((neurons,), -1, dtype=torch.int64, device=device),
                first_active=torch.full((neurons,), NEVER, dtype=torch.int64, device=device),
                traced=torch.zeros(3, dtype=torch.int64, device=device),
            )
        self.outputs = Rows(2, neurons)
        self.gradients = Rows(1, neurons)
        self.positions = 0
        self.gradient_positions = 0
        self.examples = 0

    def settle(self) -> Counters:
        """Add up what waits; gives the counters, which are whole until the next tensor is counted."""
        counters = self.counters
        with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
            if len(self.outputs):
                self._add(self.outputs.zeros(), self.outputs.magnitudes(), *self.outputs.active())
                self.outputs.clear()
            if len(self.gradients):
                counters.zero_gradients.add_(self.gradients.zeros())
                self.gradients.clear()
        return counters

    def _add(self, zeros: Tensor, magnitudes: Tensor, last_active: Tensor, first_active: Tensor) -> None:
        counters = self.counters
        counters.zero_outputs.add_(zeros)
        counters.abs_sum.add_(magnitudes)
        torch.maximum(counters.last_active, last_active, out=counters.last_active)
        torch.minimum(counters.first_active, first_active, out=counters.first_active)

    def add_plain(self, y: Tensor, axis: int, step: int, tolerance: float) -> None:
        """Count one output by the plain formula, as :func:`add_outputs`."""
        zeros, bad, magnitudes = plain_outputs(y, axis, tolerance)
        fired = zeros + bad < y.numel() // self.neurons
        self.counters.not_finite.add_(bad)
        self._add(zeros, magnitudes, torch.where(fired, step, -1), torch.where(fired, step, NEVER))

    def totals(self) -> tuple[int, int, int]:
        """Positions, gradient positions and examples so far. Waits for the device."""
        traced = self.counters.traced.tolist()
        return self.positions + traced[0], self.gradient_positions + traced[1], self.examples + traced[2]

    def reset(self) -> None:
        """Start again from nothing, in the same tensors."""
        self.outputs.clear()
        self.gradients.clear()
        with torch.inference_mode(False), torch.no_grad():
            for counter in self.counters:
                counter.zero_()
            self.counters.last_active.fill_(-1)
            self.counters.first_active.fill_(NEVER)
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
    if isinstance(step, Tensor):
        _add_outputs_in_graph(y, axis, examples, step, tolerance, *meter.counters)
        return
    rows = meter.outputs
    row = rows.next()
    positions = y.numel() // meter.neurons
    if measure(y, axis, scratch, tolerance, row) and is_finite(row):
        rows.keep(positions=positions, step=step)
        if rows.full:
            meter.settle()
    else:
        meter.add_plain(y, axis, step, tolerance)
    meter.positions += positions
    meter.examples += examples


def add_gradients(meter: Meter, gradient: Tensor, axis: int, scratch: Scratch) -> None:
    """Count one gradient at the pre-activation, ``(…, N, …)``, detached; the rest as in :func:`add_outputs`."""
    rows = meter.gradients
    positions = gradient.numel() // meter.neurons
    if measure(gradient, axis, scratch, 0.0, rows.next()):
        rows.keep(positions=positions, step=0)
        if rows.full:
            meter.settle()
    else:
        meter.counters.zero_gradients.add_(plain_zeros(gradient, axis, 0.0))
    meter.gradient_positions += positions


def ask_gradients(x: Tensor, axis: int, halved: int | None, meter: Meter) -> None:
    """Count the gradient of ``x`` when it comes, in a graph that ``torch.compile`` traces.

    Args:
        x: The pre-activation.
        axis: The neurons' dimension.
        halved: The dimension whose second half is the gate (GLU), else ``None``.
        meter: The site's meter.
    """
    _ask_gradients_in_graph(x, axis, halved, meter.counters.zero_gradients, meter.counters.traced)


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
    *counters: Tensor,
) -> None:
    zero_outputs, _, not_finite, abs_sum, last_active, first_active, traced = counters
    zeros, bad, magnitudes = plain_outputs(y.detach(), axis, tolerance)
    positions = y.numel() // y.shape[axis]
    zero_outputs.add_(zeros)
    not_finite.add_(bad)
    abs_sum.add_(magnitudes)
    fired = zeros + bad < positions
    last_active.copy_(torch.where(fired, step, last_active))
    first_active.copy_(torch.where(fired & (first_active == NEVER), step, first_active))
    traced[0].add_(positions)
    traced[2].add_(examples)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator, unused-ignore]
def _ask_gradients_in_graph(x: Tensor, axis: int, halved: int | None, zero_gradients: Tensor, traced: Tensor) -> None:
    def count(gradient: Tensor) -> None:
        part = gate_half(gradient, halved).detach()
        zero_gradients.add_(plain_zeros(part, axis, 0.0))
        traced[1].add_(part.numel() // part.shape[axis])

    x.register_hook(count)
