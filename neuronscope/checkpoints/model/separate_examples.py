"""Tell whether a step of a traced forward treats each example of the batch for itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuronscope.attach.torch_functions import spellings
from neuronscope.checkpoints.model.example_inputs import Example
from neuronscope.checkpoints.model.traced_graph import Graph, Step, substitute

__all__ = ["keeps_examples", "two_examples"]

#: On two examples, turning by two looks as if it kept them.
_TURNS = spellings("roll")
_PADDING = -1.0  # marks what is no element of an example


def two_examples(example: Example) -> Example | None:
    """Return an example with two rows in each tensor (its first two, or the only one twice): what mixes examples shows.

    ``None`` if the tensors do not have equally many rows.
    """
    sizes = set()

    def two(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        sizes.add(tuple(leaf.shape[:1]))
        return torch.cat([leaf, leaf])[:2] if leaf.shape[:1] == (1,) else leaf[:2]

    args, kwargs = substitute((tuple(example.args), dict(example.kwargs)), two)
    return Example(args, kwargs, example.origin) if len(sizes) == 1 and not sizes & {(), (0,)} else None


def keeps_examples(graph: Graph, step: Step, examples: int) -> bool:
    """Whether a function that moves elements keeps those of each example at the example's place.

    Args:
        graph: A traced forward.
        step: One call of the function in it.
        examples: Number of examples, ``B``: the first dimension of each tensor that depends on the input.
    """

    def numbered(shape: tuple[int, ...]) -> Tensor:
        return torch.arange(examples, dtype=torch.float64).view(-1, *(1 for _ in shape[1:])).expand(shape)

    def marked(number: int) -> Tensor:
        value = graph.values[number]
        return numbered(value.shape).clone() if value.constant is None else torch.full(value.shape, _PADDING)

    constants = (graph.values[number] for number in step.reads if graph.values[number].constant is not None)
    if step.function in _TURNS or not all(value.dtype.is_floating_point for value in constants):
        return False  # an index may choose other examples from a larger batch
    try:
        args, kwargs = step.arguments(marked)
        if step.function is F.pad and kwargs.get("mode", "constant") == "constant" and len(args) < 4:
            kwargs["value"] = _PADDING
        moved = step.function(*args, **kwargs)
        return bool(((moved == numbered(tuple(moved.shape))) | (moved == _PADDING)).all())
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
