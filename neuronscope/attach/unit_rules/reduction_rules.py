"""Rules of reductions, and of functions along one dimension such as softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neuronscope.attach.origins import ENDED, LOST, UNITS, Operand, Origin, PickedUnits
from neuronscope.attach.torch_functions import spellings
from neuronscope.attach.unit_rules.elementwise_rules import bending
from neuronscope.attach.unit_rules.operation import Function, Operation, Rule, integers, table
from neuronscope.attach.units import has_units, reduce, resized

__all__ = ["REDUCTIONS", "summed_factors"]


def _reduction_rule(place: int, *, keeps_zero: bool = True) -> Rule:
    """Return the rule of a reduction.

    Args:
        place: Place of the dimensions among the arguments.
        keeps_zero: Whether zeros give zero, so that the result still belongs to the site that gave the input.
    """

    def rule(operation: Operation) -> Sequence[Origin]:
        operand = operation.first
        origin, rank = operand.origin, len(operand.shape)
        outputs = operation.outputs
        if origin.units is None:
            return [origin] * len(outputs)
        axes = _axes(operation, place)
        keepdim = bool(outputs) and len(outputs[0]) == rank
        if len(axes) == 1 and operation.function in _SUMS and (found := _sum_of_layers(operand, axes[0], keepdim)):
            return [found] * len(outputs)
        dims = reduce(origin.units.dims, axes, keepdim=keepdim)
        if operation.function in _SUMS and any(each.origin.made for each in origin.factors):
            dims = None  # a layer that is written out, whose weights data made
        if dims is None or any(len(dims) != len(shape) for shape in outputs):
            return [Origin.of(ENDED, operation.upstream)] * len(outputs)
        left = origin.but(units=origin.units._replace(dims=dims))
        return [left if keeps_zero else left.but(site=None, carries=())] * len(outputs)

    return rule


def _axes(operation: Operation, place: int) -> list[int]:
    rank = len(operation.first.shape)
    return [axis % rank for axis in integers([operation.argument(place, "dim", "axis")])] or list(range(rank))


def summed_factors(operation: Operation) -> list[Operand]:
    """Return the factors of a product that a function sums; those that are the same for all terms are left out.

    A sum of all products, as in a loss, has none.

    Args:
        operation: The call of any function.
    """
    if operation.function not in _SUMS or operation.outputs[0] == ():
        return []
    product = operation.first
    axes = [axis - len(product.shape) for axis in _axes(operation, 1)]
    return [
        each
        for each in product.origin.factors
        if any(-axis <= len(each.shape) and each.shape[axis] > 1 for axis in axes)
    ]


def _sum_of_layers(operand: Operand, axis: int, keepdim: bool) -> Origin | None:
    """Return what the sum of a stack of layers is: as of any sum of parallel layers, the units of the first called.

    Args:
        operand: What is summed.
        axis: The dimension that is summed over.
        keepdim: Whether it stays, with a size of 1.

    Returns:
        The origin; ``None`` if the dimension does not tell whole layers apart.
    """
    units, layers = operand.origin.units, operand.shape[axis]
    if units is None or layers < 2 or len(units.call) != layers or len(units.runs) != layers:
        return None
    if units.dims[axis] != ((layers, units.width // layers),) or units.size != units.width:
        return None
    first = min(range(layers), key=units.call.__getitem__)
    run = units.runs[first]
    dims = (*units.dims[:axis], *([()] if keepdim else []), *units.dims[axis + 1 :])
    left = units._replace(call=(units.call[first],), layer=run[0], runs=(run,), dims=dims)
    return operand.origin.but(units=left, site=None, carries=())


def _largest(operation: Operation) -> Sequence[Origin] | Origin:
    """Say what ``max`` and ``min`` give: of two tensors element by element, and of one along a dimension."""
    if len(operation.tensors) > 1:
        return [bending(operation)] * len(operation.outputs)
    return _reduction_rule(1)(operation)


def _along_rule(place: int, default: int | None = None, *, picks: bool = False) -> Rule:
    """Return the rule of a function along one dimension that keeps the others, such as softmax.

    Args:
        place: Place of the dimension among the arguments.
        default: The dimension if none is given; ``None`` stands for all.
        picks: Whether the results are some of the elements, in an order that depends on the data.
    """

    def rule(operation: Operation) -> Sequence[Origin]:
        operand = operation.first
        origin, rank = operand.origin, len(operand.shape)
        if origin.units is None:
            return [origin.but(picks=None) if origin.picks else origin] * len(operation.outputs)
        dim = operation.argument(place, "dim", "axis", default=default)
        along = [dim % rank] if isinstance(dim, int) and not isinstance(dim, bool) and rank else range(rank)
        if any(has_units(origin.units.dims[axis]) for axis in along):
            if not picks:
                return [Origin.of(ENDED, operation.upstream)] * len(operation.outputs)
            source = PickedUnits(origin.units, origin.site)
            return [Origin.of(ENDED, operation.upstream, layer=origin.units.layer, picks=source)] * len(
                operation.outputs
            )
        found = []
        for shape in operation.outputs:
            dims = resized(origin.units.dims, shape) if len(shape) == rank else None
            units = None if dims is None else origin.units._replace(dims=dims)
            state = LOST if units is None else UNITS
            found.append(Origin.of(state, operation.upstream, units=units))
        return found

    return rule


_SUMS = spellings("sum", "mean", "nansum", "nanmean")

REDUCTIONS: dict[Function, Rule] = {
    **table("mean sum amax amin nanmean nansum", _reduction_rule(1)),
    **table("max min", _largest),
    **table(
        "logsumexp std var prod all any count_nonzero argmax argmin std_mean var_mean median nanmedian mode",
        _reduction_rule(1, keeps_zero=False),
    ),
    **table("norm quantile nanquantile", _reduction_rule(2, keeps_zero=False)),
    torch.linalg.vector_norm: _reduction_rule(2, keeps_zero=False),
    torch.linalg.norm: _reduction_rule(2, keeps_zero=False),
    **table(
        "softmax log_softmax _softmax _log_softmax softmin cumsum cumprod logcumsumexp cummax cummin", _along_rule(1)
    ),
    **table("sort argsort", _along_rule(1, -1, picks=True)),
    **table("topk kthvalue", _along_rule(2, -1, picks=True)),
    **table("diff", _along_rule(2, -1)),
    **table("gumbel_softmax", _along_rule(4, -1)),
}
