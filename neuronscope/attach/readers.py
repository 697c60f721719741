"""Follow which neurons of a site lie where in a tensor, and say which columns of a layer read them.

A tensor numbers its units: see :class:`~neuronscope.attach.units.Units`. Views, slices and permutations leave the
numbers as they are. A concatenation numbers the units anew, and a product has the numbers of one of its factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from neuronscope.attach.torch_functions import aten, spellings
from neuronscope.attach.units import Units, has_units
from neuronscope.sites import ReaderColumns

__all__ = ["Carried", "aligned", "carry_layer", "carry_site", "columns_of", "joined", "read_dim"]


class Carried(NamedTuple):
    """Some neurons of a site in a tensor: neuron ``neuron + j`` is the unit number ``number + j * step``.

    Attributes:
        site: The site; or the path of a layer whose units are carried, before any activation.
        neuron: The first of its neurons.
        size: Number of its neurons.
        number: Number of the unit that the first neuron is.
        step: Distance of the numbers; 0 if it is not known where the neurons are.
    """

    site: Any
    neuron: int
    size: int
    number: int
    step: int


def carry_site(site: Any, units: Units) -> Carried:
    """Return what a tensor carries that a site gave.

    Args:
        site: The site.
        units: The units of its output.
    """
    order = units.order
    step = order[0][1] if len(order) == 1 else 0 if order else 1
    return Carried(site, 0, units.size, units.first, step)


def carry_layer(units: Units) -> Carried:
    """Return what the output of a layer carries: its units, as they are before any activation.

    Args:
        units: The units of its output.
    """
    _, start, _, step = units.runs[0]
    return Carried(units.layer, start, units.width, units.first, 1 if step == 1 else 0)


def _within(carried: Carried, first: int, count: int, stride: int) -> tuple[Carried, int, int] | None:
    """Return the neurons that are among evenly spaced units; ``None`` if there are none of them.

    Args:
        carried: The neurons.
        first: Number of the first unit.
        count: Number of units.
        stride: Distance of their numbers.

    Returns:
        The neurons, the place of the first one among the units, and the distance of their places; the latter is 0 if
        this is not known.
    """
    offset, rest = divmod(carried.number - first, stride)
    if not carried.step or rest or carried.step % stride:
        return carried._replace(step=0), 0, 0
    step = carried.step // stride
    begin = max(0, -(offset // step))
    end = min(carried.size, (count - 1 - offset) // step + 1)
    if begin >= end:
        return None
    found = carried._replace(
        neuron=carried.neuron + begin, size=end - begin, number=carried.number + begin * carried.step
    )
    return found, offset + begin * step, step


def _spaced(units: Units) -> tuple[int, int, int]:
    """Return the first number, the count and the distance of a tensor's units; a distance of 0 if they are not even."""
    order = units.order
    if not order:
        return units.first, 1, 1
    return (units.first, *order[0]) if len(order) == 1 else (units.first, units.size, 0)


def joined(carries: Iterable[Carried], units: Units, before: int) -> list[Carried]:
    """Return what a concatenation carries of one of its parts.

    Args:
        carries: What the part carries.
        units: The units of the part.
        before: Number of units of the parts before it.
    """
    return _renumbered(carries, units, before, 1)


def aligned(carries: Iterable[Carried], units: Units, result: Units) -> list[Carried]:
    """Return what a product carries of a factor whose units lie beside its own, one by one.

    Args:
        carries: What the factor carries.
        units: The units of the factor.
        result: The units of the product.
    """
    first, _, stride = _spaced(result)
    return _renumbered(carries, units, first, stride)


def _renumbered(carries: Iterable[Carried], units: Units, number: int, step: int) -> list[Carried]:
    first, count, stride = _spaced(units)
    found = []
    for each in carries:
        if not stride or not step:
            found.append(each._replace(step=0))
            continue
        inside = _within(each, first, count, stride)
        if inside is not None:
            kept, offset, distance = inside
            found.append(kept._replace(number=number + offset * step, step=distance * step))
    return found


def columns_of(carried: Carried, layer: str, units: Units | None, dim: int | None) -> ReaderColumns | str | None:
    """Return which columns of a layer read the neurons; ``""`` if that is not known, ``None`` if no column does.

    Args:
        carried: The neurons.
        layer: Path of the layer that reads.
        units: The units of its input.
        dim: The dimension that its columns index; ``None`` if it is not known.
    """
    if units is None or dim is None:
        return ""
    dim %= len(units.dims)
    factors = units.dims[dim]
    own = [place for place, factor in enumerate(factors) if factor[1]]
    if len(own) > 1 or any(has_units(each) for place, each in enumerate(units.dims) if place != dim):
        return ""
    count, stride = factors[own[0]] if own else (1, 1)
    outer = math.prod(size for size, _ in factors[: own[0]]) if own else 1
    inner = math.prod(size for size, _ in (factors[own[0] + 1 :] if own else factors))
    inside = _within(carried, units.first, count, stride)
    if inside is None:
        return None
    found, offset, step = inside
    if not step or (outer > 1 and inner > 1):
        return ""
    columns, column_step = (inner, 1) if outer == 1 else (outer, count * inner)
    return ReaderColumns(layer, found.neuron, found.size, offset * inner, step * inner, columns, column_step)


#: The dimension of a layer's input that its columns index, by the functions of torch.
_READ_DIMS: dict[Callable[..., Any], int] = {
    **dict.fromkeys(spellings("linear", "gru", "lstm", "rnn_tanh", "rnn_relu"), -1),
    **dict.fromkeys(spellings("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"), -1),
    **{function: -dims - 1 for dims in (1, 2, 3) for function in spellings(f"conv{dims}d", f"conv_transpose{dims}d")},
    **dict.fromkeys(spellings("convolution", "batch_norm", "instance_norm", "group_norm"), 1),
    **dict.fromkeys(aten("native_batch_norm", "native_group_norm"), 1),
}
_PRODUCTS = spellings("matmul", "mm", "bmm", "mv", "__matmul__", "addmm", "baddbmm", "addmv")
_SWAPPED = spellings("__rmatmul__")


def read_dim(function: Callable[..., Any], place: int, last: int, rank: int) -> int | None:
    """Return the dimension of an input that a layer's columns index; ``None`` if it is not known.

    Args:
        function: The function of torch that applies the layer.
        place: Place of the input among the tensors of the call.
        last: Place of the last tensor.
        rank: Number of dimensions of the input.
    """
    if function in _PRODUCTS or function in _SWAPPED:
        is_left = (place < last) != (function in _SWAPPED)
        return -1 if is_left or rank == 1 else -2
    dim = _READ_DIMS.get(function)
    if dim is None or (dim != -1 and place != 0) or (dim == 1 and rank < 2):
        return None
    return dim
