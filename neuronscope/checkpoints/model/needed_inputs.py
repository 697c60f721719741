"""Find which elements of its inputs a call needs, given which elements of its outputs are needed.

Each rule takes an :class:`OutputsNeeded` and yields pairs: the number of an input, and a bool mask that broadcasts to
the input's shape, false where no needed output depends on the element. A rule raises if the function was called in a
way that it does not know; then every element is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.model.bounds.interval import Interval
from neuronscope.checkpoints.model.traced_graph import Graph, Step, TensorRef

__all__ = [
    "NeededInputs",
    "OutputsNeeded",
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


@dataclass(frozen=True)
class OutputsNeeded:
    """A step of a traced forward, with the elements of its outputs that are needed."""

    graph: Graph  # the traced forward
    step: Step
    needed: list[Tensor]  # for each output of the step, which elements are needed: bool, of the output's shape
    intervals: list[Interval | None]  # what is known of every tensor of the graph, by its number

    def constant(self, argument: Any) -> Tensor:
        """Return the tensor that an argument stands for, which must not depend on the network's input."""
        tensor: Tensor | None = self.graph.values[argument.value].constant
        if tensor is None:
            raise ValueError("a weight that depends on the input")
        return tensor

    def matrix(self, argument: Any) -> Tensor:
        """Return the constant matrix that an argument stands for."""
        tensor = self.constant(argument)
        if tensor.dim() != 2:
            raise ValueError("the weight is not a matrix")
        return tensor


NeededInputs = Callable[[OutputsNeeded], Masks]


def _nonzero_columns(weight: Tensor, rows: Tensor) -> Tensor:
    """Return which columns of a matrix ``(N, d)`` are not all zero in the chosen rows; bool ``(d,)``."""
    found = torch.zeros(weight.shape[1], dtype=torch.bool)
    for part in torch.nonzero(rows).flatten().split(4096):
        found |= (weight[part] != 0).any(0)
    return found


def by_linear(call: OutputsNeeded) -> Masks:
    """Follow ``linear``: a feature is needed if a needed row has a weight for it that is not zero."""
    x, weight = call.step.argument(0, "input"), call.matrix(call.step.argument(1, "weight"))
    rows = call.needed[0].reshape(-1, weight.shape[0]).any(0)
    yield x.value, _nonzero_columns(weight, rows)


def by_matmul(call: OutputsNeeded) -> Masks:
    """Follow ``x @ weight``, and ``addmm`` with a constant bias."""
    first = 1 if getattr(call.step.function, "__name__", "") == "addmm" else 0
    x, weight = call.step.args[first], call.matrix(call.step.args[first + 1])
    if first and call.graph.values[call.step.args[0].value].constant is None:
        raise ValueError("a bias that depends on the input")
    rows = call.needed[0].reshape(-1, weight.shape[1]).any(0)
    yield x.value, _nonzero_columns(weight.mT, rows)


def by_convolution(*, transposed: bool) -> NeededInputs:
    """Return the rule of a convolution: it follows whole channels."""

    def rule(call: OutputsNeeded) -> Masks:
        x, weight = call.step.argument(0, "input"), call.constant(call.step.argument(1, "weight"))
        # conv(input, weight, bias, stride, padding, dilation, groups); transposed: …, padding, output_padding, groups.
        groups = call.step.argument(6, "groups", 1)
        if call.needed[0].dim() != weight.dim():
            raise ValueError("no batch")
        rows = call.needed[0].any(0).flatten(1).any(1)  # (O,)
        taps = (weight != 0).flatten(2).any(2).view(groups, -1, weight.shape[1])
        own = rows.view(groups, -1)
        channels = (taps & own[:, None]).any(2) if transposed else (taps & own[:, :, None]).any(1)
        yield x.value, channels.view(1, -1, *(1 for _ in call.needed[0].shape[2:]))

    return rule


