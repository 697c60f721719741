"""Tell which rows still hold the numbers that torch's default initialisation drew.

An optimizer's state of zero shows that a row got no gradient since that optimizer began; another one may have trained
it before. Linear and convolutional layers draw their weights evenly from ±b, b = 1/√fan-in. In float32 this gives a
fixed set of numbers, which are further apart near zero than float32's own:

- On a CPU a weight is ``u · 2b − b`` with ``u`` one of 2²⁴ evenly spaced numbers in [0, 1).
- On a GPU of CUDA, ``u`` is a number of 32 bits times 2⁻³², plus 2⁻³³, rounded to float32. So it is a multiple of 2⁻²⁴
  above one half, of 2⁻²⁵ above one quarter, and finer below. (Worked out from torch's and CUDA's source.)

Any gradient step, however small, moves weights off these numbers. Decoupled weight decay moves them too, but in a known
way: each step multiplies a weight by ``1 − rate · decay`` and rounds. That never changes the order of two weights, so
the number that a weight began with can be searched for, by doing the same steps again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import StoredTensor
from neuronscope.checkpoints.file.layers import Layer

__all__ = ["Shrinkage", "as_initialised"]

#: The range's rounding: the largest weight may exceed the bound by this fraction.
_ROUNDING = 1e-6
#: With fewer weights than this a trained row may lie in the range by chance. Weight decay may have shrunk an initial
#: row to this fraction of the range.
_MANY, _SHRUNK = 16, 0.5
#: So many numbers can torch's generator draw evenly from a range in float32.
_DRAWS = 2.0**24
#: The mean square of ``F`` uniform numbers in (−1, 1) is 1/3 with a standard deviation of .298 / √F.
_MEAN_SQUARE, _DEVIATION, _DEVIATIONS = 1.0 / 3.0, 0.298, 4.0
#: Where decay acted, so many of a row's smallest weights are followed back: these are the farthest apart. More steps of
#: decay than the second number are not repeated; nor are more than the third, of all rows of a layer together: this
#: many take about a second. Of further rows nothing is known.
_FOLLOWED, _MOST_STEPS, _MOST_ROW_STEPS = 16, 200_000, 6_000_000
#: Other numbers would pass with a probability below this; if it is larger, the row shows too little.
_CHANCE = 1e-3
#: Numbers to either side of the nearest one that are tried, and how often the nearest one is corrected.
_NEARBY, _CORRECTIONS = 2, 3


class Shrinkage(NamedTuple):
    """What decoupled weight decay did to weights that got no gradient."""

    amount: float  # learning rate · weight decay at the time of saving, taken for that of all steps
    steps: int | None  # number of steps; ``None`` = not known


def as_initialised(
    layer: Layer, tensors: Mapping[str, StoredTensor], rows: Tensor, shrinkage: Shrinkage | None = None
) -> Tensor:
    """Return which of some rows look as they were initialised, bool ``(N,)``.

    A row looks initial if it has a bias of exactly zero and weights that are not; or if its weights (16 or more) and
    its bias lie in torch's default range, are spread over it evenly, and are numbers that torch can have drawn.

    Args:
        layer: The layer.
        tensors: The checkpoint's tensors; they are read only if there are such rows.
        rows: The rows in question, bool ``(N,)``.
        shrinkage: What weight decay did to rows without a gradient; ``None`` = nothing.
    """
    if not rows.any():
        return rows
    stored = layer.rows(tensors[layer.weight].read())[rows]
    weight = stored.double()
    largest = weight.abs().amax(dim=1)
    bias = torch.full_like(largest, torch.nan)
    if layer.bias is not None:
        bias = layer.rows(tensors[layer.bias].read())[rows, 0].double()
    default = _in_default_range(weight, largest, bias.nan_to_num(0.0))
    if stored.dtype is not torch.float32:
        default.zero_()  # in 16 bits all numbers of the range may be drawn, and in 64 bits it cannot be computed
    elif default.any():
        inside = weight[default]
        default[default.clone()] = (
            _drawn_by_default(inside) if shrinkage is None else _drawn_and_shrunk(inside, shrinkage)
        )
    found = torch.zeros_like(rows)
    found[rows] = ((bias == 0) & (largest > 0)) | default
    return found


def _in_default_range(weight: Tensor, largest: Tensor, bias: Tensor) -> Tensor:
    """Return which rows torch's default initialisation may have given, bool ``(K,)``, by weights ``(K, F)``."""
    count = weight.shape[1]
    if count < _MANY:
        return torch.zeros_like(largest, dtype=torch.bool)
    bound = 1.0 / math.sqrt(count)
    inside = torch.maximum(largest, bias.abs()) <= bound * (1.0 + _ROUNDING)
    even = (weight / largest.clamp(min=1e-300)[:, None]).square().mean(dim=1)
    slack = _DEVIATION * _DEVIATIONS / math.sqrt(count) + 2.0 / count
    return inside & (largest >= _SHRUNK * bound) & ((even - _MEAN_SQUARE).abs() <= slack)


