"""Say how many of the rows, the indices of dimension 0, are left in what a function returns.

A branch that is given two images of a batch of 64 has no more than two examples, whatever the size of its maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from neuronscope.attach.origins import CONSTANT, WEIGHT, Operand, RowsLeft
from neuronscope.attach.torch_functions import spellings
from neuronscope.attach.unit_rules.join_rules import JOINS
from neuronscope.attach.unit_rules.operation import Index, Listed, Operation
from neuronscope.attach.unit_rules.reduction_rules import REDUCTIONS
from neuronscope.attach.unit_rules.writing_rules import WRITING
from neuronscope.attach.units import has_units

__all__ = ["rows_left"]

_JOINING = JOINS.keys() | WRITING.keys()
_INDEX = spellings("__getitem__")
#: The place of the dimension among the arguments of functions that take a part along it.
_PARTS = {
    **dict.fromkeys(spellings("unbind", "select", "narrow", "index_select"), 1),
    **dict.fromkeys(spellings("chunk", "split", "tensor_split", "split_with_sizes"), 2),
}


def rows_left(operation: Operation) -> list[RowsLeft | None]:
    """Return, for each output of a call, how many rows are left of how many; ``None`` where none was left out.

    Of several tensors, all must have rows left out: otherwise every row had a part in the result.

    Args:
        operation: The call.

    >>> from neuronscope.attach.origins import RAW, Origin
    >>> import torch
    >>> images = Operand((64, 3, 8, 8), Origin.of(RAW))
    >>> rows_left(Operation(torch.Tensor.__getitem__, (images, Index(None, 2, None)), {}, ((2, 3, 8, 8),), 0))
    [(64, 2)]
    """
    data = [each for each in operation.tensors if each.origin.state not in (CONSTANT, WEIGHT)]
    if not data:
        return [None] * len(operation.outputs)
    before = _before([each.origin.rows for each in data], joins=operation.function in _JOINING)
    units = data[0].origin.units
    if units is not None and units.dims and has_units(units.dims[0]):  # dimension 0 is none of positions
        return [before] * len(operation.outputs)
    return [_after(before, _taken(operation, data[0].shape, output)) for output in operation.outputs]


def _before(given: Sequence[RowsLeft | None], *, joins: bool) -> RowsLeft | None:
    """Return what is left of the rows of several tensors together.

    Args:
        given: What is left of each.
        joins: Whether their rows may be put one after the other.
    """
    known = [each for each in given if each is not None]
    if len(known) < len(given) or len({whole for whole, _ in known}) > 1:
        return None
    whole, left = known[0][0], [each[1] for each in known]
    return whole, min(whole, sum(left) if joins else max(left))


def _after(before: RowsLeft | None, taken: RowsLeft | None) -> RowsLeft | None:
    if before is None or taken is None:
        return before or taken
    return before[0], min(before[1], taken[1]) if taken[0] == before[1] else before[1]


def _taken(operation: Operation, shape: Sequence[int], output: Sequence[int]) -> RowsLeft | None:
    """Return how many rows a function takes of a tensor, or makes of its rows; ``None`` if that is not known.

    Args:
        operation: The call.
        shape: The shape of the tensor.
        output: The shape of the result.
    """
    function, left = operation.function, None
    if not shape:
        return None
    if function in _INDEX:
        left = _indexed(operation.args[1], output)
    elif function in _PARTS:
        dim = operation.argument(_PARTS[function], "dim", default=0)
        if isinstance(dim, int) and dim % len(shape) == 0:
            left = output[0] if len(output) == len(shape) else 1
    elif function in REDUCTIONS:
        dims = operation.dimensions(1, "dim", "axis")
        if not output or any(dim % len(shape) == 0 for dim in dims):
            left = 1
    return None if left is None or left >= shape[0] else (shape[0], left)


def _indexed(index: Any, output: Sequence[int]) -> int | None:
    """Return how many rows an index takes; ``None`` if that is not known.

    Args:
        index: The index.
        output: The shape of what it takes.
    """
    first = index[0] if type(index) is tuple and index else index
    if isinstance(first, bool):
        return None
    if isinstance(first, int):
        return 1
    if isinstance(first, Index):
        return output[0] if output else None
    if isinstance(first, Listed):
        return len(first)
    if isinstance(first, Operand) and not (first.boolean and len(first.shape) > 1):
        return output[0] if first.boolean else math.prod(first.shape)
    return None
