"""Prove which neurons training on the same fixed data cannot revive.

A neuron of a first layer whose pre-activation is below zero for every example gets no gradient. What is left of the
optimizer's momentum may still move its weights, and decay shrinks them. If the pre-activation stays below zero through
all of that, for every example, it never gets a gradient again: it is *permanent* on this data.

The pre-activation of a first layer depends on the input and on its own weights alone, also in training. It reads the
network's input through fixed functions only, which treat each example alone. An activation that is zero below zero
follows it, and nothing else reads the pre-activation or the weights. So its weights get no gradient whatever the rest
of the network learns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neuronscope.attach.layer_names import layer_name
from neuronscope.attach.torch_functions import spellings
from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.data.user_arguments import check_batches
from neuronscope.checkpoints.file.parameter_matching import match_parameters
from neuronscope.checkpoints.file.remaining_motion import RemainingMotion, remaining_motion
from neuronscope.checkpoints.model.bounds.interval import gamma
from neuronscope.checkpoints.model.bounds.propagate import is_zero_below_zero
from neuronscope.checkpoints.model.example_inputs import EXAMPLES, Example, batch_example, keeps_examples, two_examples
from neuronscope.checkpoints.model.function_rules import DROPOUT, OPERATORS
from neuronscope.checkpoints.model.load_model import stored_names
from neuronscope.checkpoints.model.needed_inputs import by_elementwise, by_move, by_same
from neuronscope.checkpoints.model.observed_network import tensors_of
from neuronscope.checkpoints.model.trace import ForwardError, trace
from neuronscope.checkpoints.model.traced_graph import Graph, Site, Step, TensorRef
from neuronscope.checkpoints.user_code import user_code
from neuronscope.checkpoints.verdict.evidence import PERMANENT, Abstention, Evidence, evidence_where
from neuronscope.errors import UsageError
from neuronscope.running import model_state_restored

__all__ = ["FixedData", "find_first_layers"]

#: Added to the rounding of each term, relative to it: products of TF32 or bfloat16 (autocast) round as coarsely.
_COARSE = 2**-7
_OTHER_EXAMPLES = (
    "when the data was read again, it gave other examples; it is augmented or sampled, or a part of it is dropped"
)


class FixedData:
    """The whole training set of a checkpoint, and the neurons that training on it cannot revive.

    The data is read once here, in training mode and up to the first layers. When it is read again, :meth:`add` takes
    the batches, so that :meth:`evidence` can see whether they hold the same examples.

    Args:
        model: The network, with the checkpoint's weights.
        batches: The training set.
        first: Its first batch.
        checkpoint: The checkpoint.
        parameter_names: The names of the model's parameters in the checkpoint, in the model's order.

    Raises:
        UsageError: The data can be read only once, or the network fails on it.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        first: Any,
        checkpoint: Checkpoint,
        parameter_names: Sequence[str] | None,
    ) -> None:
        if iter(batches) is batches:
            raise UsageError(
                "Expected argument `data` to be batches that can be read twice, such as a list or a DataLoader, since "
                "`fixed_data` (--fixed-data) reads them twice; but got an iterator, which can be read once only."
            )
        self._seen, self._again = _ExampleSum(), _ExampleSum()
        self._bounds: list[_RowBounds] = []
        self._refused: list[Abstention] = []
        if checkpoint.is_averaged:
            self._refuse("", "the file's weights are averages of those that the optimizer trained")
            return
        layers = find_first_layers(model, batch_example(first))
        if isinstance(layers, str):
            self._refuse("", layers)
            return
        states = match_parameters(checkpoint, parameter_names)[0]
        names = stored_names(model, checkpoint)
        for layer in layers:
            tensors = {layer.weight_name: layer.weight, layer.bias_name: layer.bias}
            motions = [
                remaining_motion(states.get(names.get(name, name)), tensor)
                for name, tensor in tensors.items()
                if tensor is not None
            ]
            known = [motion for motion in motions if isinstance(motion, RemainingMotion)]
            if len(known) == len(motions):
                self._bounds.append(_RowBounds(layer, known))
            else:
                self._refuse(layer.path, next(motion for motion in motions if isinstance(motion, str)))
        with model_state_restored(model), torch.no_grad():
            model.train()
            for batch in check_batches(batches) if self._bounds else ():
                self._seen.add(batch)
                _run(model, batch, self._bounds)

    def _refuse(self, layer: str, reason: str) -> None:
        self._refused.append(Abstention(PERMANENT, layer, f"No neuron is proved permanent: {reason}."))

    def add(self, batch: Any) -> None:
        """Take a batch of the data when it is read again."""
        if self._bounds:
            self._again.add(batch)

    def evidence(self) -> Iterator[Evidence | Abstention]:
        """Yield evidence on the rows of first layers, and why others were not examined."""
        if self._seen != self._again:
            self._refuse("", _OTHER_EXAMPLES)
        else:
            for bounds in self._bounds:
                yield from bounds.evidence(self._seen.examples)
        yield from self._refused


