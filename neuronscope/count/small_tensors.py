"""Small tensors that wait, as they are, to be counted many at once: what makes the smallest ones cheap to count.

Counting a tensor of a few kilobytes costs as many torch calls as counting a large one, and the calls are the cost. So
it is copied, in one call, to others of its kind, and they are counted together when there is no room for more or
somebody wants to read. The room does not grow: 128 kB a site for outputs and as much for gradients, whatever the batch;
larger tensors are counted at once. These are copies: no tensor of the network, and no graph, is kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neuronscope.count.cpu_kernels import ScratchBuffers, compare, magnitudes

__all__ = ["SmallTensors"]

#: Most numbers that wait, most tensors, and fewest for which it pays.
_NUMBERS, _MOST, _FEWEST = 1 << 15, 32, 8


class SmallTensors:
    """Room for a few small tensors of one kind: that of the first that comes when there is none.

    Args:
        quantities: 1 to count zeros, 2 for zeros and magnitudes.

    >>> waiting = SmallTensors(2)
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

    def __init__(self, quantities: int) -> None:
        self._quantities = quantities
        self._kind: tuple[torch.Size, torch.dtype, int, float] | None = None
        with torch.inference_mode(False):
            self._room = torch.empty(0, device="cpu")
        self._each: list[Tensor] = []  # views of it, made once
        self._full: tuple[Tensor, _Views] | None = None  # a buffer, and how a full room is counted in it
        self.steps: list[int] = []

    def __len__(self) -> int:
        return len(self.steps)

    def try_add(self, tensor: Tensor, axis: int, step: int, tolerance: float) -> bool:
        """Copy a tensor, if it is small and of the kind that waits.

        Args:
            tensor: Any tensor; must not require a gradient.
            axis: The neurons' dimension, ≥ 0.
            step: The optimizer step it belongs to.
            tolerance: ``|x| <= tolerance`` counts as zero.

        Returns:
            Whether it was taken; if not, it is to be counted at once.
        """
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.layout is not torch.strided:
            return False
        kind = (tensor.shape, tensor.dtype, axis, tolerance)
        if kind != self._kind:
            if self.steps or not tensor.is_floating_point() or not 0 < tensor.numel() <= _NUMBERS // _FEWEST:
                return False
            with torch.inference_mode(False):
                shape = (math.prod(tensor.shape[:axis]), tensor.shape[axis], math.prod(tensor.shape[axis + 1 :]))
                most = min(_MOST, _NUMBERS // tensor.numel())
                self._room = torch.empty(most, *shape, dtype=tensor.dtype, device="cpu")
                self._each = [each.view(tensor.shape) for each in self._room]
                self._full = None
            self._kind = kind
        self._each[len(self.steps)].copy_(tensor)
        self.steps.append(step)
        return True

    @property
    def full(self) -> bool:
        """Whether there is no room for another tensor."""
        return len(self.steps) == len(self._each)

    @property
    def axis(self) -> int:
        """The neurons' dimension of what waits."""
        return self._kind[2] if self._kind is not None else 0

    @property
    def tolerance(self) -> float:
        """What counts as zero in what waits."""
        return self._kind[3] if self._kind is not None else 0.0

    def tensors(self) -> list[Tensor]:
        """What waits."""
        return self._each[: len(self.steps)]

    def clear(self) -> None:
        """Forget what waits."""
        self.steps.clear()

    def count(self, scratch: ScratchBuffers, out: Tensor) -> None:
        """Count zeros of each tensor, and add up its magnitudes where two quantities are wanted.

        Args:
            scratch: Reusable buffers.
            out: float32 ``(tensors, quantities, N)``; magnitudes are not finite where an element is not.
        """
        waiting, parts, work = self._views(scratch)
        compare(waiting, self.tolerance, scratch.zero, parts[0])
        if self._quantities > 1:
            magnitudes(waiting, parts[1])
        if waiting.shape[3] > 1:
            work = work.sum(4)  # two plain sums are quicker than one over both ends
        torch.sum(work, 2, out=out.transpose(0, 1))

    def _views(self, scratch: ScratchBuffers) -> _Views:
        """Where what waits is counted. Those of a full room, which come again and again, are made once."""
        numbers = self._quantities * len(self) * self._each[0].numel()
        buffer = scratch.numbers(numbers)
        if self.full and self._full is not None and self._full[0] is buffer:
            return self._full[1]
        with torch.inference_mode(False):
            waiting = self._room[: len(self)]
            whole = buffer[:numbers].view(self._quantities, *waiting.shape)
            views = _Views(waiting, whole.unbind(), whole.squeeze(4) if waiting.shape[3] == 1 else whole)
        if self.full:  # a reader's buffer, which is of one reading, must not be kept
            self._full = buffer, views
        return views


class _Views(NamedTuple):
    """Of what waits, and of the buffer in which it is counted.

    Attributes:
        waiting: The tensors, ``(tensors, outer, N, inner)``.
        parts: Of the buffer, for each quantity as much.
        whole: All of these, ``(quantities, tensors, outer, N, inner)``, or without the last where it is 1.
    """

    waiting: Tensor
    parts: tuple[Tensor, ...]
    whole: Tensor
