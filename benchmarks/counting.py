"""Counting one tensor, against reading it once (``y.sum(dims)``), and against the obvious ``(y == 0).sum(dims)``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.tables import Table, milliseconds, ratio, size
from benchmarks.turns import take_turns
from neuronscope.count.cpu_kernels import ScratchBuffers, fits_float32

__all__ = ["tables"]


class Case(NamedTuple):
    """A tensor to count: neurons along axis 1 of images (``channels``), or along the last axis."""

    layout: str
    shape: tuple[int, ...]

    @property
    def axis(self) -> int:
        return len(self.shape) - 1 if self.layout == "last axis" else 1

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """About half of it zero, as a ReLU leaves it."""
        y = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).relu_().to(dtype)
        return y.contiguous(memory_format=torch.channels_last) if self.layout == "channels last" else y


SHAPES = {
    "last axis": ((5, 512), (128, 1024), (16, 256, 512), (16, 256, 3072), (4096, 4096), (9, 100_003), (3, 1_000_003)),
    "channels": ((1, 32, 9, 9), (4, 64, 28, 28), (32, 256, 14, 14), (64, 64, 56, 56), (84, 64, 56, 56)),
    "channels last": ((1, 32, 9, 9), (4, 64, 28, 28), (32, 256, 14, 14), (64, 64, 56, 56), (84, 64, 56, 56)),
}


def tables(*, quick: bool = False) -> Iterator[Table]:
    """One table a type of number."""
    for dtype in (torch.float32, torch.bfloat16):
        table = Table(
            f"Counting, {str(dtype).removeprefix('torch.')}",
            ("layout", "shape", "size", "one read", "outputs ÷ read", "gradients ÷ read", "(y == 0).sum ÷ read"),
            note="Ratios of medians, of minima in brackets, of processor time. *Outputs* are zeros, the sum of "
            "magnitudes, and whether all is finite; *gradients* are zeros. What a site adds up later is in neither.",
        )
        for layout, shapes in SHAPES.items():
            for shape in shapes[:1] if quick else shapes:
                table.rows.append(_row(Case(layout, shape), dtype, quick=quick))
        yield table


def _row(case: Case, dtype: torch.dtype, *, quick: bool) -> tuple[str, ...]:
    y, axis, scratch = case.tensor(dtype), case.axis, ScratchBuffers()
    row = torch.empty(2, case.shape[axis])
    others = [dimension for dimension in range(y.dim()) if dimension != axis]
    elements = math.prod(case.shape)
    few = 2 if quick else 9 if elements > 1 << 22 else 31 if elements > 1 << 18 else 301
    times = take_turns(
        {
            "read": lambda: y.sum(others),
            "outputs": lambda: scratch.measure(y, axis, 0.0, row) and fits_float32(row),
            "gradients": lambda: scratch.measure(y, axis, 0.0, row[:1]),
            "naive": lambda: (y == 0).sum(others),
        },
        rounds=few,
        clock=time.thread_time,
    )
    read = times["read"]
    shape = " × ".join(f"{length:,}" if length > 9999 else str(length) for length in case.shape)
    ratios = (ratio(times[name].over(read)) for name in ("outputs", "gradients", "naive"))
    return (case.layout, shape, size(y.nbytes), milliseconds(read.median), *ratios)
