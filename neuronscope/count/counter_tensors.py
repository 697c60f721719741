"""Hold the counts of one site as tensors: 64 bits wide, or in 20 bytes a neuron for as long as those suffice."""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["NEVER", "CounterTensors", "WindowCounts", "add_whole", "has_float64", "wide_tensors"]

IntArray = npt.NDArray[np.int64]

#: ``first_active_step`` of a neuron that never fired.
NEVER = 1 << 62
#: The same among the steps of a window, which are counted in 16 bits from its first one on.
_NEVER_IN_WINDOW = 2**15 - 1
#: The device where the host sees at once whether outputs are finite: there a window leaves out those that are not.
_SEEN_BY_HOST = "cpu"
#: Most positions of a window: 32 bits hold the count.
_POSITIONS = 2**31 - 1
#: Most sums that a window adds up in float32, each wrong by 2**-24 of the sum at most; in float64 there is no limit.
_SUMS = 1 << 12


class CounterTensors(NamedTuple):
    """The tensors of one site's running counts, ``(N,)`` each; see :class:`~neuronscope.tally.census.Tally`.

    Attributes:
        zero_outputs: int64; int32 in a window.
        zero_gradients: The same.
        not_finite: The same; ``(0,)`` in a window on the CPU, where outputs that are not finite are counted in 64 bits.
        abs_sum: float64; float32 on a device that has no float64.
        last_active: int64, −1 = never; int16 in a window, from its first step on.
        first_active: int64, ``NEVER`` = never; int16 in a window, from its first step on, and its largest number.
        traced: int64 ``(2,)``: positions and examples that compiled graphs added, less the positions that
            :func:`~neuronscope.count.compiled_graphs.leave_out` took off. A window has those of the site.
        traced_gradients: int64 ``(1,)``: the same for gradient positions. Like ``zero_gradients``, no forward graph
            changes it: a backward graph keeps the tensors that it changes from its forward on, and the forward may run
            again in between.
    """

    zero_outputs: Tensor
    zero_gradients: Tensor
    not_finite: Tensor
    abs_sum: Tensor
    last_active: Tensor
    first_active: Tensor
    traced: Tensor
    traced_gradients: Tensor

    @property
    def of_outputs(self) -> tuple[Tensor, ...]:
        """Those that change when an output is counted."""
        return tuple([each for name, each in zip(self._fields, self) if "gradients" not in name])  # noqa: B905


@functools.cache
def has_float64(device_type: str) -> bool:
    """Whether a type of device computes in float64.

    >>> has_float64("cpu"), has_float64("mps")
    (True, False)
    """
    if device_type in ("cpu", "meta", "cuda"):
        return True
    try:
        one = torch.ones(1, dtype=torch.float32, device=device_type)
        return (torch.zeros(1, dtype=torch.float64, device=device_type) + one).sum().item() == 1
    except (RuntimeError, TypeError, AssertionError, NotImplementedError):
        return False


def wide_tensors(neurons: int, traced: Tensor, traced_gradients: Tensor) -> CounterTensors:
    """Return counters in 64 bits that have counted nothing.

    Args:
        neurons: ``N``.
        traced: See :class:`CounterTensors`; the others are made on its device.
        traced_gradients: See there.
    """
    zeros = torch.zeros(neurons, dtype=torch.int64, device=traced.device)
    return CounterTensors(
        zeros,
        zeros.clone(),
        zeros.clone(),
        _sums_of_magnitudes(neurons, traced.device),
        torch.full_like(zeros, -1),
        torch.full_like(zeros, NEVER),
        traced,
        traced_gradients,
    )


def _sums_of_magnitudes(neurons: int, device: torch.device) -> Tensor:
    """Return zeros ``(N,)`` of the widest type: there the sum of float32 numbers does not depend on their grouping."""
    return torch.zeros(neurons, dtype=torch.float64 if has_float64(device.type) else torch.float32, device=device)


