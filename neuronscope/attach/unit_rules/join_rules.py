"""Rules of functions that join tensors along a dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from neuronscope.attach.origins import (
    CONSTANT,
    ENDED,
    LOST,
    RAW,
    ROWS,
    UNITS,
    UNKNOWN,
    WEIGHT,
    Operand,
    Origin,
    combine,
)
from neuronscope.attach.readers import Carried, joined
from neuronscope.attach.unit_rules.operation import Function, Operation, Rule, Shape, lose, table, tensors_in
from neuronscope.attach.units import Units, experts_of, has_units, join_runs, resized

__all__ = ["JOINS"]


def _parts(operation: Operation) -> list[Operand]:
    return list(tensors_in(operation.argument(0, "tensors")))


def _cat_rule(operation: Operation) -> Origin:
    parts, shape = _parts(operation), operation.outputs[0]
    dim = operation.argument(1, "dim", "axis", default=0)
    if not parts or not isinstance(dim, int):
        return lose(operation)
    some = [each for each in parts if math.prod(each.shape) or len(parts) == 1]
    return _join(some, dim % len(shape), shape, parts)


def _join(parts: Sequence[Operand], dim: int, shape: Shape, every_part: Sequence[Operand] = ()) -> Origin:
    """Return the origin of tensors that were joined along a dimension, which each of them has.

    Args:
        parts: The tensors.
        dim: The dimension, ≥ 0.
        shape: The shape of the result.
        every_part: The tensors with those that are empty.
    """
    if not parts:
        return Origin.of(CONSTANT)
    upstream = 0
    for each in every_part or parts:
        upstream |= each.origin.upstream
    data = [each for each in parts if each.origin.state not in (CONSTANT, WEIGHT, RAW)]
    if not data:
        return Origin.of(RAW) if any(each.origin.state == RAW for each in parts) else _join_weights(parts)
    states = {each.origin.state for each in data}
    if states != {UNITS}:
        state = next(state for state in (ROWS, LOST, UNKNOWN, ENDED) if state in states or state == ENDED)
        if UNITS in states and state == ENDED:
            state = LOST  # some of the elements are units, and others are not
        return Origin.of(state if upstream else UNKNOWN, upstream)
    every = [each.origin.units for each in data if each.origin.units is not None]
    first = every[0]
    if any(has_units(units.dims[dim]) for units in every):
        return _join_units(parts, data, dim, upstream)
    if any(units.experts or units.which != first.which for units in every):
        layers = [each.origin.units.layer for each in every_part or parts if each.origin.units is not None]
        return _join_experts(parts, every, dim, shape, upstream, layers)
    found = resized(first.dims, shape)
    if found is None or any(_unit_dims(units) != _unit_dims(first) for units in every):
        return Origin.of(LOST, upstream)
    sites = {each.origin.site for each in data}
    site = data[0].origin.site if len(sites) == 1 else None
    units = first._replace(dims=found)
    return Origin.of(UNITS, upstream, units=units, site=site, carries=_all_carried(data))


def _join_experts(
    parts: Sequence[Operand],
    every: Sequence[Units],
    dim: int,
    shape: Shape,
    upstream: int,
    layers_of_all: Sequence[str],
) -> Origin:
    """Return the origin of rows of several layers that were joined: each row has the units of the layer it is of.

    Args:
        parts: The tensors.
        every: The units of each of them that has units.
        dim: The dimension along which they were joined.
        shape: The shape of the result.
        upstream: Calls of layers that they depend on, as bits.
        layers_of_all: The layers of all tensors, the empty ones too.
    """
    unknown, first = Origin.of(ROWS, upstream), every[0]
    alike = all(
        (units.text(), units.first, units.order, _unit_dims(units))
        == (first.text(), first.first, first.order, _unit_dims(first))
        and units.experts is first.experts
        and units.rows <= 1
        for units in every
    )
    dims = resized(first.dims, shape) if alike and len(every) == len(parts) else None
    if dims is None or shape[dim] < 2 or any(len({*(run[0] for run in units.runs)}) > 1 for units in every):
        return unknown
    layers = first.experts.layers if first.experts else tuple(dict.fromkeys(layers_of_all))
    layer = first.layer if first.experts else "+".join(layers)
    units = first._replace(
        call=tuple(dict.fromkeys(call for units in every for call in units.call)),
        layer=layer,
        runs=tuple((layer, *run[1:]) for run in first.runs),
        dims=(*dims[:dim], ((shape[dim], -1),), *dims[dim + 1 :]),
        experts=first.experts or experts_of(layers, joined=True),
        rows=shape[dim],
    )
    return Origin.of(UNITS, upstream, units=units)


def _all_carried(parts: Sequence[Operand]) -> tuple[Carried, ...]:
    return tuple(dict.fromkeys(carried for each in parts for carried in each.origin.carries))


def _join_weights(parts: Sequence[Operand]) -> Origin:
    """Return the origin of weights that were joined: their layers are joined too."""
    layers = dict.fromkeys(each.origin.as_layer().layer for each in parts if each.origin.layer)
    found = combine(parts, ())
    return found.but(layer="+".join(layers)) if found.state == WEIGHT else found


def _unit_dims(units: Units) -> list[object]:
    return [dim if has_units(dim) else None for dim in units.dims]


def _join_units(parts: Sequence[Operand], data: Sequence[Operand], dim: int, upstream: int) -> Origin:
    """Return the origin of tensors whose units were put side by side."""
    if len(data) != len(parts):
        return Origin.of(LOST, upstream)
    every = [each.origin.units for each in data if each.origin.units is not None]
    for units in every:
        alone = not any(has_units(other) for place, other in enumerate(units.dims) if place != dim)
        along = units.dims[dim]
        if not alone or len(along) > 1 or (along and not has_units(along)):
            return Origin.of(LOST, upstream)
    runs = join_runs(run for units in every for run in units.tensor_runs())
    layers = dict.fromkeys(layer for layer, *_ in runs)
    calls = tuple(dict.fromkeys(call for units in every for call in units.call))
    width = sum(units.size for units in every)
    dims = (*every[0].dims[:dim], ((width, 1),), *every[0].dims[dim + 1 :])
    units = Units(calls, "+".join(layers), runs, 0, dims, _is_explicit(every))
    carries: list[Carried] = []
    before = 0
    for each in data:
        if each.origin.units is not None:
            carries += joined(each.origin.carries, each.origin.units, before)
            before += each.origin.units.size
    return Origin.of(UNITS, upstream, units=units, carries=tuple(carries))


def _is_explicit(parts: Sequence[Units]) -> bool:
    """Whether units that were put side by side are not each unit of their layers once."""
    widths: dict[str, int] = {}
    found: dict[str, list[int]] = {}
    for part in parts:
        own: dict[str, int] = {}
        for layer, *bounds in part.runs:
            own[layer] = own.get(layer, 0) + len(range(*bounds))
        widths |= own
        for layer, *bounds in part.tensor_runs():
            found.setdefault(layer, []).extend(range(*bounds))
    complete = all(len(set(numbers)) == len(numbers) == widths[layer] for layer, numbers in found.items())
    return not complete or any(part.explicit for part in parts)


def _stack_rule(operation: Operation) -> Origin:
    parts, shape = _parts(operation), operation.outputs[0]
    dim = operation.argument(1, "dim", "axis", default=0) % len(shape)
    widened = []
    for each in parts:
        origin, units = each.origin, each.origin.units
        if units is not None:
            origin = origin.but(units=units._replace(dims=(*units.dims[:dim], (), *units.dims[dim:])))
        widened.append(Operand((*each.shape[:dim], 1, *each.shape[dim:]), origin))
    layers = {each.origin.units.layer if each.origin.units else None for each in widened}
    if len(layers) > 1:
        return _stack_layers(parts, dim, operation.upstream)
    return _join(widened, dim, shape)


def _stack_layers(parts: Sequence[Operand], dim: int, upstream: int) -> Origin:
    """Return the origin of a stack of several layers: one index of the new dimension has all units of one of them.

    Args:
        parts: The tensors.
        dim: The new dimension, ≥ 0.
        upstream: Calls of layers that they depend on, as bits.
    """
    every = [each.origin.units for each in parts if each.origin.units is not None]
    first = every[0]
    layers = dict.fromkeys(layer for units in every for layer, *_ in units.runs)
    alone = all(len(units.runs) == len(units.call) == 1 and units.size == units.width for units in every)
    alike = all((units.dims, units.order) == (first.dims, first.order) for units in every)
    if not (alone and alike) or len(layers) < len(parts) or any(units.explicit or units.experts for units in every):
        return Origin.of(ENDED, upstream)
    runs, calls = tuple(units.runs[0] for units in every), tuple(units.call[0] for units in every)
    dims = (*first.dims[:dim], ((len(parts), first.size),), *first.dims[dim:])
    units = Units(calls, "+".join(layers), runs, 0, dims)
    carries: list[Carried] = []
    for place, (each, own) in enumerate(zip(parts, every, strict=True)):
        carries += joined(each.origin.carries, own, place * first.size)
    return Origin.of(UNITS, upstream, units=units, carries=tuple(carries))


def _joined_along(dim_of: Callable[[int], int]) -> Rule:
    """Return the rule of a function that joins along a dimension that follows from the number of dimensions.

    Args:
        dim_of: Returns the dimension.
    """

    def rule(operation: Operation) -> Origin:
        parts, shape = _parts(operation), operation.outputs[0]
        if not parts or any(len(each.shape) != len(shape) for each in parts):
            return lose(operation)
        return _join(parts, dim_of(len(shape)), shape)

    return rule


JOINS: dict[Function, Rule] = {
    **table("cat concat concatenate", _cat_rule),
    **table("stack", _stack_rule),
    **table("hstack column_stack", _joined_along(lambda rank: min(1, rank - 1))),
    **table("vstack row_stack", _joined_along(lambda _: 0)),
}
