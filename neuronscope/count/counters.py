"""Keep the running counts of one site: updated in place on its device, in eager mode and in compiled graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.fx.experimental.proxy_tensor
from torch import Tensor
from torch._dynamo.trace_rules import get_torch_obj_rule_map, manual_torch_name_rule_map
from torch._dynamo.variables import TorchInGraphFunctionVariable

from neuronscope.count.counter_tensors import NEVER, CounterTensors, WindowCounts, add_whole, wide_tensors
from neuronscope.count.counting import ScratchBuffers, fits_float32, measure, plain_outputs, plain_zeros
from neuronscope.count.neuron_layout import Dims, neurons_first
from neuronscope.count.pending_counts import PendingCounts
from neuronscope.count.positions import blank_positions
from neuronscope.count.small_tensors import SMALL, SmallTensors

__all__ = [
    "SiteCounters",
    "add_gradients",
    "add_outputs",
    "gate_half",
    "handled_as",
    "leave_out",
    "once_a_forward",
    "one_call_in_graph",
    "register_gradient_hook",
    "save_unchecked",
]

#: Size of the buffer in which the counts of a wide layer are added up, part by part: 512 kB stay in the cache.
_AT_ONCE = 1 << 17

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class SiteCounters:
    """Count the outputs and gradients of one site in one phase, on the site's device.

    In eager mode the host knows what is added, and counts are kept in ``window``, in 20 bytes a neuron, until it is
    full. What counts by itself on the device adds to ``tensors``, in 64 bits: nobody knows there how much it adds.
    Either is made when it is needed. On the CPU counts wait first, in ``outputs``, ``gradients``, ``small_outputs`` and
    ``small_gradients``; :meth:`add_waiting` adds them.

    Args:
        neurons: Number of neurons, ``N``.
        device: Device of the activation.

    Attributes:
        window: The newest counts; complete after :meth:`add_waiting`. ``None`` if there are none.
        open: Whether gradients are still counted; false after the watch has ended.
        in_graph: Whether a compiled graph, or a captured one, holds the tensors.
        clock: Where compiled graphs read the optimizer step, int64 without dimensions; set when there is a graph.
        shared: Whether the tensors are counted in together with those of other sites: they are views then.
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

    def room_for_gradients(self, positions: int) -> Tensor:
        """Return the tensor to which the zeros of gradients are to be added.

        Args:
            positions: Positions of the gradients.
        """
        window = self.window
        if window is None or not window.take_gradients(positions):
            window = self._new_window()
            if not window.take_gradients(positions):
                return self._in_64_bits().zero_gradients
        return window.tensors.zero_gradients

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
            examples: Number of examples that the forward was given.
            positions: Number of positions of the call. A forward has no more examples at a site than positions.
        """
        if forward != self._forward:
            self._forward, self._forward_positions, self._forward_examples = forward, 0, 0
        self._forward_positions += positions
        before, self._forward_examples = self._forward_examples, min(examples, self._forward_positions)
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
                self._count_small_outputs(scratch)
                self._count_small_gradients(scratch)
            self._add_rows()

    def flush(self) -> CounterTensors:
        """Return everything that was counted in 64 bits: complete until the next output or gradient is counted."""
        self.add_waiting()
        if self.window is not None:
            self.window.carry_to(self.tensors)
            self.window = None
        return self.tensors

    def share(self, tensors: CounterTensors) -> None:
        """Count in other tensors from now on, which are counted in together with those of other sites.

        Args:
            tensors: Views, which get what was counted so far.
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
                self._count_small_outputs(scratch)
            if self.small_gradients.full:
                self._count_small_gradients(scratch)

    def _count_small_outputs(self, scratch: ScratchBuffers) -> None:
        small = self.small_outputs
        if len(small):
            row = self._rows_for(small, self.outputs, scratch)
            if fits_float32(row):
                self._keep(small, self.outputs)
            else:
                for y, step in zip(small.tensors(), small.steps, strict=True):
                    self.add_plain(y, small.axis, step, small.tolerance)
            small.clear()

    def _count_small_gradients(self, scratch: ScratchBuffers) -> None:
        small = self.small_gradients
        if len(small):
            self._rows_for(small, self.gradients, scratch)
            self._keep(small, self.gradients)
            small.clear()

    def _rows_for(self, small: SmallTensors, rows: PendingCounts, scratch: ScratchBuffers) -> Tensor:
        if len(rows) + len(small) > rows.room:
            self._add_rows()
        counts = rows.next_rows(len(small))
        small.count(scratch, counts)
        return counts

    def _keep(self, small: SmallTensors, rows: PendingCounts) -> None:
        rows.add_rows(small.tensors()[0].numel() // self.neurons, small.steps)
        if rows.full:
            self._add_rows()

    def _add_rows(self) -> None:
        if len(self.outputs):
            rows = self.outputs
            tensors, window = self.room_for(*rows.span)
            tensors.zero_outputs.add_(rows.zeros(tensors.zero_outputs.dtype))
            tensors.abs_sum.add_(rows.magnitudes(tensors.abs_sum.dtype))
            self._add_steps(tensors, *rows.active(*_steps_of(window), tensors.last_active.dtype))
            rows.clear()
        if len(self.gradients):
            positions, *_ = self.gradients.span
            zero_gradients = self.room_for_gradients(positions)
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
                add_whole(row[0], self.room_for_gradients(positions), work)
                return
            _, window = self.room_for(positions, step, step)
            if window is not None:  # there is room in a new one: the positions are fewer than 2**24
                window.add_row(row, positions, step, work)

    @staticmethod
    def _add_steps(tensors: CounterTensors, last: Tensor, first: Tensor) -> None:
        torch.maximum(tensors.last_active, last, out=tensors.last_active)
        torch.minimum(tensors.first_active, first, out=tensors.first_active)

    def add_plain(self, y: Tensor, axis: int, step: int, tolerance: float) -> None:
        """Count one output by the plain formula.

        Args:
            y: Output ``(…, N, …)``, detached.
            axis: Dimension of the neurons.
            step: Optimizer step of the output.
            tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
        """
        zeros, bad, magnitudes = plain_outputs(y, axis, tolerance)
        positions = y.numel() // self.neurons
        fired = zeros + bad < positions
        tensors, window = self.room_for(positions, step, step)
        if not tensors.not_finite.numel():
            tensors, window = self._in_64_bits(), None
        tensors.not_finite.add_(bad)
        tensors.zero_outputs.add_(zeros)
        tensors.abs_sum.add_(magnitudes)
        begin, never = _steps_of(window)
        self._add_steps(tensors, torch.where(fired, step - begin, -1), torch.where(fired, step - begin, never))

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


def _steps_of(window: WindowCounts | None) -> tuple[int, int]:
    """Return the step from which steps are counted, and the first one of a neuron that never fired."""
    return (0, NEVER) if window is None else (window.first_step, window.never)


def add_outputs(
    counters: SiteCounters,
    y: Tensor,
    axis: int,
    examples: int | Tensor,
    step: int | Tensor,
    scratch: ScratchBuffers,
    tolerance: float,
) -> None:
    """Count one output tensor.

    This is a function because ``torch.compile`` does not trace methods of an object that is a constant of the graph.

    Args:
        counters: The counters of the site.
        y: Output ``(…, N, …)``, detached.
        axis: Dimension of the neurons.
        examples: Number of independent examples in the output; may be a tensor while ``torch.compile`` traces.
        step: Optimizer step of the output: a tensor while ``torch.compile`` traces, otherwise an integer.
        scratch: Reusable buffers.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
    """
    if isinstance(step, Tensor):
        _add_outputs_in_graph(y, axis, examples, step, tolerance, *counters.tensors)
        return
    numbers, small = y.numel(), counters.small_outputs
    positions = numbers // counters.neurons
    counters.positions += positions
    counters.examples += int(examples)
    if numbers <= SMALL and small.try_add(y, axis, step, tolerance):
        if small.full:
            counters.make_room(scratch)
        return
    rows = counters.outputs
    row = rows.next() if rows.room else scratch.row(2, counters.neurons)
    if not (measure(y, axis, scratch, tolerance, row) and fits_float32(row)):
        counters.add_plain(y, axis, step, tolerance)
    elif not rows.room:
        counters.add_row(row, positions, step, scratch)
    else:
        rows.add_rows(positions, (step,))
        if rows.full:
            counters.add_waiting(scratch)


def add_gradients(counters: SiteCounters, gradient: Tensor, axis: int, scratch: ScratchBuffers) -> None:
    """Count one gradient at the pre-activation.

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
    if not measure(gradient, axis, scratch, 0.0, row):
        counters.room_for_gradients(positions).add_(plain_zeros(gradient, axis, 0.0))
    elif not rows.room:
        counters.add_row(row, positions, 0, scratch)
    else:
        rows.add_rows(positions, (0,))
        if rows.full:
            counters.add_waiting(scratch)


def leave_out(counters: SiteCounters, positions: Tensor, *, gradients: bool = False) -> None:
    """Take off positions that were counted with zeros in place of their numbers; it waits for no device.

    ``torch.compile`` can trace it.

    Args:
        counters: The counters of the site, which counted a tensor of
            :func:`neuronscope.count.positions.blank_positions`.
        positions: How many positions of each neuron were zeros in place of numbers, int64 without dimensions.
        gradients: Whether the tensor was a gradient, and not an output.
    """
    tensors = counters.tensors
    if gradients:
        _leave_out_in_graph(tensors.zero_gradients, tensors.traced_gradients, positions)
    else:
        _leave_out_in_graph(tensors.zero_outputs, tensors.traced, positions)


def register_gradient_hook(
    x: Tensor, axis: int, dims: Dims | None, glu_dim: int | None, counters: SiteCounters, mask: Tensor | None
) -> None:
    """Register a hook that counts the gradient of ``x``, in a graph that ``torch.compile`` traces.

    Args:
        x: The pre-activation ``(…, N, …)``.
        axis: Dimension of the neurons.
        dims: As in :class:`~neuronscope.count.neuron_layout.NeuronLayout`.
        glu_dim: The dimension whose second half is the gate (GLU), otherwise ``None``.
        counters: The counters of the site.
        mask: Which positions are counted, bool ``(B, T)``; ``None`` = all.
    """
    zero_gradients, positions = counters.tensors.zero_gradients, counters.tensors.traced_gradients
    _register_gradient_hook_in_graph(x, axis, dims, glu_dim, zero_gradients, positions, mask)


def gate_half(gradient: Tensor, glu_dim: int | None) -> Tensor:
    """Return the part of a gradient that belongs to the gate of a GLU.

    Args:
        gradient: Gradient of any shape.
        glu_dim: The dimension along which the second half is the gate; ``None`` if the site is no GLU.

    Returns:
        The second half along ``glu_dim``, or the whole gradient.
    """
    if glu_dim is None:
        return gradient
    half = gradient.shape[glu_dim] // 2
    return gradient.narrow(glu_dim, half, half)


def one_call_in_graph(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Tell ``torch.compile`` to write a function as one call into a graph; its back end fuses the body with the rest.

    ``torch.compiler.allow_in_graph`` does so too, and marks the graph: where the back end cannot compile a marked graph
    because a value in it depends on data, the compiler raises, where it runs the code of an unmarked one eagerly.
    """
    return handled_as(TorchInGraphFunctionVariable, function)


def handled_as(variable: Any, function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Tell ``torch.compile`` how to handle calls of a function, and return the function.

    Args:
        variable: The class of the compiler's variables that stand for the function.
        function: The function.
    """
    # By name too: the compiler makes the second table anew from the first, for example when DDP is set up.
    manual_torch_name_rule_map[f"{function.__module__}.{function.__qualname__}"] = variable
    get_torch_obj_rule_map()[function] = variable
    return function


@one_call_in_graph
def _add_outputs_in_graph(
    y: Tensor,
    axis: int,
    examples: int | Tensor,
    step: Tensor,
    tolerance: float,
    *tensors: Tensor,
) -> None:
    zero_outputs, _, not_finite, abs_sum, last_active, first_active, traced, _ = tensors
    # A compiler takes long for each operator, so that there are as few as possible.
    zeros, bad, magnitudes = plain_outputs(y.detach(), axis, tolerance)
    positions = y.numel() // y.shape[axis]
    zero_outputs.add_(zeros)
    not_finite.add_(bad)
    abs_sum.add_(magnitudes)
    fired = zeros + bad < positions
    last_active.masked_fill_(fired, step)
    torch.where(fired, torch.minimum(first_active, step), first_active, out=first_active)
    if isinstance(positions, int) and isinstance(examples, int) and positions == examples:
        traced.add_(positions)
    else:  # positions, examples
        traced.add_(torch.arange(2, device=traced.device) * (examples - positions) + positions)


@one_call_in_graph
def once_a_forward(examples: int, forward: Tensor, last: Tensor) -> Tensor:
    """Return the number of examples of a call in a graph, 0 if a call of the same forward was counted.

    Args:
        examples: Number of examples that the forward was given.
        forward: Number of the forward, int64 without dimensions.
        last: Number of the last forward that was counted; is changed to this one.

    Returns:
        int64 without dimensions.
    """
    fresh = last != forward
    last.copy_(torch.where(fresh, forward, last))
    return fresh * examples


@one_call_in_graph
def _leave_out_in_graph(zeros: Tensor, counted: Tensor, positions: Tensor) -> None:
    zeros.sub_(positions)
    counted[0].sub_(positions)


@one_call_in_graph
def _register_gradient_hook_in_graph(
    x: Tensor,
    axis: int,
    dims: Dims | None,
    glu_dim: int | None,
    zero_gradients: Tensor,
    positions: Tensor,
    mask: Tensor | None,
) -> None:
    save_unchecked(zero_gradients, positions)

    def count(gradient: Tensor) -> None:
        part, neurons = neurons_first(gate_half(gradient, glu_dim).detach(), axis, dims)
        left_out = None
        if dims is None:
            part, left_out = blank_positions(part, neurons, mask)
        zero_gradients.add_(plain_zeros(part, neurons, 0.0))
        positions.add_(part.numel() // part.shape[neurons])
        if left_out is not None:
            zero_gradients.sub_(left_out)
            positions.sub_(left_out)

    x.register_hook(count)


def save_unchecked(*counters: Tensor) -> None:
    """Let a backward graph keep counters although another graph may change them before it runs.

    If the forward runs twice before the first backward pass, both backward graphs add to the same counters. Torch
    refuses that for tensors that an ``autograd.Function`` saves, and allows it for those that it keeps otherwise.
    """
    for counter in counters:
        for proxy in _proxies_of(counter):
            proxy.node.meta["saved_tensor_with_no_vc_check"] = True


#: Returns the nodes of a tensor in the graph that AOTAutograd traces. Torch 2.13 has this function. Without it, graphs
#: of the back end ``aot_eager`` fail where the forward runs twice; those of Inductor tell nobody what they change.
_proxies_of = getattr(torch.fx.experimental.proxy_tensor, "_get_proxies", lambda _: ())