@dataclass
class _ExampleSum:
    """A number that follows from the set of examples in batches, whatever their order and the batches' sizes.

    >>> one, other = _ExampleSum(), _ExampleSum()
    >>> one.add(torch.tensor([[1.0], [2.0]])), other.add(torch.tensor([[2.0]])), other.add(torch.tensor([[1.0]]))
    (None, None, None)
    >>> one == other
    True
    """

    examples: int = 0
    total: int = 0

    def add(self, batch: Any) -> None:
        """Add the examples of a batch, along the first dimension of the model's inputs."""
        tensors = [tensor for tensor in tensors_of(batch_example(batch)).values() if tensor.dim()]
        rows = min((len(tensor) for tensor in tensors), default=0)
        parts = [tensor.unsqueeze(1).flatten(1).contiguous().view(torch.uint8).numpy() for tensor in tensors]
        for row in range(rows):
            self.total = (self.total + hash(b"".join(part[row].tobytes() for part in parts))) % 2**64
        self.examples += rows


def _run(model: nn.Module, batch: Any, bounds: Sequence[_RowBounds]) -> None:
    """Run the network on a batch until every first layer was called."""
    example = batch_example(batch)
    mode = _LayerInputs(bounds)
    with user_code("Expected the model to run over the data in training mode"):
        try:
            # The data draws its random numbers outside, so that augmentation shows when it is read again.
            with torch.random.fork_rng(devices=[]), mode:
                model(*example.args, **example.kwargs)
        except _AllSeen:
            return
    for one in mode.left.values():
        one.missed = True


class _AllSeen(BaseException):
    """Every first layer was called; the rest of the forward is not needed."""


class _LayerInputs(TorchFunctionMode):
    """Passes the inputs of first layers to their bounds, and ends the forward after the last one."""

    def __init__(self, bounds: Sequence[_RowBounds]) -> None:
        super().__init__()
        self.left = {id(one.layer.weight): one for one in bounds}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        one = self.left.get(id(weight))
        if one is not None and func is one.layer.function:
            del self.left[id(weight)]
            given = args[0] if args else kwargs["input"]
            settings = {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}
            one.add(given.detach().double(), args[3:], settings)
            if not self.left:
                raise _AllSeen
        return func(*args, **kwargs)