def by_batch_norm(call: OutputsNeeded) -> Masks:
    """Follow batch norm in evaluation mode: a channel whose γ is zero is not needed."""
    if call.step.argument(5, "training", False):
        raise ValueError("the batch's own statistics")
    x, weight = call.step.argument(0, "input"), call.step.argument(3, "weight")
    mask = call.needed[0]
    if isinstance(weight, TensorRef):
        mask = mask & (call.constant(weight) != 0).view(1, -1, *(1 for _ in mask.shape[2:]))
    yield x.value, mask


def by_elementwise(call: OutputsNeeded) -> Masks:
    """Follow an elementwise function: element by element, but not where the output is one number for every input.

    That holds for the output of a neuron that is proved dead, and for a product with a zero.
    """
    made = call.intervals[call.step.outputs[0]]
    if made is None:
        raise ValueError("the output is a constant")
    mask = call.needed[0] & ~((made.low == made.high) & made.low.isfinite())
    for operand in (*call.step.args, *call.step.kwargs.values()):
        if isinstance(operand, TensorRef) and call.graph.values[operand.value].constant is None:
            yield operand.value, _undo_broadcast(mask, call.graph.values[operand.value].shape)


def _undo_broadcast(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reduce a mask of a broadcast tensor to the tensor's own shape: true where any copy of the element is."""
    extra = mask.dim() - len(shape)
    if extra:
        mask = mask.flatten(0, extra - 1).any(0) if extra > 1 else mask.any(0)
    for dimension, length in enumerate(shape):
        if length == 1 and mask.shape[dimension] != 1:
            mask = mask.any(dimension, keepdim=True)
    return mask


def by_same(call: OutputsNeeded) -> Masks:
    """Follow a function that returns its input."""
    yield call.step.argument(0, "input").value, call.needed[0]


def by_move(call: OutputsNeeded) -> Masks:
    """Follow a function that only moves elements: run it on the elements' numbers, to see where each one went.

    Elements are numbered from 1; 0 stands for what is not an element of an input, such as padding.
    """
    numbers: dict[int, Tensor] = {}
    total = 1
    for number in call.graph.variable_inputs(call.step):
        shape = call.graph.values[number].shape
        size = math.prod(shape)
        numbers[number] = torch.arange(total, total + size, dtype=torch.float64).view(shape)
        total += size

    def numbered(number: int) -> Tensor | None:
        constant = call.graph.values[number].constant
        if constant is not None and constant.is_floating_point():
            return torch.zeros(constant.shape, dtype=torch.float64)
        return constant if number not in numbers else numbers[number].clone()

    args, kwargs = call.step.arguments(numbered)
    result = call.step.function(*args, **kwargs)
    found = torch.zeros(total, dtype=torch.bool)
    for part, mask in zip(result if isinstance(result, (tuple, list)) else (result,), call.needed, strict=True):
        found[part[mask].long()] = True
    for number, own in numbers.items():
        yield number, found[own.long()]


def by_pooling(spatial: int) -> NeededInputs:
    """Return the rule of pooling over the last ``spatial`` dimensions: it follows whole channels."""

    def rule(call: OutputsNeeded) -> Masks:
        dims = tuple(range(-spatial, 0))
        channels = call.needed[0].any(dim=dims).reshape((*call.needed[0].shape[:-spatial], *(1 for _ in dims)))
        yield call.step.argument(0, "input").value, channels

    return rule


def by_reduction(call: OutputsNeeded) -> Masks:
    """Follow a reduction over some dimensions, such as a mean: it needs all elements along them."""
    x = call.step.argument(0, "input").value
    shape = call.graph.values[x].shape
    dims = call.step.argument(1, "dim")
    dropped = sorted(dim % len(shape) for dim in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    mask = call.needed[0]
    if mask.dim() != len(shape):
        for dimension in dropped:
            mask = mask.unsqueeze(dimension)
    yield x, mask
