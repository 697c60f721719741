"""Rules of functions that write a tensor into another one, along a dimension or at an index."""

from __future__ import annotations

from typing import Any

from neuronscope.attach.origins import (
    CONSTANT,
    ENDED,
    LOST,
    RAW,
    ROWS,
    UNITS,
    WEIGHT,
    Operand,
    Origin,
    combine,
)
from neuronscope.attach.unit_rules.operation import Function, Index, Operation, Rule, Shape, lose, table, tensors_in
from neuronscope.attach.unit_rules.part_rules import index_units
from neuronscope.attach.units import Units, fits, has_units, resized

__all__ = ["WRITING", "set_item"]


def _scatter_rule(operation: Operation) -> Origin:
    """Say what a tensor is after rows of another one were written, or added, into it along a dimension."""
    target, source = operation.first, operation.argument(3, "src", "source", "value")
    dim = operation.argument(1, "dim", "axis")
    upstream = operation.upstream
    if not isinstance(source, Operand) or source.origin.state in (CONSTANT, WEIGHT, RAW):
        if target.origin.state in (UNITS, LOST, ROWS):
            return target.origin.but(upstream=upstream, site=None, carries=())
        index = operation.argument(2, "index")
        picked = index.origin if isinstance(index, Operand) else target.origin
        return Origin.of(ENDED, upstream, layer=picked.layer if picked.picks else "") if upstream else target.origin
    units = source.origin.units
    if isinstance(dim, int) and (selected := _selected(operation, target, source, dim)) is not None:
        return selected
    if units is None or not isinstance(dim, int):
        return Origin.of(source.origin.state, upstream) if units is None else lose(operation)
    shape = operation.outputs[0]
    if len(source.shape) != len(shape) or has_units(units.dims[dim % len(shape)]):
        return Origin.of(ENDED, operation.upstream)
    return _written(target, source, shape, operation.upstream)


def _selected(operation: Operation, target: Operand, source: Operand, dim: int) -> Origin | None:
    """Return the units from which data picked some, if these are put back into zeros; ``None`` if they are not.

    That is what is left of a layer after a top-k selection. Index and values may come from different picks of one
    tensor: the index says which units they are.

    Args:
        operation: The call of a function that writes.
        target: What it writes into.
        source: What it writes.
        dim: The dimension along which the index says where.
    """
    index = operation.argument(2, "index")
    if not isinstance(index, Operand) or not target.origin.zeros or source.origin.picks is None:
        return None
    picks, shape = index.origin.picks, operation.outputs[0]
    if picks is None or source.origin.picks.units.which != picks.units.which or not fits(picks.units.dims, shape):
        return None
    units = picks.units
    dim %= len(shape)
    kept = [size for place, size in enumerate(index.shape) if place != dim]
    if not has_units(units.dims[dim]) or kept != [size for place, size in enumerate(shape) if place != dim]:
        return None
    return Origin.of(UNITS, operation.upstream, units=units, picks=picks)


def _written(target: Operand, source: Operand, shape: Shape, upstream: int) -> Origin:
    """Return the origin of a tensor into which rows of another one, with units, were written."""
    units = source.origin.units
    if units is not None and units.experts is not None:
        return Origin.of(ROWS, upstream)  # beside those of another expert, or not in their order
    dims = None if units is None or len(units.dims) > len(shape) else resized(units.dims, shape)
    if units is None or dims is None:
        return Origin.of(LOST, upstream)
    if target.origin.state in (ROWS, LOST, ENDED):
        return Origin.of(ROWS if target.origin.state == ROWS else LOST, upstream)
    before = target.origin.units
    if before is not None and before.which != units.which:
        return Origin.of(ROWS, upstream)
    if before is not None and [dim for dim in before.dims if has_units(dim)] and not _alike(before, units):
        return Origin.of(LOST, upstream)
    return Origin.of(
        UNITS, upstream, units=units._replace(dims=dims), site=source.origin.site, carries=source.origin.carries
    )


def _alike(one: Units, other: Units) -> bool:
    """Whether the units of two tensors lie on the same dimensions, counted from the right."""
    length = min(len(one.dims), len(other.dims))
    return all(
        a == b or not (has_units(a) or has_units(b))
        for a, b in zip(one.dims[-length:], other.dims[-length:], strict=True)
    )


