"""Collectives: the one place that calls ``torch.distributed``, and what that costs."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

__all__ = ["Collectives"]


class Collectives:
    """The collectives of one exchange. Every rank must make the same ones, in the same order.

    Attributes:
        number: How many were made.
        bytes: What this rank gave to all of them.
    """

    def __init__(self) -> None:
        self.number = 0
        self.bytes = 0

    def add_up(self, numbers: npt.NDArray[np.float64]) -> None:
        """Put the sums over all ranks where this rank's numbers are."""
        self._reduce(torch.from_numpy(numbers), dist.ReduceOp.SUM)

    def take_largest(self, numbers: npt.NDArray[np.int64]) -> None:
        """Put the largest of all ranks where this rank's numbers are."""
        self._reduce(torch.from_numpy(numbers), dist.ReduceOp.MAX)

    def _reduce(self, numbers: torch.Tensor, operation: Any) -> None:
        there = numbers.to(_device())
        dist.all_reduce(there, op=operation)
        if there is not numbers:
            numbers.copy_(there)
        self.number += 1
        self.bytes += numbers.numel() * numbers.element_size()

    def gather(self, mine: Any) -> list[Any]:
        """What each rank brings; small things only, since all ranks are given all of them."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self.number += 2  # the sizes, and what is of these sizes
        self.bytes += len(pickle.dumps(mine))
        return everyone


def _device() -> torch.device:
    """Where this process group's tensors must live."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
