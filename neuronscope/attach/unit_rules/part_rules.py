"""Rules of functions that take a part of a tensor: indices, slices, selections and splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from neuronscope.attach.origins import (
    CONSTANT,
    ENDED,
    LOST,
    PICKED,
    UNKNOWN,
    WEIGHT,
    Cut,
    Operand,
    Origin,
    PickedMatrices,
    PickedUnits,
)
from neuronscope.attach.unit_rules.operation import Function, Index, Operation, Rule, Shape, lose, table, tensors_in
from neuronscope.attach.units import Units, has_units, positions, resized, select, slice_dim

__all__ = ["PARTS", "index_units"]

_ALL = Index(None, None, None)


def _index_rule(operation: Operation) -> Origin:
    index = operation.args[1]
    return _indexed(operation, index if type(index) is tuple else (index,))


def _index_operator(operation: Operation) -> Origin:
    """Say what ``aten.index`` gives: its index is a list, in which ``None`` stands for a whole dimension."""
    return _indexed(operation, tuple(_ALL if part is None else part for part in operation.args[1]))


def _slice_rule(operation: Operation) -> Origin:
    """Say what ``aten.slice`` gives, the operator of ``x[:, start:end:step]``."""
    dim = operation.argument(1, "dim", default=0) % len(operation.first.shape)
    part = Index(operation.argument(2, "start"), operation.argument(3, "end"), operation.argument(4, "step", default=1))
    return _indexed(operation, (*[_ALL] * dim, part))


def _select_rule(operation: Operation) -> Origin:
    dim, index = operation.argument(1, "dim"), operation.argument(2, "index")
    return _indexed(operation, (*[_ALL] * (dim % len(operation.first.shape)), index))


def _narrow_rule(operation: Operation) -> Origin:
    sizes = operation.first.shape
    dim, start = operation.argument(1, "dim") % len(sizes), operation.argument(2, "start")
    length = operation.argument(3, "length")
    if not isinstance(start, int):
        return lose(operation)
    start %= sizes[dim]
    return _indexed(operation, (*[_ALL] * dim, Index(start, start + length, None)))


def _indexed(operation: Operation, index: tuple[Any, ...], number: int = 0) -> Origin:
    """Return the origin of ``operand[index]``, which is the output of this number."""
    operand = operation.first
    origin = operand.origin
    if origin.state == WEIGHT:
        return _part_of_weight(operand, index)
    if origin.units is None:
        return origin
    units = index_units(origin.units, operand.shape, index, operation.outputs[number])
    if units is ENDED:
        return Origin.of(ENDED, operation.upstream, layer=origin.units.layer)
    if not isinstance(units, Units):
        return Origin.of(LOST, origin.upstream)
    return origin.but(units=units, part=origin.part + tuple(_taken(origin.units, operand.shape, index)))


def _taken(units: Units, shape: Shape, index: tuple[Any, ...]) -> Iterator[tuple[int, int, int, int]]:
    """Yield which positions an index takes; see :attr:`Origin.part`."""
    dim = 0
    for each in _without_ellipsis(index, shape):
        taken = _dims_of(each)
        if not taken or has_units(units.dims[dim]):
            pass
        elif type(each) is int:
            yield dim, each % shape[dim], 1, 1
        elif not isinstance(each, Index):
            yield dim, PICKED, 0, 0
        else:
            start, stop, step = slice(*each).indices(shape[dim])
            if len(range(start, stop, step)) < shape[dim]:
                yield dim, start, len(range(start, stop, step)), step
        dim += taken


def _part_of_weight(operand: Operand, index: tuple[Any, ...]) -> Origin:
    """Return the origin of a part of a weight: some units of its layer, or a matrix of a stack, as ``experts.3``."""
    origin, shape = operand.origin, operand.shape
    if len(shape) < 2:
        return origin
    if any(origin.cuts):  # a part of a part
        origin = origin.as_layer()
    by_data = any(isinstance(part, (Operand, tuple)) and not isinstance(part, Index) for part in index)
    if by_data:
        return origin.but(picked=_pick_of(operand, origin, index))
    if origin.picked and not all(isinstance(part, Index) or part is Ellipsis for part in index):
        origin = origin.but(picked=True)
    index = _without_ellipsis(index, shape)
    layer, dim, whole = origin.layer, 0, True
    cuts: list[Cut | None] = []
    for part in index:
        if isinstance(part, Index):
            start, stop, step = slice(*part).indices(shape[dim])
            cuts.append(None if len(range(start, stop, step)) == shape[dim] else (start, stop, step))
            dim += 1
        elif isinstance(part, int) and not isinstance(part, bool):
            if cuts:  # a row of each matrix
                whole = False
                cuts.append((part % shape[dim], part % shape[dim] + 1, 1))
            else:
                layer = f"{layer}.{part % shape[dim]}"
            dim += 1
        else:
            whole = False
    cuts += [None] * (len(shape) - dim)
    if isinstance(origin.picked, PickedMatrices) and any(cuts[: origin.picked.dims]):
        origin = origin.but(picked=True)  # some of the matrices that were picked
    found = origin.but(layer=layer, cuts=tuple(cuts) if any(cuts) else ())
    return found if whole else found.as_layer()


def _pick_of(operand: Operand, origin: Origin, index: tuple[Any, ...]) -> bool | PickedMatrices:
    """Return what data picks from a weight, by an index of tensors."""
    shape, by = operand.shape, index[0]
    if len(shape) < 3:
        return any(each.origin.state not in (CONSTANT, UNKNOWN, WEIGHT) for each in tensors_in(index))
    alone = isinstance(by, Operand) and not by.boolean and all(part in (_ALL, Ellipsis) for part in index[1:])
    if not alone or operand.origin.picked or any(operand.origin.cuts):
        return True
    return PickedMatrices(origin.layer, shape[0], len(by.shape))


def _without_ellipsis(index: tuple[Any, ...], shape: Shape) -> tuple[Any, ...]:
    """Return an index with a full slice for each dimension that an ellipsis stands for."""
    if Ellipsis not in [part for part in index if part is Ellipsis]:
        return index
    taken = sum(_dims_of(part) for part in index)
    place = next(number for number, part in enumerate(index) if part is Ellipsis)
    return (*index[:place], *[_ALL] * (len(shape) - taken), *index[place + 1 :])


def index_units(units: Units, shape: Shape, index: tuple[Any, ...], after: Shape) -> Units | str | None:
    """Return the units after an index; ``ENDED`` if data picked some of them; ``None`` if they are lost.

    Args:
        units: Those before it.
        shape: The shape before it.
        index: The index.
        after: The shape after it.
    """
    dim = 0  # of the units that are left
    picked: list[int] = []  # their dimensions that data picks
    parted = False  # whether anything lies between the parts that pick
    current, sizes = units, list(shape)
    for part in _without_ellipsis(index, shape):
        if part is None:
            current = current._replace(dims=(*current.dims[:dim], (), *current.dims[dim:]))
            sizes.insert(dim, 1)
            dim += 1
        elif isinstance(part, Index):
            start, stop, step = slice(*part).indices(sizes[dim])
            length = len(range(start, stop, step))
            found = slice_dim(current, dim, start, length, step) if step > 0 and length else None
            if found is None:
                return None
            current, sizes[dim] = found, length
            dim += 1
        elif isinstance(part, int) and not isinstance(part, bool):
            current = select(current, dim, part % sizes[dim])
            del sizes[dim]
        elif isinstance(part, Operand) and not part.shape:  # a single number or truth value, which data gives
            if part.boolean or has_units(current.dims[dim]):
                return None if part.boolean else ENDED
            current = current._replace(dims=current.dims[:dim] + current.dims[dim + 1 :])
            del sizes[dim]
        elif isinstance(part, (Operand, tuple)):
            for _ in range(_dims_of(part)):
                if has_units(current.dims[dim]):
                    return ENDED
                parted = parted or (bool(picked) and picked[-1] != dim - 1)
                picked.append(dim)
                dim += 1
        else:
            return None
    if not picked:
        return current
    return _picked_rows(current, picked, 0 if parted else picked[0], after)


def _dims_of(part: Any) -> int:
    """Return how many dimensions of a tensor a part of an index takes."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, Operand) and part.boolean:
        return len(part.shape)
    return 1


