"""Count with the Triton kernels: choose the plan of a tensor, lend the memory between the two kernels, launch them.

Nothing is allocated after the first tensor of each shape. What one kernel leaves for the next lies in one room for each
device and stream, which grows to the largest that is needed. A capture cannot use that room, since graphs may run at
the same time: it gets one from the graph's own memory, which torch gives back with the graph.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuronscope.count.captured_graphs import is_capturing
from neuronscope.count.counter_tensors import CounterTensors
from neuronscope.count.kernel_plan import PROGRAMS, KernelPlan, plan_for
from neuronscope.count.pieces import Pieces, TensorToCount

__all__ = ["TritonKernels"]

#: Warps of the two kernels. With four, the first one needs twice as many registers a thread.
_WARPS, _WARPS_OF_SHARES = 8, 4
#: Elements of a tile of the second kernel, most of its rows, and fewest of its neurons.
_TILE, _ROWS, _UNITS = 1024, 64, 16
#: Types that the kernels read.
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Maximal number of plans that are kept.
_PLANS = 1024

_Key = tuple[Any, ...]


class TritonKernels:
    """Counts tensors with two kernels each. Waits for no device.

    Args:
        programs: How many programs may share a tensor; a test tries others.
        plain: Counts tensors that the kernels cannot walk.
    """

    def __init__(self, programs: int = PROGRAMS, plain: Pieces | None = None) -> None:
        from neuronscope.count import triton_kernels

        self._kernels: Any = triton_kernels
        self._programs = programs
        self._plain = plain or Pieces()
        self._plans: dict[_Key, KernelPlan | None] = {}
        self._launched: set[_Key] = set()
        self._rooms: dict[tuple[torch.device, int], _Room] = {}

    def count(self, counters: CounterTensors, what: TensorToCount) -> None:
        """Count one output or gradient.

        Args:
            counters: The counters of the site, on the device of the tensor.
            what: The tensor.
        """
        keep = what.kept()
        key = self._key(what, keep)
        plan = self._plan(key, what, keep)
        if plan is None:
            self._plain.count(counters, what)
        else:
            with _on(what.tensor.device):
                self._launch(plan, counters, what, keep)
        self._launched.add(key)

    def is_warm(self, what: TensorToCount) -> bool:
        """Whether such a tensor was counted before: then nothing need be compiled, which a capture forbids."""
        return self._key(what, what.kept()) in self._launched

    def _key(self, what: TensorToCount, keep: Tensor | None) -> _Key:
        """Return what the plan of a tensor and the code of its kernels depend on."""
        tensor, tolerance = what.tensor, what.tolerance
        strides = None if keep is None else keep.stride()
        aligned = tensor.data_ptr() % 16 == 0, keep is None or keep.data_ptr() % 16 == 0
        kind = None if tolerance is None else tolerance == 0
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, what.layout, strides, aligned, kind

    def _plan(self, key: _Key, what: TensorToCount, keep: Tensor | None) -> KernelPlan | None:
        if key not in self._plans:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
                self._launched.clear()
            fits = what.tensor.numel() > 0 and what.tensor.dtype in _TYPES
            self._plans[key] = plan_for(what.tensor, what.layout, keep, self._programs) if fits else None
        return self._plans[key]

    def _launch(self, plan: KernelPlan, counters: CounterTensors, what: TensorToCount, keep: Tensor | None) -> None:
        """Launch both kernels."""
        tensor, outputs = what.tensor, what.tolerance is not None
        limit = what.limit
        room = self._room(plan, tensor, outputs)
        mask = room.counts if keep is None else keep.view(torch.uint8)
        self._kernels.count_share[plan.programs](
            tensor,
            mask,
            room.counts,
            room.sums,
            room.kept,
            *plan.neuron_sizes,
            *plan.neuron_strides,
            *plan.sizes[1:],
            plan.positions // plan.fold,
            *plan.strides,
            *plan.keep_strides,
            plan.tiles,
            plan.share,
            struct.unpack("<q", struct.pack("<d", limit))[0],
            OUTPUTS=outputs,
            EXACT=limit == 0,
            MASKED=keep is not None,
            ALONG=plan.along,
            KEEP_ALONG=plan.keep_strides[-1] != 0,
            HEADS=plan.neuron_sizes[0] != plan.neuron_sizes[1],
            POSITIONS=plan.tile[0],
            UNITS=plan.tile[1],
            num_warps=_WARPS,
        )
        rows = min(_ROWS, 1 << (plan.shares * plan.fold - 1).bit_length())
        units = max(_TILE // rows, _UNITS)
        traced = counters.traced if outputs else counters.traced_gradients
        self._kernels.add_shares[(-(-plan.neurons // units),)](
            room.counts,
            room.sums,
            room.kept,
            counters.zero_outputs if outputs else counters.zero_gradients,
            counters.not_finite,
            counters.abs_sum,
            counters.last_active,
            counters.first_active,
            traced,
            traced if what.clock is None else what.clock,
            plan.neurons,
            plan.fold,
            plan.shares,
            what.step,
            plan.positions,
            what.positions,
            what.examples,
            OUTPUTS=outputs,
            MASKED=keep is not None,
            CAPTURED=what.clock is not None,
            SHARES=PROGRAMS,
            ROWS=rows,
            UNITS=units,
            num_warps=_WARPS_OF_SHARES,
        )

    def _room(self, plan: KernelPlan, tensor: Tensor, outputs: bool) -> _Room:
        """Return room for what one kernel leaves for the next, of at least the size that a plan needs."""
        numbers, device = plan.shares * plan.row, tensor.device
        counts, dtype = (2 if outputs else 1) * numbers, _sum_type(tensor)
        if is_capturing(tensor):
            return _Room.of(counts, numbers if outputs else 0, dtype, device)
        key = device, _stream(device)
        room = self._rooms.get(key)
        bytes_of_sums = numbers * dtype.itemsize if outputs else 0
        if room is None or room.counts.numel() < counts or room.sums.nbytes < bytes_of_sums:
            before = (0, 0) if room is None else (room.counts.numel(), room.sums.nbytes // 4)
            room = _Room.of(max(counts, before[0]), max(bytes_of_sums // 4, before[1]), torch.float32, device)
            self._rooms[key] = room
        return room if room.sums.dtype is dtype else room._replace(sums=room.sums.view(dtype))


class _Room(NamedTuple):
    """What :func:`~neuronscope.count.triton_kernels.count_share` writes.

    Attributes:
        counts: int32.
        sums: float32 or float64.
        kept: int32, for each share.
    """

    counts: Tensor
    sums: Tensor
    kept: Tensor

    @classmethod
    def of(cls, counts: int, sums: int, dtype: torch.dtype, device: torch.device) -> _Room:
        with torch.inference_mode(False):
            return cls(
                torch.empty(counts, dtype=torch.int32, device=device),
                torch.empty(2 * -(-sums // 2), dtype=dtype, device=device),  # also as float64
                torch.empty(PROGRAMS, dtype=torch.int32, device=device),
            )


def _sum_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _stream(device: torch.device) -> int:
    """Return which stream kernels are launched on now."""
    if device.type == "cuda":
        return torch.cuda.current_stream(device).cuda_stream
    if device.type == "xpu":
        return torch.xpu.current_stream(device).sycl_queue
    return 0


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on a device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if device.type == "xpu" and device.index != torch.xpu.current_device():
        return torch.xpu.device(device)
    return nullcontext()
