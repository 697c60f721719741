"""Rules of functions that rearrange one tensor: views, permutations, expansions and repetitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from neuronscope.attach.origins import LOST, WEIGHT, Origin
from neuronscope.attach.torch_functions import aten
from neuronscope.attach.unit_rules.elementwise_rules import like_first
from neuronscope.attach.unit_rules.operation import Function, Operation, Rule, Shape, table
from neuronscope.attach.units import Units, broadcast, has_units, positions, reshape, resized

__all__ = ["ATTRIBUTES", "VIEWS"]

_Move = Callable[[Operation, Units, Shape, Shape], "Units | None"]


def _move_rule(move: _Move) -> Rule:
    """Return the rule of a function that only rearranges one tensor.

    Args:
        move: Returns the units after it from those before it and from both shapes; ``None`` if they are lost.
    """

    def rule(operation: Operation) -> Origin:
        operand = operation.first
        origin = operand.origin
        if origin.state == WEIGHT and move in _REORDERED and len(operand.shape) > 1:
            numbers = [((number, 1),) for number in range(len(operand.shape))]  # in place of a dimension's units
            order = move(operation, Units((), "", (), 0, tuple(numbers)), operand.shape, operation.outputs[0])
            if order is not None and list(order.dims[-2:]) == numbers[:-3:-1]:
                origin = origin.but(turned=not origin.turned)
        if origin.units is None and any(origin.cuts):
            if move not in _REORDERED:
                return origin.as_layer() if operation.outputs[0] != operand.shape else origin
            moved = move(operation, Units((), "", (), 0, origin.cuts), operand.shape, operation.outputs[0])  # type: ignore[arg-type]
            return origin.as_layer() if moved is None else origin.but(cuts=moved.dims)
        if origin.units is None:
            if origin.picked and not _keeps_picked(operation, move, operand.shape):
                return origin.but(picked=True)
            repeated = move in (_expanded, _repeated, _repeated_each) and len(operation.outputs[0]) > 2
            # Of a stack that repeats a matrix it is not known which dimension tells matrices apart.
            return origin.but(picked=True) if repeated and origin.state == WEIGHT else origin
        units = move(operation, origin.units, operand.shape, operation.outputs[0])
        return Origin.of(LOST, origin.upstream) if units is None else origin.but(units=units)

    return rule


def _keeps_picked(operation: Operation, move: _Move, shape: Shape) -> bool:
    """Whether the dimensions of the index by which data picked a weight stay the first dimensions of the weight."""
    if move is _last_two:
        return True
    if move is _transposed:
        rank = len(shape)
        return all(
            operation.argument(*place) % rank >= rank - 2 for place in ((1, "dim0", "axis0"), (2, "dim1", "axis1"))
        )
    return move in (_reshaped, _expanded) and tuple(operation.outputs[0]) == tuple(shape)


def _reshaped(_: Operation, units: Units, __: Shape, after: Shape) -> Units | None:
    dims = reshape(units.dims, after)
    return None if dims is None else units._replace(dims=dims)


def _permuted(units: Units, order: Iterable[int]) -> Units:
    return units._replace(dims=tuple(units.dims[place] for place in order))


def _transposed(operation: Operation, units: Units, before: Shape, _: Shape) -> Units:
    rank = len(before)
    one = operation.argument(1, "dim0", "axis0") % rank
    other = operation.argument(2, "dim1", "axis1") % rank
    order = list(range(rank))
    order[one], order[other] = order[other], order[one]
    return _permuted(units, order)


def _permute(operation: Operation, units: Units, before: Shape, _: Shape) -> Units:
    return _permuted(units, [place % len(before) for place in operation.sizes(1, "dims")])


def _reversed(_: Operation, units: Units, before: Shape, __: Shape) -> Units:
    return _permuted(units, reversed(range(len(before))))


def _last_two(_: Operation, units: Units, before: Shape, __: Shape) -> Units:
    order = list(range(len(before)))
    order[-2:] = reversed(order[-2:])
    return _permuted(units, order)


def _moved(operation: Operation, units: Units, before: Shape, _: Shape) -> Units:
    rank = len(before)
    sources = [place % rank for place in operation.dimensions(1, "source")]
    targets = [place % rank for place in operation.dimensions(2, "destination")]
    order: list[int] = [-1] * rank
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    rest = iter(place for place in range(rank) if place not in sources)
    return _permuted(units, [next(rest) if place < 0 else place for place in order])


#: They give the same elements in another order of dimensions.
_REORDERED = (_transposed, _permute, _reversed, _last_two, _moved)


def _expanded(_: Operation, units: Units, before: Shape, after: Shape) -> Units | None:
    new = len(after) - len(before)
    if any(size not in (1, after[new + place]) for place, size in enumerate(before)):
        return None
    return units._replace(dims=broadcast(units.dims, after))


def _all_expanded(operation: Operation) -> Sequence[Origin]:
    """Say what each of several tensors is after they were expanded to one shape."""
    rule = _move_rule(_expanded)
    pairs = zip(operation.tensors, operation.outputs, strict=True)
    found = (rule(operation._replace(args=(tensor,), kwargs={}, outputs=(shape,))) for tensor, shape in pairs)
    return [origin for origin in found if isinstance(origin, Origin)]


def _repeated(_: Operation, units: Units, before: Shape, after: Shape) -> Units | None:
    if len(after) < len(before):
        return None
    dims = resized(units.dims, after)  # units that were repeated have another size, and are lost
    return None if dims is None else units._replace(dims=dims)


def _repeated_each(operation: Operation, units: Units, before: Shape, after: Shape) -> Units | None:
    dim = operation.argument(2, "dim")
    if not isinstance(dim, int) or has_units(units.dims[dim % len(before)]):
        return None
    return _repeated(operation, units, before, after)


def _along_positions(dims_of: Callable[[Operation], Sequence[int] | None]) -> Rule:
    """Return the rule of a function that moves elements along some dimensions: nothing changes if they are positions.

    Args:
        dims_of: Returns the dimensions; ``None`` if they are all joined.
    """

    def move(operation: Operation, units: Units, _: Shape, after: Shape) -> Units | None:
        given = dims_of(operation)
        if given is None or any(has_units(units.dims[dim]) for dim in given):
            return None
        dims = resized(units.dims, after)
        return None if dims is None else units._replace(dims=dims)

    return _move_rule(move)


def _rolled(operation: Operation) -> Sequence[int] | None:
    return operation.dimensions(2, "dims") or None


def _rotated(operation: Operation) -> Sequence[int]:
    return operation.dimensions(2, "dims") or (0, 1)


def _windows(operation: Operation, units: Units, before: Shape, after: Shape) -> Units | None:
    dim = operation.argument(1, "dimension") % len(before)
    if has_units(units.dims[dim]):
        return None
    dims = [*units.dims, *positions(after[-1:])]
    dims[dim] = positions(after[dim : dim + 1])[0]
    return units._replace(dims=tuple(dims))


def _patches(_: Operation, units: Units, before: Shape, after: Shape) -> Units | None:
    """Return the units of patches of a map: each channel, and then the places in its patch."""
    if has_units(units.dims[-1]) or has_units(units.dims[-2]):
        return None
    channels = before[-3]
    patch = positions([after[-2] // channels])[0]
    return units._replace(dims=(*units.dims[:-3], (*units.dims[-3], *patch), positions(after[-1:])[0]))


#: The attributes of a tensor that are tensors themselves.
ATTRIBUTES: dict[Any, Rule] = {
    Tensor.T: _move_rule(_reversed),
    Tensor.mT: _move_rule(_last_two),
    Tensor.H: _move_rule(_last_two),
    Tensor.mH: _move_rule(_last_two),
    Tensor.data: like_first,
    Tensor.real: like_first,
}
VIEWS: dict[Function, Rule] = {
    **table(
        "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel squeeze_ unsqueeze_ _unsafe_view",
        _move_rule(_reshaped),
    ),
    **table("transpose swapaxes swapdims transpose_ swapaxes_ swapdims_", _move_rule(_transposed)),
    **table("permute", _move_rule(_permute)),
    **table("t t_ adjoint", _move_rule(_last_two)),
    **table("movedim moveaxis", _move_rule(_moved)),
    **table("expand expand_as broadcast_to", _move_rule(_expanded)),
    **table("broadcast_tensors", _all_expanded),
    **table("repeat tile", _move_rule(_repeated)),
    **table("repeat_interleave", _move_rule(_repeated_each)),
    **table("flip", _along_positions(lambda operation: operation.sizes(1, "dims"))),
    **table("fliplr", _along_positions(lambda _: (1,))),
    **table("flipud", _along_positions(lambda _: (0,))),
    **table("roll", _along_positions(_rolled)),
    **table("rot90", _along_positions(_rotated)),
    **{function: _move_rule(_patches) for function in (functional.unfold, *aten("im2col"))},
    **dict.fromkeys([Tensor.unfold, *aten("unfold")], _move_rule(_windows)),
}
