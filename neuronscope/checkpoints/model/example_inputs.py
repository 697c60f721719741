"""Find example inputs to run a network on once.

They are tried in this order: what the user gives; ``example_input_array`` of a LightningModule; ``dummy_inputs`` of
transformers; the first batch of the data; shapes guessed from the first weighted layer. A guess that fails is reported,
and the next one is tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronscope.attach.torch_functions import spellings
from neuronscope.checkpoints.model.traced_graph import Graph, Step, substitute

__all__ = ["EXAMPLES", "Example", "batch_example", "examples_for", "keeps_examples", "two_examples"]

# Side lengths to try, by the number of spatial dimensions. The first can be halved five times.
_SIDES = {1: (1024, 16000), 2: (64, 224, 28), 3: (32, 96)}
#: How many examples show what mixes them.
EXAMPLES = 2
#: On two examples, turning by two looks as if it kept them.
_TURNS = spellings("roll")
_PADDING = -1.0  # marks what is no element of an example


class Example(NamedTuple):
    """Arguments to call a network with."""

    args: tuple[Any, ...]  # positional arguments
    kwargs: Mapping[str, Any]  # keyword arguments
    origin: str  # where they come from, for people

    @property
    def shapes(self) -> str:
        """The tensors' shapes as text.

        >>> Example((torch.zeros(1, 3),), {}, "given").shapes
        '1 × 3'
        """
        tensors = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]
        return ", ".join(" × ".join(map(str, tensor.shape)) or "()" for tensor in tensors)


def examples_for(model: nn.Module, given: Any = None, batch: Any = None) -> Iterator[Example]:
    """Yield examples to try on a network, best first.

    Args:
        model: The network.
        given: What the user gave as an example: a tensor, a tuple of arguments, or a mapping of named ones.
        batch: A batch of the user's data, if there is any.

    >>> [example.shapes for example in examples_for(nn.Sequential(nn.Linear(5, 2), nn.ReLU()))]
    ['1 × 5', '1 × 8 × 5']
    """
    if given is not None:
        yield _example(given, "the example that was given")
        return
    own = getattr(model, "example_input_array", None)
    if own is not None:
        yield _example(own, "the model's example_input_array")
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", "") == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        picture = torch.zeros(1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        yield _example({"pixel_values": picture}, "a picture of the size that the model's config names")
    dummies = getattr(model, "dummy_inputs", None) if config is not None else None
    if isinstance(dummies, Mapping):
        yield _example(dummies, "the model's dummy_inputs")
    if batch is not None:
        yield batch_example(batch)
    yield from _guesses(model)


def batch_example(batch: Any) -> Example:
    """Return the arguments with which a batch of the user's data is given to a network."""
    return _example(batch[0] if isinstance(batch, (tuple, list)) and batch else batch, "the first batch of the data")


def _example(given: Any, origin: str) -> Example:
    if isinstance(given, Mapping):
        return Example((), dict(given), origin)
    return Example(tuple(given) if isinstance(given, (tuple, list)) else (given,), {}, origin)


def _guesses(model: nn.Module) -> Iterator[Example]:
    """Yield inputs that the first weighted layer accepts, in its own dtype."""
    for module in model.modules():
        weight = getattr(module, "weight_ih_l0" if isinstance(module, nn.RNNBase) else "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            continue
        origin = f"an input guessed from the first layer, {type(module).__name__}"
        shapes: list[tuple[int, ...]] = []
        if isinstance(module, nn.Embedding):
            yield Example((torch.arange(8).remainder(module.num_embeddings).view(1, 8),), {}, origin)
            return
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            spatial = len(module.kernel_size)
            shapes = [(1, module.in_channels, *([side] * spatial)) for side in _SIDES[spatial]]
        elif isinstance(module, nn.Linear):
            shapes = [(1, module.in_features), (1, 8, module.in_features)]
        elif isinstance(module, nn.RNNBase):
            shapes = [(1, 8, module.input_size)]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            shapes = [(1, module.num_features), *((1, module.num_features, *([32] * n)) for n in (2, 1, 3))]
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            shapes = [(1, *module.normalized_shape), (1, 8, *module.normalized_shape)]
        for shape in shapes:
            yield Example((torch.zeros(shape, dtype=weight.dtype),), {}, origin)
        return


def two_examples(example: Example) -> Example | None:
    """Return an example with two rows in each tensor (its first two, or the only one twice).

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


def keeps_examples(graph: Graph, step: Step) -> bool:
    """Whether a function that moves elements keeps those of each example at the example's place.

    Args:
        graph: A traced forward on :data:`EXAMPLES` examples: the first dimension of what depends on the input.
        step: One call of the function in it.
    """

    def numbered(shape: tuple[int, ...]) -> Tensor:
        return torch.arange(EXAMPLES, dtype=torch.float64).view(-1, *(1 for _ in shape[1:])).expand(shape)

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