def _picked_rows(units: Units, picked: Sequence[int], place: int, after: Shape) -> Units | None:
    """Return the units after dimensions of positions were picked by data: new dimensions take their place."""
    kept = [dim for index, dim in enumerate(units.dims) if index not in picked]
    new = len(after) - len(kept)
    if new < 0:
        return None
    found = resized([*kept[:place], *positions(after[place : place + new]), *kept[place:]], after)
    return None if found is None else units._replace(dims=found)


def _split_rule(operation: Operation) -> Sequence[Origin]:
    return _pieces(operation, operation.argument(2, "dim", "axis", default=0))


def _split_along(dim: int) -> Rule:
    return lambda operation: _pieces(operation, min(dim, len(operation.first.shape) - 1))


def _pieces(operation: Operation, dim: int) -> Sequence[Origin]:
    """Return the origins of the pieces of a tensor that was cut along a dimension."""
    dim %= len(operation.first.shape)
    found, start = [], 0
    for number, shape in enumerate(operation.outputs):
        part = Index(start, start + shape[dim], None)
        found.append(_indexed(operation, (*[_ALL] * dim, part), number))
        start += shape[dim]
    return found


def _unbind_rule(operation: Operation) -> Sequence[Origin]:
    dim = operation.argument(1, "dim", "axis", default=0) % len(operation.first.shape)
    return [_indexed(operation, (*[_ALL] * dim, number), number) for number in range(len(operation.outputs))]


