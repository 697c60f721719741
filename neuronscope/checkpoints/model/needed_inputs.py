"""Find which elements of its inputs a call needs, given which elements of its outputs are needed.

Each rule takes the graph, the step, a bool mask for each output and the intervals of all tensors. It gives the number
of an input and a bool mask that broadcasts to the input's shape: false where no needed output depends on the element.
A rule raises where it does not know the way in which the function was called; then every element is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.model.bounds.interval import Interval
from neuronscope.checkpoints.model.traced_graph import Graph, Step, TensorRef, references, substitute

__all__ = [
    "NeededInputs",
    "by_batch_norm",
    "by_convolution",
    "by_elementwise",
    "by_linear",
    "by_matmul",
    "by_move",
    "by_pooling",
    "by_reduction",
    "by_same",
]

Masks = Iterator[tuple[int, Tensor]]
NeededInputs = Callable[[Graph, Step, list[Tensor], "list[Interval | None]"], Masks]


def _argument(step: Step, place: int, name: str, default: Any = None) -> Any:
    """Return an argument of a step, by its place or by its name."""
    return step.args[place] if len(step.args) > place else step.kwargs.get(name, default)


def _constant(graph: Graph, argument: Any) -> Tensor:
    tensor: Tensor | None = graph.values[argument.value].constant
    if tensor is None:
        raise ValueError("a weight that depends on the input")
    return tensor


def _matrix(graph: Graph, argument: Any) -> Tensor:
    tensor = _constant(graph, argument)
    if tensor.dim() != 2:
        raise ValueError("the weight is not a matrix")
    return tensor


def _nonzero_columns(weight: Tensor, rows: Tensor) -> Tensor:
    """Return which columns of a matrix ``(N, d)`` are not all zero in the chosen rows; bool ``(d,)``."""
    found = torch.zeros(weight.shape[1], dtype=torch.bool)
    for part in torch.nonzero(rows).flatten().split(4096):
        found |= (weight[part] != 0).any(0)
    return found


def by_linear(graph: Graph, step: Step, needed: list[Tensor], intervals: list[Interval | None]) -> Masks:
    """Follow ``linear``: a feature is needed if a needed row has a weight for it that is not zero."""
    x, weight = _argument(step, 0, "input"), _matrix(graph, _argument(step, 1, "weight"))
    rows = needed[0].reshape(-1, weight.shape[0]).any(0)
    yield x.value, _nonzero_columns(weight, rows)


def by_matmul(graph: Graph, step: Step, needed: list[Tensor], intervals: list[Interval | None]) -> Masks:
    """Follow ``x @ weight``, and ``addmm`` with a constant bias."""
    first = 1 if getattr(step.function, "__name__", "") == "addmm" else 0
    x, weight = step.args[first], _matrix(graph, step.args[first + 1])
    if first and graph.values[step.args[0].value].constant is None:
        raise ValueError("a bias that depends on the input")
    rows = needed[0].reshape(-1, weight.shape[1]).any(0)
    yield x.value, _nonzero_columns(weight.mT, rows)


def by_convolution(*, transposed: bool) -> NeededInputs:
    """Return the rule of a convolution: it follows whole channels.

    Args:
        transposed: Whether it is a transposed convolution.
    """

    def rule(graph: Graph, step: Step, needed: list[Tensor], intervals: list[Interval | None]) -> Masks:
        x, weight = _argument(step, 0, "input"), _constant(graph, _argument(step, 1, "weight"))
        # conv(input, weight, bias, stride, padding, dilation, groups); transposed: …, padding, output_padding, groups.
        groups = _argument(step, 6, "groups", 1)
        if needed[0].dim() != weight.dim():
            raise ValueError("no batch")
        rows = needed[0].any(0).flatten(1).any(1)  # (O,)
        taps = (weight != 0).flatten(2).any(2)
        parts = []
        for group, own in enumerate(rows.chunk(groups)):
            if transposed:
                inner = taps.shape[0] // groups
                parts.append((taps[group * inner : (group + 1) * inner] & own).any(1))
            else:
                outer = taps.shape[0] // groups
                parts.append((taps[group * outer : (group + 1) * outer] & own[:, None]).any(0))
        channels = torch.cat(parts)
        yield x.value, channels.view(1, -1, *(1 for _ in needed[0].shape[2:]))

    return rule


def by_batch_norm(graph: Graph, step: Step, needed: list[Tensor], intervals: list[Interval | None]) -> Masks:
    """Follow batch norm in evaluation mode: a channel whose γ is zero is not needed."""
    if _argument(step, 5, "training", False):
        raise ValueError("the batch's own statistics")
    x, weight = _argument(step, 0, "input"), _argument(step, 3, "weight")
    mask = needed[0]
    if isinstance(weight, TensorRef):
        mask = mask & (_constant(graph, weight) != 0).view(1, -1, *(1 for _ in mask.shape[2:]))
    yield x.value, mask


def by_elementwise(graph: Graph, step: Step, needed: list[Tensor], intervals: list[Interval | None]) -> Masks:
    """Follow an elementwise function: element by element, but not where the output is one number for every input.

    That holds for the output of a neuron that is proved dead, and for a product with a zero.
    """
    made = intervals[step.outputs[0]]
    if made is None:
        raise ValueError("the output is a constant")
    mask = needed[0] & ~((made.low == made.high) & made.low.isfinite())
    for operand in (*step.args, *step.kwargs.values()):
        if isinstance(operand, TensorRef) and graph.values[operand.value].constant is None:
            yield operand.value, _undo_broadcast(mask, graph.values[operand.value].shape)


def _undo_broadcast(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reduce a mask of a broadcast tensor to the tensor's own shape: true where any copy of the element is."""
    extra = mask.dim() - len(shape)
    if extra:
        mask = mask.flatten(0, extra - 1).any(0) if extra > 1 else mask.any(0)
    for dimension, length in enumerate(shape):
        if length == 1 and mask.shape[dimension] != 1:
            mask = mask.any(dimension, keepdim=True)
    return mask


