"""Follow the units of a layer through changes of shape: pure arithmetic on sizes, without tensors.

Each dimension of a tensor is a product of factors, from the outermost to the innermost. A factor indexes either
positions (stride 0) or units. A unit factor of size ``n`` and stride ``s`` says that a step along it is a step of ``s``
units of the layer. A linear layer of 12 units over (batch, time) has the dimensions ``((8, 0),), ((5, 0),), ((12,
1),)``; split in 3 heads its last dimension becomes ``((3, 4),), ((4, 1),)``. A dimension of size 1 has no factor.

Where data picks the weight of each row, as in a mixture of experts, the rows have negative strides: a factor of size
``n`` and stride ``-s`` says that a step along it is a step of ``s`` rows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from neuronscope.count.neuron_layout import Dims, Factor, NeuronLayout

__all__ = [
    "Experts",
    "Run",
    "Units",
    "broadcast",
    "experts_of",
    "fits",
    "has_rows",
    "has_units",
    "join_runs",
    "merge_runs",
    "place",
    "place_rows",
    "positions",
    "reduce",
    "reshape",
    "resized",
    "select",
    "slice_dim",
]

#: A run of units of one layer: its path, the first unit, the end and the step.
Run = tuple[str, int, int, int]


class Experts:
    """The layers that rows belong to, of which data picks one for each row; :func:`experts_of` makes it.

    Attributes:
        layers: Path of each layer; a row says the number of its own.
        joined: Whether rows of the layers were joined, so that it is known without data how many each has.
    """

    __slots__ = ("joined", "layers")

    def __init__(self, layers: tuple[str, ...], joined: bool) -> None:
        self.layers, self.joined = layers, joined


@functools.lru_cache(maxsize=10_000)
def experts_of(layers: tuple[str, ...], joined: bool = False) -> Experts:
    """Return the experts that are these layers: the same object for the same layers, so that they are compared quickly.

    Args:
        layers: Path of each layer.
        joined: Whether rows of the layers were joined.
    """
    return Experts(layers, joined)


class Units(NamedTuple):
    """Which units of which layer the elements of a tensor are.

    Attributes:
        call: Number of the producer's call in this forward, or of each call whose outputs were joined.
        layer: Path of the layer, or of each layer that was joined, as in ``a+b``.
        runs: All units of the producer's output, in order; see :data:`Run`.
        first: Number of the first unit of the tensor, in ``runs``.
        dims: Where the units lie.
        explicit: Whether a site's name must say which units these are although the tensor has all of ``runs``: they are
            not each unit of the layers once.
        experts: The layers of which each row has the units of one, or ``None``. ``layer`` is their common name then.
        rows: Number of rows that were told apart, if there are experts; 1 if all positions are of one expert.
    """

    call: tuple[int, ...]
    layer: str
    runs: tuple[Run, ...]
    first: int
    dims: Dims
    explicit: bool = False
    experts: Experts | None = None
    rows: int = 0

    @property
    def size(self) -> int:
        """Number of units in the tensor."""
        return math.prod(size for dim in self.dims for size, stride in dim if stride > 0)

    @property
    def has_all_rows(self) -> bool:
        """Whether each row that was told apart is in the tensor once; also true if no rows are told apart."""
        expected = 1
        for size, stride in sorted(
            (factor for dim in self.dims for factor in dim if factor[1] < 0), reverse=True, key=lambda factor: factor[1]
        ):
            if -stride != expected:
                return False
            expected *= size
        return self.experts is None or expected == self.rows

    @property
    def width(self) -> int:
        """Number of units of the producer's output."""
        return sum(len(range(start, stop, step)) for _, start, stop, step in self.runs)

    @property
    def layout(self) -> NeuronLayout:
        """Where the units lie, to count them."""
        if self.experts is not None:
            own = [index for index, dim in enumerate(self.dims) if any(stride > 0 for _, stride in dim)]
            return NeuronLayout(own[-1] if own else 0, self.dims)
        found = [index for index, dim in enumerate(self.dims) if has_units(dim)]
        if len(found) == 1 and len(self.dims[found[0]]) == 1:
            return NeuronLayout(found[0])
        if not found:  # one unit: any dimension of size 1 indexes it
            single = [index for index, dim in enumerate(self.dims) if not dim]
            return NeuronLayout(single[-1]) if single else NeuronLayout(0, self.dims)
        return NeuronLayout(found[-1], self.dims)

    @property
    def order(self) -> tuple[Factor, ...]:
        """The unit factors by falling stride: in this order they count the units upwards."""
        factors = (factor for dim in self.dims for factor in dim if factor[1] > 0)
        return tuple(_joined(sorted(factors, key=lambda factor: -factor[1])))

    @property
    def which(self) -> tuple[object, ...]:
        """Which units of which layer these are, wherever they lie."""
        return self.layer, self.runs, self.first, self.order

    def numbers(self) -> list[int]:
        """Return the number of each unit of the tensor in ``runs``, upwards."""
        found = [self.first]
        for size, stride in self.order:
            found = [number + index * stride for number in found for index in range(size)]
        return found

    def tensor_runs(self) -> tuple[Run, ...]:
        """Return the units of the tensor, in the order in which they are counted."""
        if self.size == self.width:
            return self.runs
        every = [(layer, unit) for layer, *bounds in self.runs for unit in range(*bounds)]
        return merge_runs(every[number] for number in self.numbers())

    def text(self) -> str:
        """Return which of the producer's units the tensor holds, as a site's name shows it; ``""`` for all.

        If several layers were joined, the name of its layer precedes each run.
        """
        if self.size == self.width and not self.explicit:
            return ""
        joined = any(run[0] != self.runs[0][0] for run in self.runs)
        by_layer = itertools.groupby(self.tensor_runs(), lambda run: run[0])
        texts = [(layer, _runs_text([run[1:] for run in runs])) for layer, runs in by_layer]
        return ",".join(f"{layer}:{text}" if joined else text for layer, text in texts)


