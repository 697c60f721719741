"""Say which elements of a tensor each program of a kernel reads, from the tensor's sizes and strides alone.

A program takes some neurons and a share of the positions, and goes through them tile by tile. What is next to each
other in memory decides the tile: neurons (rows, channels last), or the positions of one neuron (images). If these are
few, as in 7 × 7 maps, each position of a map is a neuron of its own at first, and they are added up afterwards; so the
tensor is read in long rows all the same. The shares follow from the shape and not from the device, so that the sums of
magnitudes have the same bits everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from neuronscope.count.neuron_layout import NeuronLayout, neuron_dims_first

__all__ = ["PROGRAMS", "TILE", "KernelPlan", "plan_for"]

#: Elements of a tile.
TILE = 4096
#: Most programs among which the tiles are shared out, and most shares of the positions.
PROGRAMS = 1024
#: Most neurons of a tile of several positions, fewest of any tile, and most adjacent positions of a tile.
_WIDE, _NARROW, _LONG = 128, 16, 512
#: Fewest adjacent positions of a neuron for which a tile of its own pays, and most numbers to add up afterwards.
_MAP, _FOLDED = 128, 1 << 18
#: Most dimensions of positions, and of neurons, after those were joined that lie regularly in memory.
_POSITION_DIMS, _NEURON_DIMS = 4, 2
#: Most tiles of a program, which counts in 15 bits for each place of a tile.
_SHARE = (1 << 15) - 1
#: Indices are 32 bits wide.
_MOST = 1 << 31


class KernelPlan(NamedTuple):
    """How the kernels walk through tensors of one shape, order in memory and layout.

    Attributes:
        neurons: Number of neurons.
        fold: How many adjacent numbers of what a program leaves belong to one neuron: the positions of a small map.
        positions: Number of positions of each neuron.
        neuron_sizes: How many numbers a program's row has, ``neurons * fold``, and the inner ones of two dimensions.
        neuron_strides: The strides of the two.
        sizes: The positions, as four dimensions.
        strides: Their strides.
        keep_strides: Their strides in the mask of positions.
        along: Whether a tile holds adjacent positions of the innermost dimension.
        tile: Positions and numbers of a row in a tile.
        tiles: How many tiles of positions there are.
        share: How many of them a program takes.
        shares: Into how many shares they are cut.
    """

    neurons: int
    fold: int
    positions: int
    neuron_sizes: tuple[int, int]
    neuron_strides: tuple[int, int]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    keep_strides: tuple[int, ...]
    along: bool
    tile: tuple[int, int]
    tiles: int
    share: int
    shares: int

    @property
    def row(self) -> int:
        """How many numbers a program's share leaves of each quantity."""
        return self.neuron_sizes[0]

    @property
    def programs(self) -> tuple[int, int]:
        """How many programs there are along the numbers of a row, and along the positions."""
        return -(-self.row // self.tile[1]), self.shares


class _Dim(NamedTuple):
    size: int
    stride: int
    keep: int = 0

    def holds(self, inner: _Dim) -> bool:
        """Whether this dimension and the one inside it are one in memory."""
        return self.stride == inner.stride * inner.size and self.keep == inner.keep * inner.size


def plan_for(tensor: Tensor, layout: NeuronLayout, keep: Tensor | None, programs: int = PROGRAMS) -> KernelPlan | None:
    """Return the plan for a tensor; ``None`` if it lies in memory in a way that the kernels cannot walk.

    Args:
        tensor: ``(…, N, …)``, with elements.
        layout: Where its neurons lie.
        keep: Which positions are counted, of the positions' shape; ``None`` = all.
        programs: How many programs may share the tiles.
    """
    view, count = neuron_dims_first(tensor, layout)
    shape, strides = view.shape, view.stride()
    kept = (0,) * (view.dim() - count) if keep is None else keep.stride()
    units = _joined([_Dim(*dim) for dim in zip(shape[:count], strides[:count], strict=True)])
    places = [_Dim(*dim) for dim in zip(shape[count:], strides[count:], kept, strict=True)]
    places = _joined(sorted(places, key=lambda dim: -dim.stride))
    neurons, positions = math.prod(shape[:count]), math.prod(shape[count:])
    along = bool(places) and (not units or places[-1].stride < units[-1].stride)
    fold = 1
    if along and len(units) == 1 and _folds(units[0], places[-1], neurons):
        inner = places.pop()
        fold, along, units = inner.size, False, [_Dim(neurons * inner.size, inner.stride)]
    if len(units) > _NEURON_DIMS or len(places) > _POSITION_DIMS or max(positions, neurons * fold) >= _MOST:
        return None
    units = [_Dim(1, 0)] * (_NEURON_DIMS - len(units)) + units
    places = [_Dim(1, 0)] * (_POSITION_DIMS - len(places)) + places
    sizes = tuple(dim.size for dim in places)
    row, inner_size = neurons * fold, sizes[-1]
    if along:
        long = min(_power(inner_size), _LONG)
        tile = long, min(_power(row), max(TILE // long, 1))
        tiles = math.prod(sizes[:-1]) * -(-inner_size // long)
    else:
        wide = max(min(_power(row), _WIDE), TILE // _power(positions // fold), _NARROW)
        wide = min(wide, _power(row), TILE)
        tile = min(TILE // wide, _power(positions // fold)), wide
        tiles = -(-(positions // fold) // tile[0])
    shares = min(max(programs // -(-row // tile[1]), -(-tiles // _SHARE), 1), tiles)
    if shares > PROGRAMS:
        return None
    share = -(-tiles // shares)
    return KernelPlan(
        neurons=neurons,
        fold=fold,
        positions=positions,
        neuron_sizes=(row, units[1].size),
        neuron_strides=(units[0].stride, units[1].stride),
        sizes=sizes,
        strides=tuple(dim.stride for dim in places),
        keep_strides=tuple(dim.keep for dim in places),
        along=along,
        tile=tile,
        tiles=tiles,
        share=share,
        shares=-(-tiles // share),
    )


def _folds(units: _Dim, inner: _Dim, neurons: int) -> bool:
    """Whether the maps of all neurons lie one after another in memory, and are small."""
    adjacent = inner.stride == 1 and units.stride == inner.size and not inner.keep
    return adjacent and inner.size < _MAP and neurons * inner.size <= _FOLDED


def _joined(dims: Sequence[_Dim]) -> list[_Dim]:
    """Return the dimensions, from the outermost on, with those made one that are one in memory."""
    joined: list[_Dim] = []
    for dim in dims:
        if dim.size == 1:
            continue
        if joined and joined[-1].holds(dim):
            dim = _Dim(joined.pop().size * dim.size, dim.stride, dim.keep)
        joined.append(dim)
    return joined


def _power(size: int) -> int:
    """Return the least power of two that is not below a size."""
    return 1 << (size - 1).bit_length()
