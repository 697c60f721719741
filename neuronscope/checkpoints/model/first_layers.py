"""Find the layers whose pre-activation depends on the input and on their own weights alone, also in training.

Such a layer reads the network's input through fixed functions only, which treat each example alone. An activation that
is zero below zero follows it, and nothing else reads the pre-activation or the weights. If the pre-activation of a
neuron is below zero for every example, its weights get no gradient, whatever the rest of the network learns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronscope.attach.layer_names import layer_name
from neuronscope.attach.torch_functions import spellings
from neuronscope.checkpoints.model.bounds.propagate import is_zero_below_zero
from neuronscope.checkpoints.model.example_inputs import Example
from neuronscope.checkpoints.model.function_rules import DROPOUT, OPERATORS
from neuronscope.checkpoints.model.needed_inputs import by_elementwise, by_move, by_same
from neuronscope.checkpoints.model.separate_examples import keeps_examples, two_examples
from neuronscope.checkpoints.model.trace import ForwardError, trace
from neuronscope.checkpoints.model.traced_graph import Graph, Site, Step, TensorRef

__all__ = ["FirstLayer", "find_first_layers"]

_EXAMPLES = 2
_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_POOLING = spellings("max_pool1d", "max_pool2d", "max_pool3d")
_PADDING = spellings("pad", "cat", "concat", "concatenate", "stack", "hstack", "vstack")


@dataclass(frozen=True, eq=False)
class FirstLayer:
    """A linear or convolutional layer that reads the network's input."""

    path: str  # its path in the model
    function: Callable[..., Any]  # the torch function that it calls
    weight_name: str  # name of its weight in the model
    bias_name: str  # name of its bias; ``""`` if it has none
    weight: Tensor  # its weight, ``(N, …)``
    bias: Tensor | None  # its bias, ``(N,)``


def find_first_layers(model: nn.Module, example: Example) -> list[FirstLayer] | str:
    """Return the first layers of a network, or why none is known.

    Args:
        model: The network. It runs once, in training mode, and is left as it was.
        example: An input that it runs on, examples along the first dimension.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU())
    >>> [layer.path for layer in find_first_layers(net, Example((torch.zeros(1, 2, 2),), {}, ""))]
    ['1']
    """
    two = two_examples(example)
    if two is None:
        return "the inputs do not have examples along their first dimension"
    try:
        with torch.random.fork_rng(devices=[]):
            graph = trace(model, two.args, two.kwargs, training=True)
    except ForwardError as error:
        return f"the network does not run in training mode on two examples: {error}"
    if graph.branches:
        return f"in training, its Python code reads numbers that depend on the input ({', '.join(graph.branches)})"
    if graph.unseen_tensors or graph.output_not_searchable:
        return "in training, it computes with calls that were not seen"
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = [_FirstLayers(graph, learned).before(site) for site in graph.sites]
    layers = {layer.path: layer for layer in found if layer is not None}
    if not layers:
        return (
            "no layer with an activation that is zero below zero reads the input directly: dropout, noise, a batch "
            "norm, learned parameters before it, or another reader of its output forbid the proof"
        )
    return list(layers.values())


class _FirstLayers:
    """Finds the first layers of a traced forward in training mode on two examples."""

    def __init__(self, graph: Graph, learned: set[str]) -> None:
        self._graph = graph
        self._values = graph.values
        self._steps = graph.producers
        self._reads = Counter(number for step in graph.steps for number in set(step.reads))
        # A weight from which the forward computes something else may get a gradient from there.
        self._read_elsewhere = {name for value in graph.values if not value.name for name in value.sources}
        self._may_change = learned | graph.changed

    def before(self, site: Site) -> FirstLayer | None:
        """Return the first layer that leads to a site, if one does."""
        activation = self._steps.get(site.after)
        if activation is None or set(activation.reads) != {site.before} or not is_zero_below_zero(self._graph, site):
            return None
        number = site.before
        while self._reads[number] == 1 and number not in self._graph.outputs and number in self._steps:
            step = self._steps[number]
            if step.function in _LAYERS:
                layer = self._layer(step)
                return layer if layer is not None and self._reads_input(step) else None
            if len(step.outputs) != 1 or len(step.reads) != 1 or not _keeps_sign(step):
                break
            number = step.reads[0]
        return None

    def _layer(self, step: Step) -> FirstLayer | None:
        """Return the layer of a step whose weight and bias are parameters that nothing else reads."""
        names: list[str] = []
        tensors: list[Tensor | None] = []
        for place, name in ((1, "weight"), (2, "bias")):
            argument = step.argument(place, name)
            if argument is None and name == "bias":
                names.append("")
                tensors.append(None)
            elif isinstance(argument, TensorRef) and self._reads[argument.value] == 1:
                names.append(self._values[argument.value].name)
                tensors.append(self._values[argument.value].constant)
            else:
                return None
        weight, bias = tensors
        if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter | None):
            return None
        if not weight.is_floating_point() or not self._read_elsewhere.isdisjoint(names):
            return None
        module, _, leaf = names[0].rpartition(".")
        return FirstLayer(layer_name(module, leaf), step.function, names[0], names[1], weight, bias)

    def _reads_input(self, layer: Step) -> bool:
        """Whether only fixed functions, each example for itself, are between the network's input and a layer."""
        number = layer.argument(0, "input").value
        rank = len(self._values[number].shape)
        wanted = (
            rank >= 2
            if layer.function is F.linear
            else rank == len(self._values[layer.argument(1, "weight").value].shape)
        )
        if not wanted or self._values[number].shape[0] != _EXAMPLES:
            return False
        while number not in self._graph.inputs:
            before = self._preprocessed(self._steps[number]) if number in self._steps else None
            if before is None:
                return False
            number = before
        return True

    def _preprocessed(self, step: Step) -> int | None:
        """Return the tensor that a step applies a fixed function to, each example for itself; else ``None``."""
        inputs = self._graph.variable_inputs(step)
        sources = {name for number in step.reads for name in self._values[number].sources}
        rule = OPERATORS.get(step.function)
        if len(inputs) != 1 or len(step.outputs) != 1 or rule is None or step.function in DROPOUT:
            return None
        (number,) = inputs
        constants = [self._values[other].shape for other in step.reads if other != number]
        shapes = self._values[number].shape, self._values[step.outputs[0]].shape
        if not sources.isdisjoint(self._may_change) or any(shape[:1] != (_EXAMPLES,) for shape in shapes):
            return None
        if rule.needed_inputs in (by_elementwise, by_same):
            by_place = any(len(shape) >= len(shapes[0]) and shape[0] != 1 for shape in constants)
            return None if by_place or shapes[0] != shapes[1] else number
        return number if rule.needed_inputs is by_move and keeps_examples(self._graph, step, _EXAMPLES) else None


def _keeps_sign(step: Step) -> bool:
    """Whether a step between a layer and its activation gives only numbers that it was given."""
    if step.function in _POOLING:
        return True
    rule = OPERATORS.get(step.function)
    moves = rule is not None and rule.needed_inputs in (by_move, by_same)
    return moves and step.function not in (DROPOUT | _PADDING)
