"""Meter: the running counts of one site, updated in place on its device, in eager mode and in compiled graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from neuronscope.counting import Scratch, count_outputs, count_zeros, plain_outputs, plain_zeros

__all__ = ["NEVER", "Meter", "add_gradients", "add_outputs", "ask_gradients", "gate_half"]

#: ``first_active_step`` of a neuron that was not seen to fire.
NEVER = 1 << 62


class Meter:
    """The running counts of one site in one phase, on the site's device, until they are read.

    Counters are updated in place and keep their identity over resets, so that a compiled graph may hold them. What a
    compiled graph adds to Python's own integers goes through ``traced``. A gated product has no gradient counts of its
    own: its pre-activation is its gate's, whose meter is ``gate``.

    Args:
        neurons: ``N``.
        device: Where the activation lives.
    """

    def __init__(self, neurons: int, device: torch.device) -> None:
        self.neurons = neurons
        self.open = True
        self.in_graph = False  # whether a compiled graph holds it
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

    @property
    def untouched(self) -> bool:
        """Whether it certainly holds nothing; what a compiled graph added cannot be known without waiting."""
        return not (self.in_graph or self.positions or self.gradient_positions)

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
