"""Rules of pooling, padding and resizing: they change how many positions there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from neuronscope.attach.origins import ENDED, LOST, Origin
from neuronscope.attach.unit_rules.operation import Function, Operation, Rule, table
from neuronscope.attach.units import has_units, resized

__all__ = ["RESIZING"]


def _resizing_rule(dims_of: Callable[[Operation], Iterable[int]]) -> Rule:
    """Return the rule of a function that changes the sizes of some dimensions.

    Args:
        dims_of: Returns the dimensions; negative ones are counted from the right.
    """

    def rule(operation: Operation) -> Sequence[Origin]:
        operand = operation.first
        origin, rank = operand.origin, len(operand.shape)
        if origin.units is None:
            return [origin] * len(operation.outputs)
        if any(has_units(origin.units.dims[dim]) for dim in dims_of(operation)):
            return [Origin.of(ENDED, operation.upstream)] * len(operation.outputs)
        found = []
        for shape in operation.outputs:
            dims = resized(origin.units.dims, shape) if len(shape) == rank else None
            left = None if dims is None else origin.but(units=origin.units._replace(dims=dims))
            found.append(left or Origin.of(LOST, origin.upstream))
        return found

    return rule


def _last(count: int) -> Rule:
    return _resizing_rule(lambda _: range(-count, 0))


def _padded(operation: Operation) -> list[int]:
    """Return the dimensions to which anything is added: two numbers for each, the last dimension first."""
    amounts = operation.sizes(1, "pad")[: 2 * len(operation.first.shape)]
    return [-1 - place // 2 for place, amount in enumerate(amounts) if amount]


RESIZING: dict[Function, Rule] = {
    **table(
        "max_pool1d max_pool1d_with_indices avg_pool1d lp_pool1d max_unpool1d adaptive_max_pool1d "
        "adaptive_max_pool1d_with_indices adaptive_avg_pool1d",
        _last(1),
    ),
    **table(
        "max_pool2d max_pool2d_with_indices avg_pool2d lp_pool2d max_unpool2d fractional_max_pool2d "
        "fractional_max_pool2d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices adaptive_avg_pool2d "
        "_adaptive_avg_pool2d",
        _last(2),
    ),
    **table(
        "max_pool3d max_pool3d_with_indices avg_pool3d lp_pool3d max_unpool3d fractional_max_pool3d "
        "fractional_max_pool3d_with_indices adaptive_max_pool3d adaptive_max_pool3d_with_indices adaptive_avg_pool3d "
        "_adaptive_avg_pool3d",
        _last(3),
    ),
    **table(
        "interpolate upsample upsample_nearest upsample_bilinear grid_sample "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d",
        _resizing_rule(lambda operation: range(2, len(operation.first.shape))),
    ),
    **table("pad constant_pad_nd", _resizing_rule(_padded)),
}