def _runs_text(runs: Sequence[tuple[int, int, int]]) -> str:
    """Return runs of one layer as text, the middle ones left out where they are evenly spaced.

    >>> _runs_text([(0, 16, 1), (48, 64, 1), (96, 112, 1), (144, 160, 1)])
    '0:16,48:64,...,144:160'
    """
    texts = [
        f"{start}" if len(range(start, stop, step)) == 1 else f"{start}:{stop}" + (f":{step}" if step > 1 else "")
        for start, stop, step in runs
    ]
    even = len({(stop - start, step) for start, stop, step in runs}) == 1
    distances = {after[0] - before[0] for before, after in itertools.pairwise(runs)}
    if len(runs) > 3 and even and len(distances) == 1:
        texts[2:-1] = ["..."]
    return ",".join(texts)


def merge_runs(units: Iterable[tuple[str, int]]) -> tuple[Run, ...]:
    """Return the fewest runs that list some units in their order.

    Args:
        units: Path of the layer and number of each unit.

    >>> merge_runs([("a", 0), ("a", 1), ("a", 2), ("b", 4), ("b", 6)])
    (('a', 0, 3, 1), ('b', 4, 7, 2))
    """
    runs: list[list[tuple[str, int]]] = []
    for layer, unit in units:
        last = runs[-1] if runs else None
        if last and last[-1][0] == layer:
            step = unit - last[-1][1]
            if step > 0 and (len(last) == 1 or step == last[1][1] - last[0][1]):
                last.append((layer, unit))
                continue
        runs.append([(layer, unit)])
    return tuple((run[0][0], run[0][1], run[-1][1] + 1, run[1][1] - run[0][1] if len(run) > 1 else 1) for run in runs)


