"""Unread: which neurons' outputs can reach the network's output, followed backwards through a traced forward.

A neuron is unread where every weight that reads it is exactly zero, or belongs to a neuron that is proved dead, or to
one that is unread itself. Backwards, in the reverse of the order in which the calls ran, one pass settles all of
them. A call that we do not know reads all that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from neuronscope.checkpoints.model.bounds.elementwise_ops import ELEMENTWISE_RULES
from neuronscope.checkpoints.model.bounds.interval import Interval
from neuronscope.checkpoints.model.bounds.shape_ops import MOVES, SAME
from neuronscope.checkpoints.model.traced_graph import Graph, Ref, Step, references, substitute

__all__ = ["unread_neurons"]

Masks = dict[int, Tensor]


def unread_neurons(graph: Graph, found: list[Interval | None]) -> dict[str, npt.NDArray[np.bool_]]:
    """Which neurons nobody reads.

    Args:
        graph: A traced forward, of which every call was seen.
        found: What :func:`~neuronscope.checkpoints.model.bounds.propagate.bounds_of` gave for it: a reader whose output
            is one and the same number whatever comes in reads nothing.

    Returns:
        For each site by name, bool ``(N,)``.
    """
    masks: Masks = {number: torch.ones(graph.values[number].shape, dtype=torch.bool) for number in graph.outputs}
    for step in reversed(graph.steps):
        if not any(number in masks and bool(masks[number].any()) for number in step.outputs):
            continue
        for number, mask in _reads(graph, step, masks, found):
            masks[number] = masks[number] | mask if number in masks else mask
    unread = {}
    for site in graph.sites:
        others = [dimension for dimension in range(len(graph.values[site.after].shape)) if dimension != site.info.axis]
        mask = masks.get(site.after, torch.zeros((), dtype=torch.bool)).expand(graph.values[site.after].shape)
        unread[site.name] = ~(mask.any(dim=others) if others else mask).numpy()
    return unread


def _reads(graph: Graph, step: Step, masks: Masks, found: list[Interval | None]) -> list[tuple[int, Tensor]]:
    """What a step reads of each tensor that depends on the input, given what is read of what it makes."""
    data = {number for number in step.reads if graph.values[number].constant is None}
    rule = _RULES.get(step.function)
    if rule is not None and len(step.outputs) >= 1:
        outputs = [
            masks.get(number, torch.zeros((), dtype=torch.bool)).expand(graph.values[number].shape)
            for number in step.outputs
        ]
        try:
            return [
                (number, mask.expand(graph.values[number].shape)) for number, mask in rule(graph, step, outputs, found)
            ]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            pass  # called in a way that we do not know
    return [(number, torch.ones(graph.values[number].shape, dtype=torch.bool)) for number in data]


def _argument(step: Step, place: int, name: str, default: Any = None) -> Any:
    """An argument of a step, by its place or by its name."""
    return step.args[place] if len(step.args) > place else step.kwargs.get(name, default)


def _constant(graph: Graph, argument: Any) -> Tensor:
    tensor: Tensor | None = graph.values[argument.value].constant
    if tensor is None:
        raise ValueError("a weight that depends on the input")
    return tensor


def _matrix(graph: Graph, argument: Any) -> Tensor:
    tensor = _constant(graph, argument)
    if tensor.dim() != 2:
        raise ValueError("no matrix, or a stack of them")
    return tensor


def _columns(weight: Tensor, rows: Tensor) -> Tensor:
    """Columns of a matrix in which any of these rows is not zero."""
    read = torch.zeros(weight.shape[1], dtype=torch.bool)
    for part in torch.nonzero(rows).flatten().split(4096):
        read |= (weight[part] != 0).any(0)
    return read


def _linear(graph: Graph, step: Step, outputs: list[Tensor], found: Any) -> Iterator[tuple[int, Tensor]]:
    x, weight = _argument(step, 0, "input"), _matrix(graph, _argument(step, 1, "weight"))
    rows = outputs[0].reshape(-1, weight.shape[0]).any(0)
    yield x.value, _columns(weight, rows)


def _matmul(graph: Graph, step: Step, outputs: list[Tensor], found: Any) -> Iterator[tuple[int, Tensor]]:
    first = 1 if getattr(step.function, "__name__", "") == "addmm" else 0
    x, weight = step.args[first], _matrix(graph, step.args[first + 1])
    if first and graph.values[step.args[0].value].constant is None:
        raise ValueError("a bias that depends on the input")
    rows = outputs[0].reshape(-1, weight.shape[1]).any(0)
    yield x.value, _columns(weight.mT, rows)


def _convolution(transposed: bool) -> Callable[..., Iterator[tuple[int, Tensor]]]:
    def rule(graph: Graph, step: Step, outputs: list[Tensor], found: Any) -> Iterator[tuple[int, Tensor]]:
        x, weight = _argument(step, 0, "input"), _constant(graph, _argument(step, 1, "weight"))
        # conv(input, weight, bias, stride, padding, dilation, groups); transposed: …, padding, output_padding, groups.
        groups = _argument(step, 6, "groups", 1)
        if outputs[0].dim() != weight.dim():
            raise ValueError("no batch")
        rows = outputs[0].any(0).flatten(1).any(1)  # (O,)
        taps = (weight != 0).flatten(2).any(2)
        parts = []
        for group, own in enumerate(rows.chunk(groups)):
            if transposed:
                inner = taps.shape[0] // groups
                parts.append((taps[group * inner : (group + 1) * inner] & own).any(1))
            else:
                outer = taps.shape[0] // groups
                parts.append((taps[group * outer : (group + 1) * outer] & own[:, None]).any(0))
        read = torch.cat(parts)
        yield x.value, read.view(1, -1, *(1 for _ in outputs[0].shape[2:]))

    return rule


def _batch_norm(graph: Graph, step: Step, outputs: list[Tensor], found: Any) -> Iterator[tuple[int, Tensor]]:
    if _argument(step, 5, "training", False):
        raise ValueError("the batch's own statistics")
    x, weight = _argument(step, 0, "input"), _argument(step, 3, "weight")
    mask = outputs[0]
    if isinstance(weight, Ref):
        mask = mask & (_constant(graph, weight) != 0).view(1, -1, *(1 for _ in mask.shape[2:]))
    yield x.value, mask


def _elementwise(graph: Graph, step: Step, outputs: list[Tensor], found: Any) -> Iterator[tuple[int, Tensor]]:
    """Where the output is one number whatever comes in, nothing is read: as by a dead reader, or beside a zero."""
    made = found[step.outputs[0]]
    mask = outputs[0] & ~((made.low == made.high) & made.low.isfinite())
    for operand in (*step.args, *step.kwargs.values()):
        if isinstance(operand, Ref) and graph.values[operand.value].constant is None:
            yield operand.value, _folded(mask, graph.values[operand.value].shape)


def _folded(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of what was broadcast, of the shape before."""
    extra = mask.dim() - len(shape)
    if extra:
        mask = mask.flatten(0, extra - 1).any(0) if extra > 1 else mask.any(0)
    for dimension, length in enumerate(shape):
        if length == 1 and mask.shape[dimension] != 1:
            mask = mask.any(dimension, keepdim=True)
    return mask


