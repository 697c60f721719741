"""Make collectives on a process group of the library's own, or on the one that the user gave for them.

On the trainer's group, ours would have to come in the same place among the trainer's own collectives on every rank.
No rank can promise that: those of another thread, or that are still under way, may be ahead on one rank and behind on
another.
"""

from __future__ import annotations

import contextlib
import pickle
from datetime import timedelta
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from neuronscope.options import ProcessGroup

__all__ = ["Collectives", "base_group", "time_limit", "world_size"]

#: The library's own group, by the default group that it was made beside: a run may end that one and begin another.
_own_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def world_size() -> int:
    """Return the number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def base_group(given: ProcessGroup) -> dist.ProcessGroup | None:
    """Return the process group whose ranks join their counts, given the option ``process_group``.

    ``None`` if nothing is distributed, or this rank is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: Any = given() if callable(given) else given
    group = dist.group.WORLD if group is None else group
    return group if isinstance(group, dist.ProcessGroup) else None


class Collectives:
    """The collectives of one exchange. Every rank must make the same ones, in the same order.

    They are made on a group for them alone, by default one of all ranks that the library makes. ``number`` is how many
    were made, ``bytes`` what this rank gave to all of them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.number = 0
        self.bytes = 0
        self._group = _own_group() if group is None else group

    def sum(self, numbers: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> None:
        """Replace this rank's numbers by the sums over all ranks."""
        self._reduce(numbers, dist.ReduceOp.SUM)

    def max(self, numbers: npt.NDArray[np.int64]) -> None:
        """Replace this rank's numbers by the largest of all ranks."""
        self._reduce(numbers, dist.ReduceOp.MAX)

    def _reduce(self, numbers: npt.NDArray[Any], operation: Any) -> None:
        tensor = torch.from_numpy(numbers)
        reduced = tensor.to(_device_of(dist.get_backend(self._group)))
        dist.all_reduce(reduced, op=operation, group=self._group)
        if reduced is not tensor:
            tensor.copy_(reduced)
        self.number += 1
        self.bytes += numbers.nbytes

    def gather(self, item: Any) -> list[Any]:
        """Return the items of all ranks, in order of rank. Every rank is sent all of them: for small items only."""
        items: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(items, item, group=self._group)
        self.number += 2  # the sizes, then the items
        self.bytes += len(pickle.dumps(item))
        return items


def _own_group() -> dist.ProcessGroup:
    """Return the library's own group of all ranks. The first call makes it, so every rank must make that call."""
    default = cast(dist.ProcessGroup, dist.group.WORLD)
    if default not in _own_groups:
        _own_groups[default] = dist.new_group(
            timeout=time_limit(default), backend=_own_backend(), group_desc="neuronscope"
        )
    return _own_groups[default]


def _own_backend() -> str | None:
    """Return the backend of our group: gloo where the default one's works on a device only; else ``None``, the same.

    Counts are on the host. Over gloo they stay there: they take no memory of the device, and no kernel of ours waits
    among the trainer's.
    """
    on_a_device_only = _device_of(dist.get_backend()).type != "cpu"
    return "gloo" if on_a_device_only and dist.is_gloo_available() else None


def _device_of(backend: str) -> torch.device:
    """Return the device that a backend's tensors must be on: the host, where it can."""
    devices = dist.Backend.backend_capability.get(backend, ["cpu"])
    return torch.device("cpu" if "cpu" in devices else devices[0])


def time_limit(group: dist.ProcessGroup) -> timedelta | None:
    """Return how long a group waits for a rank, as far as torch tells: ours must not give up earlier."""
    with contextlib.suppress(AttributeError, RuntimeError):
        limit: timedelta = group._get_backend(_device_of(dist.get_backend(group))).options._timeout
        return limit
    return None