def by_same(graph: Graph, step: Step, needed: list[Tensor], intervals: list[Interval | None]) -> Masks:
    """Follow a function that returns its input."""
    yield _argument(step, 0, "input").value, needed[0]


def by_move(graph: Graph, step: Step, needed: list[Tensor], intervals: list[Interval | None]) -> Masks:
    """Follow a function that only moves elements: run it on the elements' numbers, to see where each one went.

    Elements are numbered from 1; 0 stands for what is not an element of an input, such as padding.
    """
    starts: dict[int, int] = {}
    total = 1
    for number in references((step.args, dict(step.kwargs))):
        if graph.values[number].constant is None and number not in starts:
            starts[number] = total
            total += math.prod(graph.values[number].shape)

    def numbered(leaf: Any) -> Any:
        if not isinstance(leaf, TensorRef):
            return leaf
        value = graph.values[leaf.value]
        if leaf.value not in starts:
            constant = value.constant
            floating = constant is not None and constant.is_floating_point()
            return torch.zeros(value.shape, dtype=torch.float64) if floating else constant
        start = starts[leaf.value]
        return torch.arange(start, start + math.prod(value.shape), dtype=torch.float64).view(value.shape)

    args, kwargs = substitute((step.args, dict(step.kwargs)), numbered)
    result = step.function(*args, **kwargs)
    found = torch.zeros(total, dtype=torch.bool)
    for part, mask in zip(result if isinstance(result, (tuple, list)) else (result,), needed, strict=True):
        found[part[mask].long()] = True
    for number, start in starts.items():
        shape = graph.values[number].shape
        yield number, found[start : start + math.prod(shape)].view(shape)


def by_pooling(spatial: int) -> NeededInputs:
    """Return the rule of pooling over the last ``spatial`` dimensions: it follows whole channels."""

    def rule(graph: Graph, step: Step, needed: list[Tensor], intervals: list[Interval | None]) -> Masks:
        dims = tuple(range(-spatial, 0))
        channels = needed[0].any(dim=dims).reshape((*needed[0].shape[:-spatial], *(1 for _ in dims)))
        yield _argument(step, 0, "input").value, channels

    return rule


def by_reduction(graph: Graph, step: Step, needed: list[Tensor], intervals: list[Interval | None]) -> Masks:
    """Follow a reduction over some dimensions, such as a mean: it needs all elements along them."""
    x = _argument(step, 0, "input").value
    shape = graph.values[x].shape
    dims = _argument(step, 1, "dim")
    dropped = sorted(dim % len(shape) for dim in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    mask = needed[0]
    if mask.dim() != len(shape):
        for dimension in dropped:
            mask = mask.unsqueeze(dimension)
    yield x, mask