class _RowBounds:
    """The highest pre-activation that each row of a first layer can have on any example, at any later step."""

    def __init__(self, layer: _FirstLayer, motions: Sequence[RemainingMotion]) -> None:
        self.layer = layer
        self.missed = False
        self._motions = motions
        self._weight = layer.weight.detach().double()
        rounding = gamma(self._weight[0].numel(), layer.weight.dtype) + _COARSE
        self._slack = [
            motion.reach + rounding * (tensor.detach().double().abs() + motion.reach)
            for motion, tensor in zip(motions, (layer.weight, layer.bias), strict=False)
            if tensor is not None
        ]
        self._highest = torch.full((len(self._weight),), -torch.inf, dtype=torch.float64)

    def add(self, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the input of one call, ``(B, …)``, and the arguments that follow the bias."""
        apply = self.layer.function
        product = apply(x, self._weight, None, *args, **kwargs) + apply(x.abs(), self._slack[0], None, *args, **kwargs)
        rows = product.movedim(-1 if apply is torch.nn.functional.linear else 1, -1).flatten(0, -2)
        if len(rows):
            self._highest = torch.maximum(self._highest, rows.nan_to_num(nan=torch.inf, neginf=torch.inf).amax(0))

    def evidence(self, examples: int) -> Iterator[Evidence]:
        """Yield evidence on the rows that stay below zero."""
        layer, highest = self.layer, self._highest
        if layer.bias is not None:
            bias = layer.bias.detach().double() + self._slack[1]
            groups = [motion.group for motion in self._motions]
            parts = [highest + bias]
            if groups[0] is not groups[1]:  # decay may take one of them away and leave the other
                parts += [part for part, group in zip((bias, highest), groups, strict=True) if group is not None]
            highest = torch.stack(torch.broadcast_tensors(*parts)).amax(0)
        rate = max(motion.rate for motion in self._motions)
        optimizer = self._motions[0].optimizer
        shrinks = any(motion.group is not None for motion in self._motions)
        return evidence_where(
            layer.path,
            (highest < 0) & (not self.missed),
            highest,
            source=PERMANENT,
            claim="no gradient",
            basis="proved",
            measure="pre-activation on this data, at most, with all that momentum can still add",
            text=(
                f"Permanent on this data: its pre-activation is below zero on each of the {examples:,} examples, and "
                f"stays so, so that it gets no gradient. What {optimizer} keeps of past gradients is too small to "
                f"change that{', and decay only shrinks it' if shrinks else ''}. This is proved for the next "
                f"{min(motion.steps for motion in self._motions):,} steps of training on these examples as they are, "
                f"in any order and any batches, with this optimizer and its state, at learning rates up to {rate:g}, "
                "if all gradients are finite and the loss depends on the weights through the network's output only."
            ),
        )


_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_POOLING = spellings("max_pool1d", "max_pool2d", "max_pool3d")
_PADDING = spellings("pad", "cat", "concat", "concatenate", "stack", "hstack", "vstack")


@dataclass(frozen=True, eq=False)
class _FirstLayer:
    """A linear or convolutional layer that reads the network's input."""

    path: str  # its path in the model
    function: Callable[..., Any]  # the torch function that it calls
    weight_name: str  # name of its weight in the model
    bias_name: str  # name of its bias; ``""`` if it has none
    weight: Tensor  # its weight, ``(N, …)``
    bias: Tensor | None  # its bias, ``(N,)``


def find_first_layers(model: nn.Module, example: Example) -> list[_FirstLayer] | str:
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

    def before(self, site: Site) -> _FirstLayer | None:
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

    def _layer(self, step: Step) -> _FirstLayer | None:
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
        return _FirstLayer(layer_name(module, leaf), step.function, names[0], names[1], weight, bias)

    def _reads_input(self, layer: Step) -> bool:
        """Whether only fixed functions, each example for itself, are between the network's input and a layer."""
        number = layer.argument(0, "input").value
        rank = len(self._values[number].shape)
        wanted = (
            rank >= 2
            if layer.function is F.linear
            else rank == len(self._values[layer.argument(1, "weight").value].shape)
        )
        if not wanted or self._values[number].shape[0] != EXAMPLES:
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
        if not sources.isdisjoint(self._may_change) or any(shape[:1] != (EXAMPLES,) for shape in shapes):
            return None
        if rule.needed_inputs in (by_elementwise, by_same):
            by_place = any(len(shape) >= len(shapes[0]) and shape[0] != 1 for shape in constants)
            return None if by_place or shapes[0] != shapes[1] else number
        return number if rule.needed_inputs is by_move and keeps_examples(self._graph, step) else None


def _keeps_sign(step: Step) -> bool:
    """Whether a step between a layer and its activation gives only numbers that it was given."""
    if step.function in _POOLING:
        return True
    rule = OPERATORS.get(step.function)
    moves = rule is not None and rule.needed_inputs in (by_move, by_same)
    return moves and step.function not in (DROPOUT | _PADDING)
