"""Make inputs of a network that lie in a box: random ones, those of the data, and steps along a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuronscope.checkpoints.model.bounds.propagate import Box, box_ends
from neuronscope.checkpoints.model.example_inputs import Example
from neuronscope.checkpoints.model.observed_network import ObservedNetwork, tensors_of

__all__ = ["BoxInputs"]


class BoxInputs:
    """Makes inputs that lie in a box.

    Attributes:
        low: Lower bounds of each tensor of one input, in its own dtype; ``None`` for integers.
        high: Upper bounds.
        refused: Why no input can be made; ``""`` if inputs can be made.
    """

    def __init__(self, network: ObservedNetwork, box: Box, seed: int) -> None:
        self._network = network
        self._random = torch.Generator().manual_seed(seed)
        self.refused = ""
        self.low: list[Tensor | None] = []
        self.high: list[Tensor | None] = []
        self._fixed = list(network.example.values())
        for tensor in self._fixed:
            low, high = self._ends(tensor, box) if tensor.is_floating_point() else (None, None)
            self.low.append(low)
            self.high.append(high)
        if all(low is None for low in self.low):
            self.refused = "the network has no floating-point input, so no input is in the box"

    def _ends(self, tensor: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest number of the tensor's dtype in the box, for each element."""
        low, high = box_ends(box, tuple(tensor.shape))
        if not bool((low.isfinite() & high.isfinite()).all()):
            self.refused = "the box is not finite"
        least, greatest = low.to(tensor.dtype), high.to(tensor.dtype)
        kind = torch.finfo(tensor.dtype)
        # An end that was rounded out of the box is moved into it, by at least the distance to the next number.
        least = torch.where(least.double() < low, least + least.abs() * kind.eps + kind.tiny, least)
        greatest = torch.where(greatest.double() > high, greatest - greatest.abs() * kind.eps - kind.tiny, greatest)
        if not bool((least <= greatest).all()):
            self.refused = f"the box holds no number of the input's type {tensor.dtype}"
        return least, greatest

    @property
    def numbers(self) -> int:
        """How many numbers one input has."""
        return sum(tensor.numel() for tensor in self._fixed)

    def draw(self, rows: int) -> list[Tensor]:
        """Return random inputs: two of three anywhere in the box, the others at its corners."""
        drawn = []
        for low, high, fixed in zip(self.low, self.high, self._fixed, strict=True):
            shape = (rows, *fixed.shape)
            if low is None or high is None:
                drawn.append(fixed.expand(shape).clone())
                continue
            share = torch.rand(shape, generator=self._random, dtype=torch.float64)
            corner = torch.rand((rows, *[1] * fixed.dim()), generator=self._random) < 1 / 3
            share = torch.where(corner, share.round(), share)
            drawn.append((low.double() * (1 - share) + high.double() * share).to(low.dtype).clamp(low, high))
        return drawn

    def moved(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], length: float) -> list[Tensor]:
        """Return inputs after one step along the sign of a gradient; an input without gradient is drawn anew.

        Args:
            tensors: The inputs.
            gradients: The gradient of each tensor.
            length: Length of the step, as a share of the box.
        """
        rows = len(tensors[0])
        lost = torch.ones(rows, dtype=torch.bool)
        moved = []
        for tensor, gradient, low, high in zip(tensors, gradients, self.low, self.high, strict=True):
            if gradient is None or low is None or high is None:
                moved.append(tensor.detach())
                continue
            sign = gradient.nan_to_num(0.0).sign()
            lost &= (sign == 0).reshape(rows, -1).all(1)
            half = high / 2 - low / 2
            moved.append((tensor.detach() + sign * half * (2 * length)).clamp(low, high))
        if bool(lost.any()):
            for tensor, new in zip(moved, self.draw(int(lost.sum())), strict=True):
                tensor[lost] = new
        return moved

    def of_data(self, data: Example | None, most: int, rows: int) -> list[list[Tensor]]:
        """Return inputs of the data, moved into the box; none if they are not like the example.

        Args:
            data: A batch.
            most: Most inputs.
            rows: Most inputs in one part.
        """
        found = {} if data is None else tensors_of(data)
        batched = self._network.batched
        if found.keys() != self._network.example.keys():
            return []
        if batched and (len(sizes := {tensor.shape[:1] for tensor in found.values()}) != 1 or () in sizes):
            return []
        tensors = []
        for (name, own), low, high in zip(self._network.example.items(), self.low, self.high, strict=True):
            given = found[name][:most, None] if batched else found[name][None]
            if given.shape[1:] != own.shape or given.is_floating_point() != own.is_floating_point():
                return []
            given = given.to(own.dtype)
            tensors.append(given if low is None else given.nan_to_num(0.0).clamp(low, high))
        return [list(part) for part in zip(*(tensor.split(rows) for tensor in tensors), strict=True)]
