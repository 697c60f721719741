"""Count in CUDA graphs that a user captures by hand: what a replay needs, since it runs no Python.

A capture records the kernels of the device without running them, and a replay runs them as they were recorded. So in a
capture nothing is counted on the host: positions and examples are added on the device, and the optimizer step is read
from a number on the device. The memory that the kernels write to must outlive the graph, of which nobody tells us when
it ends: what a capture has used is kept until the process ends.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["StepClock", "is_capturing", "keep_for_graphs"]

_kept: dict[int, Tensor] = {}


class StepClock:
    """Holds the number of the optimizer step on each device that asked for it, so that graphs can read it there.

    Attributes:
        step: The number.
        captured: Whether a captured graph reads it.
        devices: Where the number is besides the CPU.
        host: The number on the CPU, int64 without dimensions.

    >>> clock = StepClock()
    >>> here = clock.on(torch.device("cpu"))
    >>> clock.set(7)
    >>> here
    tensor(7)
    """

    def __init__(self) -> None:
        self.step = 0
        self.captured = False
        with torch.inference_mode(False):
            self.host = torch.zeros((), dtype=torch.int64, device="cpu")
        self.devices: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the tensor that holds the number on a device, int64 without dimensions; it stays the same tensor.

        Args:
            device: The device. If it has none yet, nothing must be captured on it now.
        """
        if device.type == "cpu":
            return self.host
        clock = self.devices.get(device)
        if clock is None:
            with torch.inference_mode(False):
                clock = torch.full((), self.step, dtype=torch.int64, device=device)
            self.devices[device] = clock
        return clock

    def set(self, step: int) -> None:
        """Set the number on all devices. Waits for none of them.

        Where something is captured it does nothing: a graph would set its own number at each replay.

        Args:
            step: Number of the optimizer step.
        """
        self.step = step
        self.host.fill_(step)
        for clock in self.devices.values():
            if not is_capturing(clock):
                clock.fill_(step)


def is_capturing(tensor: Tensor) -> bool:
    """Whether what is done with a tensor now is captured in a CUDA graph.

    Args:
        tensor: Any tensor that ``torch.compile`` is not tracing.

    >>> is_capturing(torch.zeros(2))
    False
    """
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def keep_for_graphs(tensors: Iterable[Tensor]) -> None:
    """Keep tensors until the process ends, because a captured graph writes to them.

    Args:
        tensors: The tensors.
    """
    _kept.update((id(tensor), tensor) for tensor in tensors)