def _same(graph: Graph, step: Step, outputs: list[Tensor], found: Any) -> Iterator[tuple[int, Tensor]]:
    yield _argument(step, 0, "input").value, outputs[0]


def _moved(graph: Graph, step: Step, outputs: list[Tensor], found: Any) -> Iterator[tuple[int, Tensor]]:
    """The function itself says where each element went: it is given their numbers, from 1; 0 is nobody's."""
    starts: dict[int, int] = {}
    total = 1
    for number in references((step.args, dict(step.kwargs))):
        if graph.values[number].constant is None and number not in starts:
            starts[number] = total
            total += math.prod(graph.values[number].shape)

    def numbered(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
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
    read = torch.zeros(total, dtype=torch.bool)
    for part, mask in zip(result if isinstance(result, (tuple, list)) else (result,), outputs, strict=True):
        read[part[mask].long()] = True
    for number, start in starts.items():
        shape = graph.values[number].shape
        yield number, read[start : start + math.prod(shape)].view(shape)


def _pooled(spatial: int) -> Callable[..., Iterator[tuple[int, Tensor]]]:
    def rule(graph: Graph, step: Step, outputs: list[Tensor], found: Any) -> Iterator[tuple[int, Tensor]]:
        """Pooling keeps to its channel."""
        dims = tuple(range(-spatial, 0))
        yield (
            _argument(step, 0, "input").value,
            outputs[0].any(dim=dims).reshape((*outputs[0].shape[:-spatial], *(1 for _ in dims))),
        )

    return rule


def _reduced(graph: Graph, step: Step, outputs: list[Tensor], found: Any) -> Iterator[tuple[int, Tensor]]:
    """A mean or a sum over some dimensions reads all along them."""
    x = _argument(step, 0, "input").value
    shape = graph.values[x].shape
    dims = _argument(step, 1, "dim")
    dropped = sorted(dim % len(shape) for dim in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    mask = outputs[0]
    if mask.dim() != len(shape):
        for dimension in dropped:
            mask = mask.unsqueeze(dimension)
    yield x, mask


def _named(*names: str) -> list[Callable[..., Any]]:
    found = (getattr(home, name, None) for home in (F, torch, Tensor) for name in names)
    return [function for function in found if callable(function)]


_POOLS = ("max", "avg", "adaptive_max", "adaptive_avg")
# Elementwise by name, but with arguments that decide rather than pass on, or that mix elements of a row.
_NOT_ELEMENTWISE = frozenset(_named("where", "masked_fill", "masked_fill_", "softmax", "normalize"))

_RULES: dict[Callable[..., Any], Callable[..., Iterator[tuple[int, Tensor]]]] = {
    **{function: _elementwise for function in ELEMENTWISE_RULES if function not in _NOT_ELEMENTWISE},
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(_named("linear"), _linear),
    **dict.fromkeys(_named("matmul", "mm", "__matmul__", "addmm"), _matmul),
    **dict.fromkeys(_named("conv1d", "conv2d", "conv3d"), _convolution(False)),
    **dict.fromkeys(_named("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution(True)),
    **dict.fromkeys(_named("batch_norm"), _batch_norm),
    **{function: _pooled(n) for n in (1, 2, 3) for function in _named(*(f"{kind}_pool{n}d" for kind in _POOLS))},
    **dict.fromkeys(_named("mean", "sum", "amax", "amin"), _reduced),
}
