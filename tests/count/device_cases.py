"""Random tensors in the layouts that networks have, and what is to be counted of each, by a slow twin in float64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuronscope.count.counter_tensors import NEVER
from neuronscope.count.counters import SiteCounters
from neuronscope.count.neuron_layout import NeuronLayout
from neuronscope.count.pieces import TensorToCount

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = (
    *("rows", "sequence", "images", "channels last", "NCL", "NCDHW", "small maps", "half", "transposed", "slice"),
    *("heads", "expanded", "alone", "channels last 3d", "sequence from channels"),
)


@dataclass
class Case:
    """A tensor that is counted, and how.

    Attributes:
        neurons: Which neuron each element is of, of the tensor's shape.
    """

    kind: str
    tensor: Tensor
    layout: NeuronLayout
    neurons: Tensor
    mask: Tensor | None
    tolerance: float
    step: int

    def __str__(self) -> str:
        masked = "" if self.mask is None else ", masked"
        return f"{self.kind} {tuple(self.tensor.shape)} {self.tensor.dtype}, tolerance {self.tolerance}{masked}"

    @property
    def count(self) -> int:
        """Number of neurons."""
        return int(self.neurons.max()) + 1

    def kept(self) -> np.ndarray:
        """Whether each element is counted."""
        kept = torch.ones(self.tensor.shape, dtype=torch.bool)
        if self.mask is not None:
            shape = self.tensor.shape
            covered = 2 if tuple(shape[:2]) == tuple(self.mask.shape) else 1
            kept &= self.mask.cpu().reshape(shape[:covered] + (1,) * (len(shape) - covered))
        return kept.numpy()

    def truth(self) -> dict[str, Any]:
        """What is to be counted, from whole tensors in float64."""
        y, kept = self.tensor.cpu().double().numpy(), self.kept()
        size, finite = np.abs(y), np.isfinite(y)
        limit = torch.tensor(self.tolerance, dtype=self.tensor.dtype).item()

        def each(weights: np.ndarray) -> np.ndarray:
            return np.bincount(self.neurons.numpy().ravel(), weights.astype(np.float64).ravel(), self.count)

        fired = each(kept & finite & ~(size <= limit)) > 0
        whole = each(np.ones(y.shape))
        return {
            "zero_outputs": each(kept & (size <= limit)).astype(int).tolist(),
            "zero_gradients": each(kept & (y == 0)).astype(int).tolist(),
            "not_finite": each(kept & ~finite).astype(int).tolist(),
            "abs_sum": each(np.where(kept & finite, size, 0)),
            "last_active": np.where(fired, self.step, -1).tolist(),
            "first_active": np.where(fired, self.step, NEVER).tolist(),
            # the host has added all positions
            "left_out": int((each(kept) - whole)[0]),
        }


def case(number: int, *, largest: int = 1) -> Case:
    """Return a case; all of it follows from its number.

    Args:
        number: Which.
        largest: How much larger its sizes may be than those of most.
    """
    draw = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    kind = KINDS[number % len(KINDS)]
    dtype = draw.choice(TYPES)

    def size(most: int) -> int:
        return draw.randint(1, most * largest)

    def new(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < draw.choice((0.0, 0.2, 0.9)), 0.0, values).to(dtype)

    axis, dims = 1, None
    if kind == "rows":
        y = new(size(70), size(200))
    elif kind == "sequence":
        y, axis = new(size(5), size(9), size(90)), 2
    elif kind == "images":
        y = new(size(4), size(9), size(20), size(20))
    elif kind == "channels last":
        y = new(size(4), size(9), size(6), size(6)).contiguous(memory_format=torch.channels_last)
    elif kind == "NCL":
        y = new(size(5), size(9), size(300))
    elif kind == "NCDHW":
        y = new(size(3), size(5), size(4), size(4), size(5))
    elif kind == "channels last 3d":
        y = new(size(3), size(5), size(4), size(4), size(5)).contiguous(memory_format=torch.channels_last_3d)
    elif kind == "small maps":
        y = new(size(12), size(40), 7, 7)
    elif kind == "half":  # of a GLU
        whole = new(size(6), size(9), 2 * size(30))
        y, axis = whole.chunk(2, -1)[draw.randint(0, 1)], 2
    elif kind == "sequence from channels":  # the positions of a mask lie side by side
        y, axis = new(size(4), size(9), size(200)).transpose(1, 2), 2
    elif kind == "transposed":
        y = new(size(40), size(70)).t()
    elif kind == "slice":
        sizes = [size(5) + 2, size(6) + 2, size(7) + 2, size(8) + 2]
        y = new(*sizes)[1:, :-1, 1:, ::2]
    elif kind == "heads":
        heads, width = draw.randint(1, 5), draw.randint(1, 40)
        y, axis = new(size(4), heads, size(9), width), 3
        if draw.random() < 0.5:
            y = new(size(4), size(9), heads, width).transpose(1, 2)
        dims = ((), ((heads, width),), ((y.shape[2], 0),), ((width, 1),))
    elif kind == "expanded":
        y = new(1, size(30)).expand(size(9), -1)
    else:
        y, axis = new(size(60)), 0
    if draw.random() < 0.4 and y.numel() > 3 and kind != "expanded":
        for value in (math.nan, math.inf, -math.inf, -0.0, 0.5, -0.5):
            y[tuple(draw.randrange(size) for size in y.shape)] = value
    tolerance = draw.choice((0.0, 0.0, 0.5, 0.1))
    if dims is None:
        shape = [1] * y.dim()
        shape[axis] = y.shape[axis]
        neurons = torch.arange(y.shape[axis]).reshape(shape).expand(y.shape)
    else:
        index = torch.arange(y.shape[1] * y.shape[3]).reshape(1, y.shape[1], 1, y.shape[3])
        neurons = index.expand(y.shape)
    mask = None
    if dims is None and axis >= 1 and draw.random() < 0.3:
        covered = y.shape[:2] if axis >= 2 else (1, y.shape[0])
        mask = torch.rand(covered, generator=generator) < 0.6
    return Case(kind, y, NeuronLayout(axis, dims), neurons, mask, tolerance, draw.randint(0, 1000))


def moved(one: Case, device: str) -> Case:
    """Return a case on another device, with the same strides."""
    whole = one.tensor.untyped_storage().nbytes() // one.tensor.element_size()
    base = torch.as_strided(one.tensor, (whole,), (1,), 0).to(device)
    tensor = base.as_strided(one.tensor.shape, one.tensor.stride(), one.tensor.storage_offset())
    return replace(one, tensor=tensor, mask=None if one.mask is None else one.mask.to(device))


def check(backend: Any, one: Case, *, captured: bool = False) -> Tensor:
    """Count a case with a backend, and compare with the truth; return the sums of magnitudes.

    Args:
        backend: Has ``count``.
        one: The case.
        captured: Count in a captured graph's way: the step from a clock, positions on the device.
    """
    counters = SiteCounters(one.count, one.tensor.device)
    tensors, positions = counters.tensors, one.tensor.numel() // one.count
    what = TensorToCount(one.tensor, one.layout, one.step, one.tolerance, one.mask)
    if captured:
        clock = torch.tensor(one.step, device=one.tensor.device)
        what = what._replace(step=-5, clock=clock, positions=positions, examples=3)
    before = one.tensor.clone()
    backend.count(tensors, what)
    backend.count(tensors, what._replace(tolerance=None))
    torch.testing.assert_close(one.tensor, before, rtol=0, atol=0, equal_nan=True)
    truth = one.truth()
    for name in ("zero_outputs", "zero_gradients", "not_finite", "last_active", "first_active"):
        assert getattr(tensors, name).tolist() == truth[name], (name, str(one))
    np.testing.assert_allclose(tensors.abs_sum.cpu().numpy(), truth["abs_sum"], rtol=2e-6, err_msg=str(one))
    added = truth["left_out"] + (positions if captured else 0)
    assert tensors.traced.tolist() == [added, 3 if captured else 0], str(one)
    assert tensors.traced_gradients.tolist() == [added], str(one)
    return tensors.abs_sum