def _bound(count: int) -> Tensor:
    """Return the range's end b for rows of ``count`` weights in float32, as ``nn.init.kaiming_uniform_`` does."""
    return torch.tensor(math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(count)))


def _values(draws: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights that draws ``u · 2²⁴`` give, float32: some processors round once, some twice."""
    share, low = draws / _DRAWS, bound.double()
    return share.float() * (2 * bound) - bound, (share * (2 * low) - low).float()


def _drawn_by_default(weight: Tensor) -> Tensor:
    """Return which rows hold only numbers that torch's default initialisation can draw, bool ``(K,)``.

    Of other numbers in the range about a half are among these. The rows are float64 ``(K, F)``.
    """
    bound = _bound(weight.shape[1])
    place = (weight + bound.double()) / (2 * bound.double()) * _DRAWS
    on_cpu = _is_drawn(weight, place.round(), 1.0, bound)
    halves = _is_drawn(weight, (2 * place).round() / 2, 0.5, bound)
    on_gpu = on_cpu | (place < _DRAWS / 4) | ((place < _DRAWS / 2) & halves)
    return on_cpu.all(dim=1) | on_gpu.all(dim=1)


def _is_drawn(weight: Tensor, nearest: Tensor, spacing: float, bound: Tensor) -> Tensor:
    """Return which weights are what the nearest draw or one beside it gives, bool, in the shape of ``weight``."""
    drawn = torch.zeros_like(weight, dtype=torch.bool)
    for draw in (nearest - spacing, nearest, nearest + spacing):
        for value in _values(draw, bound):
            drawn |= value.double() == weight
    return drawn


def _drawn_and_shrunk(weight: Tensor, shrinkage: Shrinkage) -> Tensor:
    """Return which rows decay can have made of numbers that torch draws, bool ``(K,)``; rows float64 ``(K, F)``."""
    found = torch.zeros(weight.shape[0], dtype=torch.bool)
    amount, steps = shrinkage
    if steps is None or not 0 <= amount < 1 or steps > _MOST_STEPS:
        return found
    most = _MOST_ROW_STEPS // max(steps, 1)
    order = weight[:most].abs().argsort(dim=1)[:, :_FOLLOWED]
    smallest = weight[:most].gather(1, order)
    bound = _bound(weight.shape[1])
    for step in _STEPS:
        found[:most] |= _followed_back(smallest, bound, partial(step, amount=amount, steps=steps))
    return found


def _followed_back(weight: Tensor, bound: Tensor, shrink: Callable[[Tensor], Tensor]) -> Tensor:
    """Return which rows ``shrink`` gives of numbers that torch draws, bool ``(K,)``; rows float64 ``(K, F)``."""
    width = 2.0 * bound.double() / _DRAWS
    start = weight.clone()
    for _ in range(_CORRECTIONS):
        shrunk = shrink(start.float()).double()
        start += (weight - shrunk) * (start / shrunk).nan_to_num(1.0)
    place = (start + bound.double()) / width
    ways: list[Tensor] = []
    chances: list[Tensor] = []
    nearby = torch.arange(-_NEARBY, _NEARBY + 1)
    draws = [((place / spacing).round()[..., None] + nearby) * spacing for spacing in (1.0, 0.5)]
    for given in shrink(torch.stack([torch.stack(_values(each, bound)) for each in draws])).double():
        ways.append((given == weight[..., None]).any(dim=-1).any(dim=0))
        apart = (given[0, ..., -1] - given[0, ..., 0]).abs() / (2 * _NEARBY)
        _, exponent = torch.frexp(weight)
        chances.append(
            (torch.ldexp(torch.full_like(weight, torch.finfo(torch.float32).eps / 2), exponent) / apart).clamp(max=1.0)
        )
    (on_cpu, halves), (by_cpu, by_halves) = ways, chances
    on_gpu = on_cpu | (place < _DRAWS / 4) | ((place < _DRAWS / 2) & halves)
    by_gpu = torch.where(place < _DRAWS / 4, 1.0, torch.where(place < _DRAWS / 2, by_halves, by_cpu))
    return (on_cpu.all(dim=1) & (by_cpu.prod(dim=1) < _CHANCE)) | (on_gpu.all(dim=1) & (by_gpu.prod(dim=1) < _CHANCE))


def _multiplied(values: Tensor, amount: float, steps: int) -> Tensor:
    """Return what steps of ``w ← w · (1 − amount)`` make of float32 values."""
    found: Any = values.numpy().copy()
    factor = np.float32(1.0 - amount)
    for _ in range(steps):
        np.multiply(found, factor, out=found)
    return torch.from_numpy(found)


def _subtracted(values: Tensor, amount: float, steps: int) -> Tensor:
    """Return what steps of ``w ← w − amount · w`` make of float32 values, as fused optimizers compute it."""
    found: Any = values.numpy().copy()
    part, factor = np.empty_like(found), np.float32(amount)
    for _ in range(steps):
        np.multiply(found, factor, out=part)
        np.subtract(found, part, out=found)
    return torch.from_numpy(found)


_STEPS = (_multiplied, _subtracted)
