"""Copy small tensors into a buffer, and count many of them together, because each torch call costs time.

A tensor of a few kilobytes takes as many torch calls to count as a large one, and the calls are what costs. So it is
copied, in one call, beside others of the same shape and type. They are counted together when the buffer is full, or
when the counts are read. The buffer has a fixed size for each site: 128 kB for outputs and 128 kB for gradients,
whatever the batch size. Larger tensors are counted directly. No tensor of the network and no graph is kept alive.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neuronscope.count.cpu_kernels import ScratchBuffers, compare, magnitudes

__all__ = ["SMALL", "SmallTensors"]

#: Maximal number of elements in the buffer, maximal number of tensors, and the fewest tensors for which it pays.
_NUMBERS, _MOST, _FEWEST = 1 << 15, 32, 8
#: Number of elements up to which a tensor is added to a buffer.
SMALL = _NUMBERS // _FEWEST


class SmallTensors:
    """A buffer for small tensors of one shape and type: those of the first tensor that is added while it is empty.

    Args:
        quantities: 1 to count zeros, 2 for zeros and magnitudes.
        most: The most tensors that it holds: there must be room for the counts of all.

    Attributes:
        axis: The dimension of the neurons in the tensors of the buffer.
        tolerance: The tolerance up to which ``|x|`` counts as zero in them.
        steps: The optimizer step of each tensor.
        full: Whether the buffer has no room for another tensor.

    >>> waiting = SmallTensors(2, most=8)
    >>> waiting.try_add(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 2.0]]), 1, step=7, tolerance=0.0)
    True
    >>> waiting.try_add(torch.zeros(1, 3), 1, step=7, tolerance=0.0)  # of another shape
    False
    >>> counts = torch.empty(1, 2, 3)
    >>> waiting.count(ScratchBuffers(), counts)
    >>> counts
    tensor([[[2., 1., 0.],
             [0., 1., 4.]]])
    """

    def __init__(self, quantities: int, most: int) -> None:
        self._quantities, self._most = quantities, min(most, _MOST)
        self._shape: torch.Size | None = None  # of the tensors in the buffer, and so are the next three
        self._dtype: torch.dtype | None = None
        self.axis = 0
        self.tolerance = 0.0
        with torch.inference_mode(False):
            self._room = torch.empty(0, device="cpu")
        self._each: list[Tensor] = []  # views of it, made once
        self._last = -1  # number of the last of them
        self._full: tuple[Tensor, _Views] | None = None  # a buffer, and how a full room is counted in it
        self.steps: list[int] = []
        self.full = False

    def __len__(self) -> int:
        return len(self.steps)

    def try_add(self, tensor: Tensor, axis: int, step: int, tolerance: float) -> bool:
        """Copy a tensor into the buffer, if it is small and of the same shape and type as those in the buffer.

        Args:
            tensor: Any tensor ``(…, N, …)``; must not require a gradient.
            axis: Dimension of the neurons, ≥ 0.
            step: Optimizer step of the tensor.
            tolerance: ``|x| <= tolerance`` counts as zero.

        Returns:
            False if the tensor was not added; then the caller must count it.
        """
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or not tensor.is_cpu:
            return False
        known = tensor.shape == self._shape and tensor.dtype is self._dtype and axis == self.axis
        if not (known and tolerance == self.tolerance) and not self._make_room(tensor, axis, tolerance):
            return False
        steps = self.steps
        number = len(steps)
        self._each[number].copy_(tensor)
        steps.append(step)
        self.full = number == self._last
        return True

    def _make_room(self, tensor: Tensor, axis: int, tolerance: float) -> bool:
        """Make the buffer anew, for tensors like this one, if it is empty; return whether it was made."""
        if self.steps or not tensor.is_floating_point() or not 0 < tensor.numel() <= SMALL:
            return False
        with torch.inference_mode(False):
            shape = (math.prod(tensor.shape[:axis]), tensor.shape[axis], math.prod(tensor.shape[axis + 1 :]))
            most = min(self._most, _NUMBERS // tensor.numel())
            self._room = torch.empty(most, *shape, dtype=tensor.dtype, device="cpu")
            self._each = [each.view(tensor.shape) for each in self._room]
            self._full = None
        self._shape, self._dtype, self.axis, self.tolerance = tensor.shape, tensor.dtype, axis, tolerance
        self._last = most - 1
        return True

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the buffer, as views."""
        return self._each[: len(self.steps)]

    def clear(self) -> None:
        """Empty the buffer."""
        self.steps.clear()
        self.full = False

    def count(self, scratch: ScratchBuffers, out: Tensor) -> None:
        """Count the zeros of each tensor in the buffer, and add up its magnitudes if ``quantities`` is 2.

        Args:
            scratch: Reusable buffers.
            out: float32 ``(tensors, quantities, N)``, is overwritten; a magnitude is not finite if an element is not.
        """
        waiting, parts, work = self._views(scratch)
        compare(waiting, self.tolerance, scratch.zero, parts[0])
        if self._quantities > 1:
            magnitudes(waiting, parts[1])
        if waiting.shape[3] > 1:
            work = work.sum(4)  # two plain sums are quicker than one over both ends
        torch.sum(work, 2, out=out.transpose(0, 1))

    def _views(self, scratch: ScratchBuffers) -> _Views:
        """Return the views in which the tensors are counted; those of a full buffer are made once."""
        numbers = self._quantities * len(self) * self._each[0].numel()
        buffer = scratch.numbers(numbers)
        if self.full and self._full is not None and self._full[0] is buffer:
            return self._full[1]
        with torch.inference_mode(False):
            waiting = self._room[: len(self)]
            whole = buffer[:numbers].view(self._quantities, *waiting.shape)
            views = _Views(waiting, whole.unbind(), whole.squeeze(4) if waiting.shape[3] == 1 else whole)
        if self.full:  # the scratch buffer of a reader lives for one reading and must not be kept
            self._full = buffer, views
        return views


class _Views(NamedTuple):
    """Views of the tensors that are counted, and of the scratch buffer in which they are.

    Attributes:
        waiting: The tensors, ``(tensors, outer, N, inner)``.
        parts: For each quantity a part of the scratch buffer, of the same shape.
        whole: All parts, ``(quantities, tensors, outer, N, inner)``; without the last dimension if it is 1.
    """

    waiting: Tensor
    parts: tuple[Tensor, ...]
    whole: Tensor
