"""Say where the neurons of a tensor lie, and bring them to one dimension if several index them."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "Dims",
    "Factor",
    "NeuronLayout",
    "assumed_layout",
    "neuron_dims_first",
    "neurons_first",
    "rows_first",
    "rows_kept",
]

#: Size, and by how many neurons one step along it leads on: 0 for positions, and below 0 for rows of experts.
Factor = tuple[int, int]
#: The factors of each dimension of a tensor, from the outermost to the innermost; see :mod:`neuronscope.attach.units`.
Dims = tuple[tuple[Factor, ...], ...]


class NeuronLayout(NamedTuple):
    """Where the neurons of a tensor lie.

    Attributes:
        axis: The dimension that indexes them, ≥ 0; the innermost one of several.
        dims: The factors of all dimensions, if no dimension alone indexes the neurons; otherwise ``None``.
    """

    axis: int
    dims: Dims | None = None


def assumed_layout(dimensions: int) -> NeuronLayout:
    """Return the layout to assume if no layer is known: axis 1 for 2, 4 and 5 dimensions, otherwise the last.

    >>> assumed_layout(4).axis, assumed_layout(3).axis
    (1, 2)
    """
    return NeuronLayout(1 if dimensions in (2, 4, 5) else max(dimensions - 1, 0))


def neurons_first(tensor: Tensor, axis: int, dims: Dims | None) -> tuple[Tensor, int]:
    """Return a tensor whose neurons lie on one dimension, and that dimension.

    Args:
        tensor: Activation of the layout's shape, but for the sizes of the dimensions without neurons.
        axis: As in :class:`NeuronLayout`.
        dims: As in :class:`NeuronLayout`.

    Returns:
        The same tensor if one dimension indexes its neurons, else ``(N, P)``, which may be a copy.

    >>> import torch
    >>> heads = torch.arange(12).reshape(1, 3, 2, 2)  # (batch, head, time, channel)
    >>> neurons_first(heads, 3, ((), ((3, 2),), ((2, 0),), ((2, 1),)))[0].tolist()
    [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11]]
    """
    if dims is None:
        return tensor, axis
    view, dimensions = neuron_dims_first(tensor, NeuronLayout(axis, dims))
    count = 1
    for size in view.shape[:dimensions]:
        count = count * size
    return view.reshape(count, -1), 0


def neuron_dims_first(tensor: Tensor, layout: NeuronLayout) -> tuple[Tensor, int]:
    """Return a view whose first dimensions index the neurons and whose others index the positions. It never copies.

    Args:
        tensor: As in :func:`neurons_first`.
        layout: Where its neurons lie.

    Returns:
        The view, and how many dimensions index the neurons: the first of them the outermost.

    >>> import torch
    >>> heads = torch.zeros(7, 3, 5, 2)  # (batch, head, time, channel)
    >>> view, count = neuron_dims_first(heads, NeuronLayout(3, ((), ((3, 2),), ((5, 0),), ((2, 1),))))
    >>> tuple(view.shape), count
    ((3, 2, 7, 5), 2)
    """
    axis, dims = layout
    if dims is None:
        return tensor.movedim(axis, 0), 1
    sizes: list[int] = []
    strides: list[int] = []
    for index, dim in enumerate(dims):
        if any(stride for _, stride in dim):
            for size, stride in dim:
                sizes.append(size)
                strides.append(stride)
        else:
            sizes.append(tensor.shape[index])
            strides.append(0)
    neurons = [place for _, place in sorted((-stride, place) for place, stride in enumerate(strides) if stride)]
    others = [place for place, stride in enumerate(strides) if not stride]
    return tensor.reshape(sizes).permute(neurons + others), len(neurons)


def rows_first(tensor: Tensor, dims: Dims) -> Tensor:
    """Return a tensor of rows of which each has the neurons of one expert, as ``(R, P, N)``, which may be a copy.

    Args:
        tensor: Activation of the layout's shape, but for the sizes of the dimensions that index positions.
        dims: As in :class:`NeuronLayout`; strides below 0 count rows. The tensor says how many these are, as a graph
            may be traced with another number of them.

    >>> import torch
    >>> rows_first(torch.arange(6).reshape(3, 2), (((3, -1),), ((2, 1),))).tolist()
    [[[0, 1]], [[2, 3]], [[4, 5]]]
    """
    sizes: list[int] = []
    strides: list[int] = []
    for index, dim in enumerate(dims):
        first, *rest = dim if any(stride for _, stride in dim) else ((1, 0),)
        sizes += tensor.shape[index] // math.prod(size for size, _ in rest), *(size for size, _ in rest)
        strides += first[1], *(stride for _, stride in rest)
    rows = sorted((place for place, stride in enumerate(strides) if stride < 0), key=lambda place: strides[place])
    others = [place for place, stride in enumerate(strides) if not stride]
    units = sorted((place for place, stride in enumerate(strides) if stride > 0), key=lambda place: -strides[place])
    moved = tensor.reshape(sizes).permute(rows + others + units)
    count, width = math.prod(sizes[place] for place in rows), math.prod(sizes[place] for place in units)
    return moved.reshape(count, math.prod(sizes[place] for place in others), width)


def rows_kept(tensor: Tensor, dims: Dims, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a tensor of rows as :func:`rows_first` does, and which of its positions a mask keeps.

    Args:
        tensor: As there.
        dims: As there.
        mask: Which indices of the tensor's first dimensions are kept, bool ``(R, 1)``; ``None`` = all.

    Returns:
        ``(R, P, N)``, and bool ``(R, P)`` or ``None``.

    >>> import torch
    >>> mask = torch.tensor([[True], [False], [True]])
    >>> rows_kept(torch.zeros(3, 2), (((3, -1),), ((2, 1),)), mask)[1].tolist()
    [[True], [False], [True]]
    """
    rows = rows_first(tensor, dims)
    if mask is None:
        return rows, None
    covered = next(count for count in range(1, tensor.dim()) if math.prod(tensor.shape[:count]) == len(mask))
    kept = mask.reshape(tensor.shape[:covered] + (1,) * (tensor.dim() - covered)).expand(tensor.shape)
    return rows, rows_first(kept, dims)[..., 0]
