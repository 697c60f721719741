"""Keep the running counts of one site: updated in place on its device, in eager mode and in compiled graphs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuronscope.count.counter_tensors import NEVER, CounterTensors, WindowCounts, add_whole, wide_tensors
from neuronscope.count.cpu_kernels import ScratchBuffers, fits_float32
from neuronscope.count.neuron_layout import NeuronLayout
from neuronscope.count.pending_counts import PendingCounts
from neuronscope.count.pieces import Pieces, TensorToCount
from neuronscope.count.small_tensors import SMALL, SmallTensors

__all__ = ["SiteCounters", "add_gradients", "add_outputs"]

#: Size of the buffer in which the counts of a wide layer are added up, part by part: 512 kB stay in the cache.
_AT_ONCE = 1 << 17


class SiteCounters:
    """Count the outputs and gradients of one site in one phase, on the site's device.

    In eager mode the host knows how much is added, and counts are kept in ``window``, in 20 bytes a neuron, until it is
    full. A graph counts on the device, where nobody knows how much it adds; it adds to ``tensors``, in 64 bits. Both
    are made when they are needed. On the CPU counts wait first, in ``outputs``, ``gradients``, ``small_outputs`` and
    ``small_gradients``; :meth:`add_waiting` adds them.

    Args:
        neurons: Number of neurons, ``N``.
        device: Device of the activation.

    Attributes:
        window: The newest counts; complete after :meth:`add_waiting`. ``None`` if there are none.
        open: Whether gradients are still counted; false after the watch has ended.
        in_graph: Whether a compiled graph, or a captured one, holds the tensors.
        clock: Where compiled graphs read the optimizer step, int64 without dimensions; set when there is a graph.
        shared: Whether the tensors are views of larger ones, in which several sites are counted together.
        unreadable: Whether an output was seen that cannot be counted. Then the gradients do not belong to what is
            counted, and a tally has none.
        incomplete: Whether a call was not counted. Then no census has the site.
        gate: The counters of the gate if the site is a gated product. A product has no gradient counts of its own:
            its pre-activation is that of its gate.
        sharded_dims: How the counted tensors are sharded: see :func:`neuronscope.attach.dtensor.sharded_dims`.
        positions: Positions that were counted in eager mode; those of compiled graphs are in ``tensors.traced``.
        gradient_positions: The same for gradients.
        examples: The same for examples.
        traced: See :class:`~neuronscope.count.counter_tensors.CounterTensors`, and so is the next.
        traced_gradients: See there.
        last_forward: Number of the last forward that a graph of a part of the model counted: int64, without dimensions.
    """

    def __init__(self, neurons: int, device: torch.device) -> None:
        self.neurons = neurons
        self.open = True
        self.in_graph = False
        self.shared = False
        self.window: WindowCounts | None = None
        self._wide: CounterTensors | None = None
        self.unreadable = False
        self.incomplete = False
        self.gate: SiteCounters | None = None
        self.clock: Tensor
        self.sharded_dims: tuple[int | None, ...] = ()
        with torch.inference_mode(False):
            self.traced = torch.zeros(2, dtype=torch.int64, device=device)
            self.traced_gradients = torch.zeros(1, dtype=torch.int64, device=device)
            self.last_forward = torch.full((), -1, dtype=torch.int64, device=device)
        self.outputs = PendingCounts(2, neurons)
        self.gradients = PendingCounts(1, neurons)
        self.small_outputs = SmallTensors(2, self.outputs.room)
        self.small_gradients = SmallTensors(1, self.gradients.room)
        self.positions = 0
        self.gradient_positions = 0
        self.examples = 0
        self._by_step: list[tuple[int, int, Tensor | None]] = []  # see `note_step`
        self._forward = -1  # number of the last forward that was counted
        #: Where the first call of a forward was traced: compilation, attempt, and changes of the counters until then.
        self._first_traced: tuple[Any, int, int] = None, 0, -1
        self._forward_positions = 0  # its positions and its examples so far
        self._forward_examples = 0

    @functools.cached_property
    def tensors(self) -> CounterTensors:
        """Counts in 64 bits, which keep their identity over resets from the first use on: a graph may hold them."""
        return self._in_64_bits()

    @property
    def wide(self) -> CounterTensors | None:
        """Counts in 64 bits as far as there are any; with those of ``window`` they are all."""
        return self._wide

    def _in_64_bits(self) -> CounterTensors:
        if self._wide is None:
            with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
                self._wide = wide_tensors(self.neurons, self.traced, self.traced_gradients)
        return self._wide

    @property
    def of_outputs(self) -> tuple[Tensor, ...]:
        """The tensors that a graph changes which counts an output."""
        return (*self.tensors.of_outputs, self.last_forward)

    def enter_graph(self) -> None:
        """Note that a graph holds the tensors from now on. They are there before they are traced."""
        self.in_graph = True
        self.tensors = self._in_64_bits()

    def room_for(self, positions: int, first: int, last: int) -> tuple[CounterTensors, WindowCounts | None]:
        """Return the tensors to which outputs are to be added, and the window that these belong to, if to any.

        Args:
            positions: Positions of the outputs.
            first: Their first optimizer step.
            last: Their last one.
        """
        window = self.window
        if window is None or not window.take(positions, first, last):
            window = self._new_window()
            if not window.take(positions, first, last):
                return self._in_64_bits(), None
        return window.tensors, window

    def room_for_gradients(self, positions: int) -> CounterTensors:
        """Return the tensors to which the zeros of gradients are to be added.

        Args:
            positions: Positions of the gradients.
        """
        window = self.window
        if window is None or not window.take_gradients(positions):
            window = self._new_window()
            if not window.take_gradients(positions):
                return self._in_64_bits()
        return window.tensors

    def _new_window(self) -> WindowCounts:
        """Begin a new window; the counts of the one before it, if any, go on in 64 bits."""
        if self.window is not None:
            with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
                self.window.carry_to(self._in_64_bits())
        with torch.inference_mode(False):
            self.window = WindowCounts(self.neurons, self.traced, self.traced_gradients)
        return self.window

    def note_step(self, step: int) -> None:
        """Note that everything counted so far is of this optimizer step or an earlier one. Does not synchronize.

        Args:
            step: Number of the step.
        """
        if self._by_step and self._by_step[-1][0] == step:
            self._by_step.pop()
        traced = None
        if self.counts_on_device:
            with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
                traced = self.traced[0].clone()
        self._by_step.append((step, self.positions, traced))

    def positions_by_step(self) -> tuple[tuple[int, int], ...]:
        """Return the steps that were noted, each with the positions counted up to its end."""
        traced = [each for *_, each in self._by_step if each is not None]
        copied = iter(torch.stack(traced).tolist() if traced else ())
        return tuple((step, eager + (0 if graph is None else next(copied))) for step, eager, graph in self._by_step)

    def new_examples(self, forward: int, examples: int, positions: int) -> int:
        """Return by how much the number of examples grows with a call: they count once a forward.

        Args:
            forward: Number of the forward.
            examples: Number of examples that the forward was given. A forward that goes on with the last one has its
                number, and may have fewer.
            positions: Number of positions of the call. A forward has no more examples at a site than positions.
        """
        if forward != self._forward:
            self._forward, self._forward_positions, self._forward_examples = forward, 0, 0
        self._forward_positions += positions
        before = self._forward_examples
        self._forward_examples = max(before, min(examples, self._forward_positions))
        return self._forward_examples - before

    def is_first_call(self, forward: int, attempt: tuple[Any, int]) -> bool:
        """Return whether this is the first call in a forward, in a graph that ``torch.compile`` traces.

        The compiler may drop what it traced, and trace the code again, in parts. A graph that was kept runs before the
        next one is traced, and so it has changed the counters.

        Args:
            forward: Number of the forward.
            attempt: Which compilation it is, and which attempt.
        """
        *first_attempt, changes = self._first_traced
        now = self.traced._version
        if forward == self._forward and (attempt == tuple(first_attempt) or changes != now):
            return False
        self._forward, self._first_traced = forward, (*attempt, now)
        return True

    def add_waiting(self, scratch: ScratchBuffers | None = None) -> None:
        """Add everything that waits to the tensors, which are complete until the next output or gradient is counted.

        Args:
            scratch: Buffers to reuse, for a caller that does this for the counters of many sites.
        """
        with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
            if len(self.small_outputs) or len(self.small_gradients):
                scratch = scratch or ScratchBuffers()
                self._count_small(self.small_outputs, self.outputs, scratch)
                self._count_small(self.small_gradients, self.gradients, scratch)
            self._add_rows()

    def flush(self) -> CounterTensors:
        """Return everything that was counted in 64 bits: complete until the next output or gradient is counted."""
        self.add_waiting()
        if self.window is not None:
            self.window.carry_to(self.tensors)
            self.window = None
        return self.tensors

    def share(self, tensors: CounterTensors) -> None:
        """Count from now on in views of larger tensors, in which several sites are counted together.

        Args:
            tensors: The views; what was counted so far is copied to them.
        """
        with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
            for mine, view in zip(self.flush(), tensors, strict=True):
                view.copy_(mine)
        self.tensors = self._wide = tensors
        self.shared = True
        self.traced, self.traced_gradients = tensors.traced, tensors.traced_gradients

    def make_room(self, scratch: ScratchBuffers) -> None:
        """Count the small tensors that wait, if there is no room for more."""
        with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
            if self.small_outputs.full:
                self._count_small(self.small_outputs, self.outputs, scratch)
            if self.small_gradients.full:
                self._count_small(self.small_gradients, self.gradients, scratch)

    def _count_small(self, small: SmallTensors, rows: PendingCounts, scratch: ScratchBuffers) -> None:
        """Count the small tensors that wait, if any, into rows."""
        number = len(small)
        if not number:
            return
        if len(rows) + number > rows.room:
            self._add_rows()
        counts = rows.next_rows(number)
        small.count(scratch, counts)
        if fits_float32(counts):  # always for gradients, whose zeros alone are counted
            rows.add_rows(small.tensors()[0].numel() // self.neurons, small.steps)
            if rows.full:
                self._add_rows()
        else:
            for y, step in zip(small.tensors(), small.steps, strict=True):
                self.add_plain(TensorToCount(y, NeuronLayout(small.axis), step, small.tolerance))
        small.clear()

    def _add_rows(self) -> None:
        if len(self.outputs):
            rows = self.outputs
            tensors, window = self.room_for(*rows.span)
            tensors.zero_outputs.add_(rows.zeros(tensors.zero_outputs.dtype))
            tensors.abs_sum.add_(rows.magnitudes(tensors.abs_sum.dtype))
            begin, never = (0, NEVER) if window is None else (window.first_step, window.never)
            last, first = rows.active(begin, never, tensors.last_active.dtype)
            torch.maximum(tensors.last_active, last, out=tensors.last_active)
            torch.minimum(tensors.first_active, first, out=tensors.first_active)
            rows.clear()
        if len(self.gradients):
            positions, *_ = self.gradients.span
            zero_gradients = self.room_for_gradients(positions).zero_gradients
            zero_gradients.add_(self.gradients.zeros(zero_gradients.dtype))
            self.gradients.clear()

    def add_row(self, row: Tensor, positions: int, step: int, scratch: ScratchBuffers) -> None:
        """Count one output of a wide layer.

        Args:
            row: Zeros and magnitudes, float32 ``(2, N)``, or zeros of a gradient ``(1, N)``.
            positions: Positions of the tensor, below 2**24.
            step: Optimizer step of an output.
            scratch: Reusable buffers.
        """
        with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
            work = scratch.numbers(_AT_ONCE)[:_AT_ONCE]
            if len(row) == 1:
                add_whole(row[0], self.room_for_gradients(positions).zero_gradients, work)
                return
            _, window = self.room_for(positions, step, step)
            if window is not None:  # there is room in a new one: the positions are fewer than 2**24
                window.add_row(row, positions, step, work)

    def add_plain(self, what: TensorToCount) -> None:
        """Count one output or gradient on the CPU by the plain formula."""
        Pieces().count(self._in_64_bits(), what)

    @property
    def counts_on_device(self) -> bool:
        """Whether positions and examples may have been counted in the tensors."""
        return self.in_graph or self.shared

    @property
    def untouched(self) -> bool:
        """Whether nothing was counted. False if positions are counted in the tensors, which would have to be read."""
        return not (self.counts_on_device or self.positions or self.gradient_positions)

    def totals(self, traced: Sequence[int] | None = None) -> tuple[int, int, int]:
        """Return the positions, gradient positions and examples so far.

        Args:
            traced: The numbers of ``traced`` and ``traced_gradients``, if they were copied to the host
                already. Otherwise they are copied here, which synchronizes.
        """
        if traced is None:
            traced = (*self.traced.tolist(), *self.traced_gradients.tolist())
        return self.positions + traced[0], self.gradient_positions + traced[2], self.examples + traced[1]

    def reset(self) -> None:
        """Set every count to its start: in the same tensors if anybody holds them, and without any otherwise."""
        for waiting in (self.outputs, self.gradients, self.small_outputs, self.small_gradients):
            waiting.clear()
        self.window = None
        if "tensors" not in vars(self):
            self._wide = None
        with torch.inference_mode(False), torch.no_grad():
            for counter in self._wide or (self.traced, self.traced_gradients):
                counter.zero_()
            if self._wide is not None:
                self._wide.last_active.fill_(-1)
                self._wide.first_active.fill_(NEVER)
        self.positions = self.gradient_positions = self.examples = 0
        self._by_step.clear()


def add_outputs(
    counters: SiteCounters,
    y: Tensor,
    axis: int,
    examples: int,
    step: int,
    scratch: ScratchBuffers,
    tolerance: float,
) -> None:
    """Count one output tensor on the CPU.

    Args:
        counters: The counters of the site.
        y: Output ``(…, N, …)``, detached.
        axis: Dimension of the neurons.
        examples: Number of independent examples in the output.
        step: Optimizer step of the output.
        scratch: Reusable buffers.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
    """
    numbers, small = y.numel(), counters.small_outputs
    positions = numbers // counters.neurons
    counters.positions += positions
    counters.examples += examples
    if numbers <= SMALL and small.try_add(y, axis, step, tolerance):
        if small.full:
            counters.make_room(scratch)
        return
    rows = counters.outputs
    row = rows.next() if rows.room else scratch.row(2, counters.neurons)
    if not (scratch.measure(y, axis, tolerance, row) and fits_float32(row)):
        counters.add_plain(TensorToCount(y, NeuronLayout(axis), step, tolerance))
    elif not rows.room:
        counters.add_row(row, positions, step, scratch)
    else:
        rows.add_rows(positions, (step,))
        if rows.full:
            counters.add_waiting(scratch)


def add_gradients(counters: SiteCounters, gradient: Tensor, axis: int, scratch: ScratchBuffers) -> None:
    """Count one gradient at the pre-activation on the CPU.

    Args:
        counters: The counters of the site.
        gradient: Gradient ``(…, N, …)``, detached.
        axis: Dimension of the neurons.
        scratch: Reusable buffers.
    """
    numbers, small = gradient.numel(), counters.small_gradients
    positions = numbers // counters.neurons
    counters.gradient_positions += positions
    if numbers <= SMALL and small.try_add(gradient, axis, 0, 0.0):
        if small.full:
            counters.make_room(scratch)
        return
    rows = counters.gradients
    row = rows.next() if rows.room else scratch.row(1, counters.neurons)
    if not scratch.measure(gradient, axis, 0.0, row):
        counters.add_plain(TensorToCount(gradient, NeuronLayout(axis)))
    elif not rows.room:
        counters.add_row(row, positions, 0, scratch)
    else:
        rows.add_rows(positions, (0,))
        if rows.full:
            counters.add_waiting(scratch)