class WindowCounts:
    """Count what one site does for a while, in 20 bytes a neuron, and in 24 on other devices than the CPU.

    Nothing overflows, since the host knows what is added: before :meth:`take` finds no room, the counts are carried
    over into 64 bits, and new ones begin.

    Args:
        neurons: ``N``.
        traced: See :class:`CounterTensors`; the others are made on its device.
        traced_gradients: See there.

    Attributes:
        tensors: The counts.
        first_step: The step from which ``last_active`` and ``first_active`` are counted; 0 before the first call.
        never: ``first_active`` of a neuron that never fired.

    >>> window = WindowCounts(2, torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    >>> window.take(2**31 - 2, first=70_000, last=70_001), window.take(2, first=70_002, last=70_002)
    (True, False)
    """

    def __init__(self, neurons: int, traced: Tensor, traced_gradients: Tensor) -> None:
        device = traced.device
        count = torch.zeros(neurons, dtype=torch.int32, device=device)
        self.tensors = CounterTensors(
            count,
            count.clone(),
            count.clone() if device.type != _SEEN_BY_HOST else torch.zeros(0, dtype=torch.int32, device=device),
            _sums_of_magnitudes(neurons, device),
            torch.full((neurons,), -1, dtype=torch.int16, device=device),
            torch.full((neurons,), _NEVER_IN_WINDOW, dtype=torch.int16, device=device),
            traced,
            traced_gradients,
        )
        self.first_step = 0
        self.never = _NEVER_IN_WINDOW
        self._positions = self._gradient_positions = self._sums = 0
        self._most_sums = _SUMS if self.tensors.abs_sum.dtype is torch.float32 else sys.maxsize

    def take(self, positions: int, first: int, last: int) -> bool:
        """Note that outputs will be added, if there is room for them; otherwise change nothing.

        Args:
            positions: Their positions.
            first: Their first optimizer step.
            last: Their last one.
        """
        begin = self.first_step if self._sums else first
        fits = self._positions + positions <= _POSITIONS and self._sums < self._most_sums
        if not fits or first < begin or last - begin >= self.never:
            return False
        self.first_step = begin
        self._positions += positions
        self._sums += 1
        return True

    def take_gradients(self, positions: int) -> bool:
        """Note that gradients will be added, if there is room for them; otherwise change nothing.

        Args:
            positions: Their positions.
        """
        if self._gradient_positions + positions > _POSITIONS:
            return False
        self._gradient_positions += positions
        return True

    def add_row(self, row: Tensor, positions: int, step: int, work: Tensor) -> None:
        """Add the counts of one output, on the CPU.

        Args:
            row: Zeros and magnitudes, float32 ``(2, N)``; the magnitudes are finite.
            positions: Positions of the output, for which :meth:`take` found room.
            step: Its optimizer step.
            work: A buffer of float32 numbers ``(W,)``; half as many neurons are looked at at a time.
        """
        tensors, offset = self.tensors, step - self.first_step
        size = len(work) // 2
        none, unset = torch.tensor([-1, self.never], dtype=torch.int16, device="cpu").unbind()
        add_whole(row[0], tensors.zero_outputs, work)
        tensors.abs_sum.add_(row[1])
        for start in range(0, row.shape[1], size):
            zeros = row[0, start : start + size]
            number = len(zeros)
            floats, shorts = (part[:number] for part in work[: 2 * size].view(2, size).unbind())
            fired, steps = shorts.view(torch.int16).view(2, number).unbind()
            flags = steps.view(torch.bool)[:number]
            # Converting to bool and adding is much quicker than comparing and choosing.
            torch.sub(zeros, positions, out=floats)
            flags.copy_(floats)
            fired.copy_(flags)
            last, first = (each[start : start + size] for each in (tensors.last_active, tensors.first_active))
            torch.maximum(last, torch.add(none, fired, alpha=offset + 1, out=steps), out=last)
            torch.minimum(first, torch.add(unset, fired, alpha=offset - self.never, out=steps), out=first)

    def carry_to(self, wide: CounterTensors) -> None:
        """Add the counts to counters in 64 bits. Does not synchronize.

        Args:
            wide: The counters, on the same device.
        """
        for mine, theirs in zip(self.tensors[:4], wide[:4], strict=True):
            if mine.numel():
                theirs.add_(mine)
        last, first, begin = self.tensors.last_active.long(), self.tensors.first_active.long(), self.first_step
        torch.maximum(wide.last_active, torch.where(last < 0, -1, last + begin), out=wide.last_active)
        first = torch.where(first == self.never, NEVER, first + begin)
        torch.minimum(wide.first_active, first, out=wide.first_active)

    def in_run(self, last: IntArray, first: IntArray) -> tuple[IntArray, IntArray]:
        """Return steps of the window as steps of the run.

        Args:
            last: ``last_active`` on the host, int64 ``(N,)``.
            first: The same of ``first_active``.
        """
        begin = self.first_step
        return np.where(last < 0, -1, last + begin), np.where(first == self.never, NEVER, first + begin)


def add_whole(row: Tensor, counts: Tensor, work: Tensor) -> None:
    """Add whole numbers that are given as float32.

    Args:
        row: The numbers, below 2**24, ``(N,)``.
        counts: int32 or int64 ``(N,)``, is changed.
        work: A buffer of float32 numbers ``(W,)``; as many are added at a time.
    """
    for start in range(0, len(row), len(work)):
        part = row[start : start + len(work)]
        whole = work[: len(part)].view(torch.int32)
        counts[start : start + len(work)].add_(whole.copy_(part))