def _scatter_by_mask(operation: Operation) -> Origin:
    """Say what ``masked_scatter`` gives: elements of another tensor, in the order and in the places that data says."""
    target, source, upstream = operation.first, operation.argument(2, "source").origin, operation.upstream
    if source.state in (CONSTANT, WEIGHT, RAW):
        found = combine([target], operation.outputs[0])
        return found.but(upstream=upstream) if found.upstream != upstream else found
    if (put_back := _put_back(target, operation.argument(1, "mask"), source, "masked_scatter")) is not None:
        return put_back
    layers = {each.units.layer for each in (target.origin, source) if each.units is not None}
    return Origin.of(ROWS, upstream) if len(layers) > 1 else lose(operation)


def _put_back(target: Operand, index: Any, source: Origin, function: str) -> Origin | None:
    """Return what a tensor of constants is into which elements were written that were picked from a layer's units.

    If the units themselves say where, the elements may be put back where they were: a ReLU that is written out puts
    those above zero among zeros. Then the next layer reads an activation of that layer.

    Args:
        target: What it is written into.
        index: What says where: an index or a mask.
        source: What is written.
        function: Name of the function that writes.

    Returns:
        What it is; ``None`` if the elements were not picked from one layer, or it does not say where.
    """
    if source.state != ENDED or not source.layer or target.origin.state not in (CONSTANT, ENDED, LOST):
        return None
    if not any(each.origin.upstream & source.upstream for each in tensors_in(index)):
        return None
    return Origin.of(LOST, target.origin.upstream | source.upstream, bends=((source.layer, function),))


def set_item(target: Operand, index: tuple[Any, ...], value: Operand) -> Origin:
    """Return what a tensor is after ``target[index] = value``.

    Args:
        target: The tensor before it.
        index: The index.
        value: What was written.
    """
    upstream = target.origin.upstream | value.origin.upstream
    units = value.origin.units
    if units is None:
        if value.origin.state in (CONSTANT, WEIGHT, RAW):
            return target.origin
        if (put_back := _put_back(target, index, value.origin, "__setitem__")) is not None:
            return put_back
        if target.origin.units is not None:
            return Origin.of(LOST, upstream)
        return combine([target, value], target.shape)
    before = target.origin.units
    if before is not None:
        part = index_units(before, target.shape, index, value.shape)
        if isinstance(part, Units) and part.which == units.which and _alike(part, units):
            return target.origin.but(upstream=upstream)
    rows = len(value.shape) == len(target.shape) and _only_positions(index, target.shape, units)
    if not rows:
        return Origin.of(LOST, upstream)
    return _written(target, value, target.shape, upstream)


def _index_put(operation: Operation) -> Origin:
    """Say what ``index_put`` gives; ``None`` among its indices stands for a whole dimension."""
    index, value = operation.argument(1, "indices"), operation.argument(2, "values", "value")
    parts = tuple(Index(None, None, None) if part is None else part for part in index)
    return set_item(operation.first, parts, value)


def _only_positions(index: tuple[Any, ...], shape: Shape, units: Units) -> bool:
    """Whether an index leaves the dimensions of the units of what is written as they are."""
    parts = [part for part in index if part is not Ellipsis]
    if len(parts) < len(index):
        place = next(number for number, part in enumerate(index) if part is Ellipsis)
        parts[place:place] = [Index(None, None, None)] * (len(shape) - len(parts))
    return all(
        part is not None
        and not isinstance(part, (int, bool))
        and not (isinstance(part, Operand) and (part.boolean or len(part.shape) != 1))
        and not (
            has_units(dim) and not (isinstance(part, Index) and slice(*part).indices(size) == slice(None).indices(size))
        )
        for part, dim, size in zip(parts, units.dims, shape, strict=False)
    )


WRITING: dict[Function, Rule] = {
    **table("scatter scatter_add scatter_reduce index_add index_copy index_reduce", _scatter_rule, in_place=True),
    **table("index_put", _index_put, in_place=True),
    **table("masked_scatter", _scatter_by_mask, in_place=True),
}