def _index_select(operation: Operation) -> Origin:
    dim = operation.argument(1, "dim", "axis") % len(operation.first.shape)
    index = operation.argument(2, "index", "indices")
    return _indexed(operation, (*[_ALL] * dim, index))


def _gather(operation: Operation) -> Origin:
    """Say what ``gather`` picks along a dimension of positions; the other dimensions may lose their ends."""
    operand = operation.first
    origin, rank = operand.origin, len(operand.shape)
    if origin.units is None:
        return origin
    dim = operation.argument(1, "dim", "axis")
    if not isinstance(dim, int) or has_units(origin.units.dims[dim % rank]):
        index = operation.argument(2, "index")
        by = index.origin.picks if isinstance(index, Operand) else None
        same = by is not None and by.units == origin.units  # as the values of those that are largest by absolute size
        picks = PickedUnits(origin.units, origin.site) if same else None
        return Origin.of(ENDED, operation.upstream, layer=origin.units.layer, picks=picks)
    found = resized(origin.units.dims, operation.outputs[0])
    return Origin.of(LOST, origin.upstream) if found is None else origin.but(units=origin.units._replace(dims=found))


def _masked_select(operation: Operation) -> Origin:
    """Say what a mask picks of a tensor, in one row: units no more, if the tensor had any."""
    units = operation.first.origin.units
    return Origin.of(ENDED, operation.upstream, layer="" if units is None else units.layer)


PARTS: dict[Function, Rule] = {
    **table("__getitem__", _index_rule),
    **table("index", _index_operator),
    **table("slice", _slice_rule),
    **table("select", _select_rule),
    **table("narrow", _narrow_rule),
    **table("chunk split tensor_split split_with_sizes", _split_rule),
    **table("vsplit", _split_along(0)),
    **table("hsplit", _split_along(1)),
    **table("unbind", _unbind_rule),
    **table("index_select", _index_select),
    **table("gather", _gather),
    **table("masked_select", _masked_select),
}
