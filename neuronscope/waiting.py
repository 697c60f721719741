"""Small tensors that wait, as they are, to be counted many at once: what makes the smallest ones cheap to count.

Counting a tensor of a few kilobytes costs as many torch calls as counting a large one, and the calls are the cost. So
it is copied, in one call, to others of its kind, and they are counted together when there is no room for more or
somebody wants to read. The room does not grow: 128 kB a site for outputs and as much for gradients, whatever the batch;
larger tensors are counted at once. These are copies: no tensor of the network, and no graph, is kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuronscope.blocks import Scratch, compare, magnitudes

__all__ = ["Waiting"]

#: Most numbers that wait, most tensors, and fewest for which it pays.
_NUMBERS, _MOST, _FEWEST = 1 << 15, 32, 8


class Waiting:
    """Room for a few small tensors of one kind: that of the first that comes when there is none.

    Args:
        quantities: 1 to count zeros, 2 for zeros and magnitudes.

    >>> waiting = Waiting(2)
    >>> waiting.take(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 2.0]]), 1, step=7, tolerance=0.0)
    True
    >>> waiting.take(torch.zeros(1, 3), 1, step=7, tolerance=0.0)  # of another shape
    False
    >>> counts = torch.empty(1, 2, 3)
    >>> waiting.count(Scratch(), counts)
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
        self._work: _Work | None = None
        self.steps: list[int] = []

    def __len__(self) -> int:
        return len(self.steps)

    def take(self, tensor: Tensor, axis: int, step: int, tolerance: float) -> bool:
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
                self._work = None
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

    def count(self, scratch: Scratch, out: Tensor) -> None:
        """Count zeros of each tensor, and add up its magnitudes where two quantities are wanted.

        Args:
            scratch: Reusable buffers.
            out: float32 ``(tensors, quantities, N)``; magnitudes are not finite where an element is not.
        """
        numbers = self._quantities * len(self) * self._each[0].numel()
        buffer = scratch.numbers(numbers)
        if self._work is None or self._work.buffer is not buffer or len(self._work.waiting) != len(self):
            with torch.inference_mode(False):
                waiting = self._room[: len(self)]
                self._work = _Work(buffer, waiting, buffer[:numbers].view(self._quantities, *waiting.shape))
        waiting, parts, work = self._work.waiting, self._work.parts, self._work.whole
        compare(waiting, self.tolerance, scratch.zero, parts[0])
        if self._quantities > 1:
            magnitudes(waiting, parts[1])
        if waiting.shape[3] > 1:
            work = work.sum(4)  # two plain sums are quicker than one over both ends
        torch.sum(work, 2, out=out.transpose(0, 1))


class _Work:
    """Where so many tensors are counted: views of a buffer, made once.

    Args:
        buffer: The buffer.
        waiting: The tensors, ``(tensors, outer, N, inner)``.
        whole: A part of the buffer, ``(quantities, tensors, outer, N, inner)``.
    """

    def __init__(self, buffer: Tensor, waiting: Tensor, whole: Tensor) -> None:
        self.buffer = buffer
        self.waiting = waiting
        self.parts = whole.unbind()
        self.whole = whole.squeeze(4) if waiting.shape[3] == 1 else whole