def join_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Return runs with neighbours of one layer made one where the second goes on where the first ends.

    >>> join_runs([("a", 0, 3, 1), ("a", 3, 5, 1), ("b", 0, 2, 1)])
    (('a', 0, 5, 1), ('b', 0, 2, 1))
    """
    found: list[Run] = []
    for layer, start, stop, step in runs:
        last = found[-1] if found else None
        if last is not None and step == last[3] == 1 and last[0] == layer and last[2] == start:
            found[-1] = (layer, last[1], stop, step)
        else:
            found.append((layer, start, stop, step))
    return tuple(found)


def positions(shape: Iterable[int]) -> Dims:
    """Return the dimensions of a tensor that indexes positions only."""
    return tuple(() if size == 1 else ((size, 0),) for size in shape)


def place(shape: Sequence[int], unit_dims: Sequence[int]) -> Dims:
    """Return the dimensions of a producer's output.

    Args:
        shape: Its shape.
        unit_dims: The dimensions that index the units, the outermost first, ≥ 0.

    >>> place((8, 3, 4), (1, 2))
    (((8, 0),), ((3, 4),), ((4, 1),))
    """
    strides, stride = {}, 1
    for dim in reversed(unit_dims):
        strides[dim] = stride
        stride *= shape[dim]
    return tuple(() if size == 1 else ((size, strides.get(dim, 0)),) for dim, size in enumerate(shape))


def place_rows(shape: Sequence[int], unit_dims: Sequence[int], row_dims: Sequence[int]) -> Dims:
    """Return the dimensions of the output of a layer of experts.

    Args:
        shape: Its shape.
        unit_dims: The dimensions that index the units, the outermost first, ≥ 0.
        row_dims: The dimensions that index the rows, likewise.

    >>> place_rows((6, 4), (1,), (0,))
    (((6, -1),), ((4, 1),))
    """
    units, rows = place(shape, unit_dims), place(shape, row_dims)
    return tuple(
        tuple((size, -stride) for size, stride in row) if has_units(row) else unit
        for unit, row in zip(units, rows, strict=True)
    )


def has_units(dim: Iterable[Factor]) -> bool:
    """Whether a dimension indexes units, or rows of which each has the units of one expert; never for one of size 1."""
    return any(stride for _, stride in dim)


def has_rows(dim: Iterable[Factor]) -> bool:
    """Whether a dimension indexes rows of which each has the units of one expert; never for one of size 1."""
    return any(stride < 0 for _, stride in dim)


def reshape(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """Return the dimensions after a view in row-major order; ``None`` if it cuts units and positions in one group.

    Args:
        dims: The dimensions before it.
        shape: The shape after it.

    >>> reshape((((8, 0),), ((12, 1),)), (8, 3, 4))
    (((8, 0),), ((3, 4),), ((4, 1),))
    >>> reshape((((8, 0),), ((12, 1),)), (4, 24))
    (((4, 0),), ((2, 0), (12, 1)))
    >>> reshape((((5, 0),), ((12, 1),)), (12, 5)) is None
    True
    """
    left = list(reversed(_joined(factor for dim in dims for factor in dim)))
    if any(size == 0 for size in shape) or any(size == 0 for size, _ in left):
        return None
    found = []
    for size in shape:
        dim: list[Factor] = []
        while size > 1:
            if not left:
                return None
            inner, stride = left.pop()
            if size % inner == 0:
                dim.append((inner, stride))
                size //= inner
            elif inner % size == 0:
                dim.append((size, stride * (inner // size)))
                left.append((inner // size, stride))
                size = 1
            else:
                return None
        found.append(tuple(_joined(dim)))
    return tuple(found) if not left else None


def _joined(factors: Iterable[Factor]) -> list[Factor]:
    """Return the same factors with neighbours made one where they count on."""
    found: list[Factor] = []
    for size, stride in factors:
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return found


def select(units: Units, dim: int, index: int) -> Units:
    """Return the units at one index of a dimension, which is removed.

    Args:
        units: Those of the tensor.
        dim: The dimension, ≥ 0.
        index: The index, ≥ 0.
    """
    first = units.first
    for size, stride in reversed(units.dims[dim]):
        first += index % size * stride
        index //= size
    return units._replace(first=first, dims=units.dims[:dim] + units.dims[dim + 1 :])


def slice_dim(units: Units, dim: int, start: int, length: int, step: int = 1) -> Units | None:
    """Return the units in a slice of a dimension; ``None`` if it cuts units and positions in one group.

    Args:
        units: Those of the tensor.
        dim: The dimension, ≥ 0.
        start: First index.
        length: Number of indices.
        step: Distance of the indices, ≥ 1.
    """
    factors = units.dims[dim]
    whole = math.prod(size for size, _ in factors)
    if length == whole:
        return units
    if not has_units(factors):
        changed: tuple[Factor, ...] = ((length, 0),)
        first = units.first
    else:
        inner = math.prod(size for size, _ in factors[1:])
        if (inner > 1 and step != 1) or start % inner or length % inner:
            return None
        (_, stride), rest = factors[0], factors[1:]
        changed = ((length // inner, stride * step), *rest)
        first = units.first + start // inner * stride
    changed = tuple(factor for factor in changed if factor[0] != 1)
    return units._replace(first=first, dims=(*units.dims[:dim], changed, *units.dims[dim + 1 :]))


def resized(dims: Sequence[tuple[Factor, ...]], shape: Sequence[int]) -> Dims | None:
    """Return dimensions for a shape: those of units as they are, and all others as positions of its sizes.

    Args:
        dims: The dimensions, the last of which belong to the last of the shape.
        shape: The shape.

    Returns:
        The dimensions; ``None`` if the shape has fewer, or if one that indexes units has another size.

    >>> resized((((8, 0),), ((12, 1),)), (3, 5, 12))
    (((3, 0),), ((5, 0),), ((12, 1),))
    """
    new = len(shape) - len(dims)
    if new < 0:
        return None
    found = [*positions(shape[:new])]
    for dim, size in zip(dims, shape[new:], strict=True):
        if has_units(dim) and math.prod(length for length, _ in dim) != size:
            return None
        found.append(dim if has_units(dim) else positions((size,))[0])
    return tuple(found)


def fits(dims: Dims, shape: Sequence[int]) -> bool:
    """Whether dimensions are those of a shape.

    Args:
        dims: The dimensions.
        shape: The shape.
    """
    return len(dims) == len(shape) and all(
        math.prod(length for length, _ in dim) == size for dim, size in zip(dims, shape, strict=True)
    )


def broadcast(dims: Dims, shape: Sequence[int]) -> Dims:
    """Return the dimensions of a tensor that is broadcast to a shape; what is repeated are positions.

    Args:
        dims: Its dimensions.
        shape: The shape, with at least as many dimensions.
    """
    new = len(shape) - len(dims)
    return (*positions(shape[:new]), *(dim or positions(shape[new + index :][:1])[0] for index, dim in enumerate(dims)))


def reduce(dims: Dims, axes: Iterable[int], *, keepdim: bool) -> Dims | None:
    """Return the dimensions after a reduction; ``None`` if it joins several units.

    Args:
        dims: The dimensions before it.
        axes: The dimensions that are reduced, ≥ 0.
        keepdim: Whether they stay, with size 1.
    """
    gone = set(axes)
    if any(has_units(dims[axis]) for axis in gone):
        return None
    return tuple(() if index in gone else dim for index, dim in enumerate(dims) if keepdim or index not in gone)
