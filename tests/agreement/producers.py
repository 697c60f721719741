"""Find the layer behind a pre-activation in autograd's graph, which Neuronscope does not look at, and name its site.

Two things are found in two ways. *Which call of a layer* it was is read off the graph: the nodes of convolutions,
products, norms and embeddings whose weight leads to parameters only, and what plain hooks mark of layers that autograd
shows as many nodes (recurrent ones). *Which units* the neurons are is measured: each neuron sends a gradient back that
bears its number, bit by bit, and the units of the layer that receive it are counted.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

__all__ = ["Namer", "Site"]

#: Layers that are several nodes of the graph, or none with a weight: the dimension of their units.
MARKED: dict[type[nn.Module], int] = {
    nn.RNNBase: -1,
    nn.RNNCellBase: -1,
    nn.Bilinear: -1,
    nn.RMSNorm: -1,
    nn.modules.batchnorm._BatchNorm: 1,
}
#: Nodes behind which one element is no unit any more.
ENDS = ("TopkBackward", "SortBackward", "GatherBackward", "ScatterBackward", "ScatterAddBackward", "CumsumBackward")
#: By name of the node: place of the weight among its inputs, and the dimensions of the units.
SLOTS = {
    "ConvolutionBackward0": ((1, (1,)),),
    "NativeBatchNormBackward0": ((1, (1,)),),
    "NativeGroupNormBackward0": ((1, (1,)),),
    "NativeLayerNormBackward0": ((1, (-1,)),),
    "FusedRmsNormBackward0": ((1, (-1,)),),
    "EmbeddingBackward0": ((0, (-1,)),),
    "EmbeddingBagBackward0": ((0, (-1,)),),
    "AddmmBackward0": ((2, (-1,)), (1, (0,))),
    "MmBackward0": ((1, (-1,)), (0, (0,))),
    "AddmvBackward0": ((1, (0,)),),
    "MvBackward0": ((0, (0,)),),
    "BmmBackward0": ((1, (0, -1)), (0, (0, 1))),
    "BaddbmmBackward0": ((2, (0, -1)), (1, (0, 1))),
}
NORMS = ("NativeBatchNormBackward0", "NativeGroupNormBackward0", "NativeLayerNormBackward0", "FusedRmsNormBackward0")
PRODUCTS = ("MmBackward0", "BmmBackward0", "AddmmBackward0", "BaddbmmBackward0")
JOINS = ("CatBackward0", "StackBackward0")
#: Nodes of functions that are not linear, element by element.
NOT_LINEAR = re.compile(
    "(Relu|Gelu|Silu|Sigmoid|Tanh|Elu|Hard|Mish|Softplus|Prelu|Clamp|Maximum|Minimum|Abs|Exp(?!and)|Log|Pow|Erf|Sqrt|Rsqrt|Sin"
    "|Cos|Sgn|Reciprocal|Special)[A-Za-z0-9]*Backward"
)
#: Nodes that look at several units or positions at once, so that what comes after them is no activation of the layer.
MIXING = re.compile(
    "(Sum|Mean|Softmax|LogSoftmax|Var|Std|StdMean|VarMean|Norm|LinalgVectorNorm|Max|Min|Amax|Amin|Topk|Sort|Gather|Cumsum"
    "|ScaledDot[A-Za-z]*|Mm|Bmm|Baddbmm|Index[A-Za-z]*|Scatter[A-Za-z]*|NativeLayerNorm|NativeGroupNorm|NativeBatchNorm"
    "|[A-Za-z]*Loss[A-Za-z0-9]*)Backward"
)
#: What a gated product is called, by the activation of the gate.
GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu", "sigmoid": "glu"}

Unit = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Producer:
    """One call of a layer.

    Attributes:
        layer: Path of the layer.
        node: Its node in the graph.
        axes: Dimensions of its output that index its units.
    """

    layer: str
    node: Any
    axes: tuple[int, ...]

    @property
    def order(self) -> int:
        return self.node._sequence_nr()

    @property
    def width(self) -> int:
        shape = self.node._input_metadata[0].shape
        return math.prod(shape[axis] for axis in self.axes)


@dataclass(frozen=True)
class Site:
    """An activation that was named.

    Attributes:
        name: The site's name.
        activation: Name of its activation.
        producers: The calls whose units its neurons are.
        units: Layer and number of each neuron.
    """

    name: str
    activation: str
    producers: tuple[Producer, ...]
    units: tuple[Unit, ...]


class Ended(Exception):
    """The elements of a tensor are no units of a layer any more."""


class Namer:
    """Names the sites of a model's forwards.

    Args:
        model: The model; all of its parameters require gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[int, str] = {}
        self.paths: dict[nn.Module, str] = {}
        self.kept: list[nn.Parameter] = []
        shared = set()
        for path, module in model.named_modules():
            self.paths[module] = path
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    layer = layer_of(path, name)
                    self.kept.append(parameter)
                    if self.layers.setdefault(id(parameter), layer) != layer:
                        shared.add(id(parameter))
        self.holders = [
            module for module in self.paths if any(id(weight) in shared for weight in module._parameters.values())
        ]
        self.clear()

    def clear(self) -> None:
        """Forget the last forward."""
        self.marks: dict[Any, Producer] = {}
        self.found: dict[Any, tuple[Producer, ...] | str] = {}
        self.chosen: dict[Any, list[int]] = {}  # of each node: the inputs whose units its output has
        self.weights: dict[Any, bool] = {}
        self.ordinals: dict[Any, int] = {}
        self.generator = torch.Generator().manual_seed(0)

    def hook(self) -> Iterator[RemovableHandle]:
        """Mark the outputs of layers that the graph does not show as one node with a weight."""
        for module in self.paths:
            axis = next((axis for kind, axis in MARKED.items() if isinstance(module, kind)), None)
            if (
                isinstance(module, nn.modules.batchnorm._BatchNorm)
                and not module.affine
                and module.running_mean is None
            ):
                axis = None
            if axis is None and module in self.holders:
                axis = 1 if "Conv" in type(module).__name__ else -1
            if axis is not None:
                yield module.register_forward_hook(self._mark(self.paths[module], axis))

    def _mark(self, path: str, axis: int) -> Callable[..., None]:
        def mark(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in torch.utils._pytree.tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    self.marks[tensor.grad_fn] = Producer(path or "(root)", tensor.grad_fn, (axis,))

        return mark

    def site(self, place: str, activation: str, x: Tensor, axes: Sequence[int], *, is_module: bool) -> Site | None:
        """Return the site of an activation that is about to be applied; ``None`` if its input holds no neurons.

        Args:
            place: Path of the activation module, or of the module that calls the function, as ``block.relu()``.
            activation: Name of the activation.
            x: The pre-activation.
            axes: The dimensions that hold neurons.
            is_module: Whether the activation is a module.
        """
        try:
            producers, units = self.units_of(x, axes)
        except Ended:
            return None
        if not producers:
            weights = x.grad_fn is not None and self._is_weight(x.grad_fn)
            return Site(place, activation, (), ()) if is_module and not weights else None
        return Site(self._name(producers, units, activation), activation, producers, units)

    def product(self, gate: Site, other: Tensor, output: Tensor, axes: Sequence[int]) -> str | None:
        """Return the name of the product of a site's output and another tensor; ``None`` if it is no gated product.

        Args:
            gate: The site.
            other: The other factor.
            output: The product: its units are those of the gate.
            axes: The dimensions that hold neurons.
        """
        if other.grad_fn is None or self._is_weight(other.grad_fn):
            return None
        name = GATED.get(gate.activation, f"gated {gate.activation}")
        if not gate.producers:
            return f"{gate.name}/{name}"
        with contextlib.suppress(Ended):
            if self.units_of(other, axes) == (gate.producers, gate.units):
                return None
        node = output.grad_fn
        while len(node.next_functions) == 1:  # views, of a product in place
            self.found[node], self.chosen[node] = gate.producers, [0]
            node = node.next_functions[0][0]
        sources = [None if each is None else self._source(each) for each, _ in node.next_functions]
        self.found[node], self.chosen[node] = gate.producers, [sources.index(gate.producers)]
        return self._name(gate.producers, gate.units, name)

    def _name(self, producers: tuple[Producer, ...], units: tuple[Unit, ...], activation: str) -> str:
        key = (tuple(each.node for each in producers), units, activation)
        ordinal = self.ordinals[key] = self.ordinals.get(key, -1) + 1
        layer = "+".join(dict.fromkeys(each.layer for each in producers))
        part = "" if len(units) == sum(each.width for each in producers) else f"({text_of(units)})"
        return f"{layer}{part}/{activation}" + (f"#{ordinal}" if ordinal else "")

    def read_behind_functions(self, loss: Tensor) -> dict[str, set[str]]:
        """Return the layers that another layer reads behind functions that are not linear, and those functions.

        A sum of two branches that hold units, and whatever looks at several units at once, is a reader of its own.

        Args:
            loss: What the forward led to.
        """
        found: dict[str, set[str]] = {}
        queue, known = deque([loss.grad_fn]), {loss.grad_fn}
        while queue:
            node = queue.popleft()
            inputs = [each for each, _ in node.next_functions if each is not None and not self._is_weight(each)]
            if isinstance(self._own(node), tuple):
                for source in inputs:
                    self._look_behind(source, found)
            fresh = [each for each in inputs if each not in known]
            queue.extend(fresh)
            known.update(fresh)
        return found

    def _look_behind(self, node: Any, found: dict[str, set[str]]) -> None:
        queue, seen = deque([(node, frozenset[str]())]), set()
        while queue:
            node, functions = queue.popleft()
            own = self._own(node)
            if isinstance(own, tuple):
                for producer in own if functions else ():
                    found.setdefault(producer.layer, set()).update(functions)
                continue
            inputs = [each for each, _ in node.next_functions if each is not None and not self._is_weight(each)]
            sums = node.name().startswith(("Add", "Sub")) and len(inputs) > 1
            if (node, functions) in seen or own is not None or sums or MIXING.match(node.name()):
                continue
            seen.add((node, functions))
            if NOT_LINEAR.match(node.name()):
                functions |= {node.name()}
            queue.extend((each, functions) for each in inputs)

    # The units, measured.

    def units_of(self, x: Tensor, axes: Sequence[int]) -> tuple[tuple[Producer, ...], tuple[Unit, ...]]:
        """Return the calls that made a tensor, and the unit that each of its neurons is; nothing if no layer made it.

        Args:
            x: The tensor.
            axes: The dimensions that hold neurons.

        Raises:
            Ended: Several units lie behind a neuron.
        """
        found = RAW if x.grad_fn is None else self._source(x.grad_fn)
        if found == ENDED:
            raise Ended
        if found == RAW:
            return (), ()
        producers = found
        count = math.prod(x.shape[axis] for axis in axes)
        every = [(index, unit) for index, producer in enumerate(producers) for unit in range(producer.width)]
        if (len(producers) == 1 and x.grad_fn is producers[0].node) or x.numel() == 0:
            numbers = dict(enumerate(every))
        else:
            numbers = self._measure(x, producers, axes, count)
        if len(numbers) == 0 and count == len(every):  # no gradient comes through at all
            numbers = dict(enumerate(every))
        if not numbers:
            raise Ended
        for forward in (range(count), range(count - 1, -1, -1)):  # neurons without any gradient follow their neighbours
            step = 1 if forward.step > 0 else -1
            for number in forward:
                near = numbers.get(number - step)
                if number not in numbers and near is not None and 0 <= near[1] + step < producers[near[0]].width:
                    numbers[number] = (near[0], near[1] + step)
        return producers, tuple(
            (producers[index].layer, unit) for index, unit in map(numbers.__getitem__, range(count))
        )

    def _measure(
        self, x: Tensor, producers: tuple[Producer, ...], axes: Sequence[int], count: int
    ) -> dict[int, tuple[int, int]]:
        """Return the producer and unit of each neuron through which a gradient comes."""
        edges = [GradientEdge(each.node, 0) for each in producers]
        shape = [x.shape[dim] if dim in [axis % x.dim() for axis in axes] else 1 for dim in range(x.dim())]
        number = torch.arange(count).view(shape)
        some = (torch.rand(x.shape, generator=self.generator) + 0.5).to(x.dtype)

        def reached(neurons: Tensor) -> list[Tensor]:
            sent = some * neurons.to(x.dtype)
            grads = torch.autograd.grad(x, edges, sent, retain_graph=True, allow_unused=True)
            return [
                torch.zeros(each.width, dtype=torch.bool) if grad is None else _per_unit(grad, each.axes)
                for each, grad in zip(producers, grads, strict=True)
            ]

        codes = [torch.zeros(each.width, dtype=torch.int64) for each in producers]
        with self._only_up_to_layers(x.grad_fn, producers):
            known = reached(torch.ones_like(number))
            for bit in range(max(count - 1, 0).bit_length()):
                ones, zeros = reached(number >> bit & 1), reached(1 - (number >> bit & 1))
                for index, (one, zero) in enumerate(zip(ones, zeros, strict=True)):
                    if (one & zero).any():
                        raise Ended
                    codes[index] += one.long() << bit
        found: dict[int, tuple[int, int]] = {}
        for index, (code, is_known) in enumerate(zip(codes, known, strict=True)):
            for unit in is_known.nonzero().flatten().tolist():
                if int(code[unit]) in found:
                    raise Ended
                found[int(code[unit])] = (index, unit)
        return found

    @contextlib.contextmanager
    def _only_up_to_layers(self, node: Any, producers: Sequence[Producer]) -> Iterator[None]:
        """Let gradients pass only to the inputs whose units an operation's output has, and through no layer.

        Args:
            node: Where gradients begin.
            producers: Where they are looked at.
        """
        first = min(each.order for each in producers)
        queue, seen, handles = deque([node]), set(), []
        while queue:
            each = queue.popleft()
            if each is None or each in seen or not each.next_functions or each._sequence_nr() < first:
                continue
            seen.add(each)
            if isinstance(self._own(each), tuple):
                handles.append(each.register_hook(_only(())))
                continue
            self._source(each)
            chosen = self.chosen.get(each, ())
            if len(chosen) < len(each.next_functions):
                handles.append(each.register_hook(_only(chosen)))
            elif each.name().startswith("GluBackward"):
                handles.append(each.register_hook(_first_half(each._saved_dim)))
            queue.extend(each.next_functions[index][0] for index in chosen)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # The calls of layers, read off the graph.

    def _source(self, node: Any) -> tuple[Producer, ...] | str:
        """Return the calls whose units a node's output holds, or :data:`RAW` or :data:`ENDED`."""
        path = []
        while True:
            found = self.found.get(node)
            if found is not None:
                break
            path.append(node)
            found = self._own(node)
            if found is not None:
                break
            branches = self._branches(node)
            self.chosen[node] = [*branches]
            if len(branches) != 1:
                found = self._join(node, branches) if branches else RAW
                break
            node = next(iter(branches.values()))
        self.found.update(dict.fromkeys(path, found))
        return found

    def _own(self, node: Any) -> tuple[Producer, ...] | str | None:
        """Return what a node itself decides; ``None`` if its inputs do."""
        name = node.name()
        if node in self.marks:
            return (self.marks[node],)
        if name.startswith(ENDS):
            return ENDED
        for slot, axes in SLOTS.get(name, ()):
            weight = node.next_functions[slot][0]
            if weight is not None and self._is_weight(weight):
                return (Producer(self._layer(weight), node, axes),)
        return None

    def _branches(self, node: Any) -> dict[int, Any]:
        """Return the inputs of a node that its units can come from, by their place: the widest that are no weights."""
        name = node.name()
        given = {index: each for index, each in enumerate(node.next_functions) if each[0] is not None}
        if name in NORMS:
            given = {index: each for index, each in given.items() if index == 0}
        elif name.startswith("ScaledDotProduct"):
            given = {index: each for index, each in given.items() if index == 2}
        data = {index: each for index, each in given.items() if not self._is_weight(each[0])}
        if name in PRODUCTS:
            others = {index: each for index, each in data.items() if not self._is_softmax(each[0])}
            data = dict([*(others or data).items()][-1:])
        sizes = {index: math.prod(each._input_metadata[place].shape) for index, (each, place) in data.items()}
        return {
            index: each for index, (each, _) in data.items() if name in JOINS or sizes[index] == max(sizes.values())
        }

    def _join(self, node: Any, branches: dict[int, Any]) -> tuple[Producer, ...] | str:
        """Return the calls whose units a node with several inputs has."""
        sources = {index: self._source(branch) for index, branch in branches.items()}
        calls = {index: found for index, found in sources.items() if isinstance(found, tuple)}
        if not calls:
            return ENDED if ENDED in sources.values() else RAW
        if node.name() in JOINS:
            if len(calls) < len(branches):
                return ENDED
            layers = {tuple(each.layer for each in found) for found in calls.values()}
            return (
                next(iter(calls.values()))
                if len(layers) == 1
                else tuple(dict.fromkeys(each for found in calls.values() for each in found))
            )
        left = {
            index: found
            for index, found in calls.items()
            if not any(
                other != found and all(self._depends(branches[place], each) for each in found)
                for place, other in calls.items()
            )
        }
        left = left or calls
        index = min(left, key=lambda index: min(each.order for each in left[index]))
        self.chosen[node] = [index]
        return calls[index]

    def _depends(self, node: Any, producer: Producer) -> bool:
        """Whether a node's output depends on a call."""
        queue, seen = deque([node]), set()
        while queue:
            each = queue.popleft()
            if each is producer.node:
                return True
            if each is None or each in seen or not each.next_functions or each._sequence_nr() < producer.order:
                continue
            seen.add(each)
            queue.extend(source for source, _ in each.next_functions)
        return False

    def _is_softmax(self, node: Any) -> bool:
        """Whether a softmax is the next thing before a node that is no view, mask or dropout."""
        for _ in range(12):
            if node is None or self._own(node) is not None or not node.next_functions:
                return False
            if "Softmax" in node.name():
                return True
            node = node.next_functions[0][0]
        return False

    def _is_weight(self, node: Any) -> bool:
        """Whether a node's output was computed from parameters alone."""
        known = self.weights.get(node)
        if known is None:
            known = self.weights[node] = self._is_weight_anew(node)
        return known

    def _is_weight_anew(self, node: Any) -> bool:
        name, inputs = node.name(), [each for each, _ in node.next_functions]
        if name == "AccumulateGrad" or name.endswith("AccumulateGrad"):
            return id(node.variable) in self.layers
        if node in self.marks:
            return False
        if name in ("MmBackward0", "BmmBackward0"):
            return all(each is not None and self._is_weight(each) for each in inputs)
        if name == "NativeBatchNormBackward0":  # a weight that is standardised
            return inputs[0] is not None and self._is_weight(inputs[0])
        if name in SLOTS:
            return False
        given = [each for each in inputs if each is not None]
        return bool(given) and all(self._is_weight(each) for each in given)

    def _layer(self, node: Any) -> str:
        """Return the path of the layer that a weight belongs to."""
        name = node.name()
        if hasattr(node, "variable"):
            return self.layers[id(node.variable)]
        if name == "SelectBackward0" and node._saved_dim == 0 and len(node._saved_self_sym_sizes) > 2:
            index = node._saved_index % node._saved_self_sym_sizes[0]
            return f"{self._layer(node.next_functions[0][0])}.{index}"
        return self._layer(next(each for each, _ in node.next_functions if each is not None))


RAW, ENDED = "raw", "ended"


def layer_of(path: str, name: str) -> str:
    """Return the name of a parameter's layer.

    Args:
        path: Path of the module that holds it.
        name: Its name there.
    """
    if ".parametrizations." in f".{path}":
        path, _, name = f".{path}".partition(".parametrizations.")
        path = path.lstrip(".")
    if name.startswith(("weight", "in_proj_weight")):
        return path or "(root)"
    return f"{path}.{name}" if path else name


def text_of(units: Sequence[Unit]) -> str:
    """Return units as a site's name shows them: ``0:16``; a layer's path before them where there are several."""
    by_layer = [(layer, [unit for _, unit in group]) for layer, group in itertools.groupby(units, lambda unit: unit[0])]
    texts = []
    for layer, numbers in by_layer:
        runs: list[list[int]] = []
        for number in numbers:
            step = number - runs[-1][-1] if runs else 0
            if runs and step > 0 and (len(runs[-1]) == 1 or step == runs[-1][1] - runs[-1][0]):
                runs[-1].append(number)
            else:
                runs.append([number])
        shown = [
            f"{run[0]}"
            if len(run) == 1
            else f"{run[0]}:{run[-1] + 1}" + (f":{s}" if (s := run[1] - run[0]) > 1 else "")
            for run in runs
        ]
        starts = [run[0] for run in runs]
        if (
            len(runs) > 3
            and len({len(run) for run in runs}) == len({b - a for a, b in itertools.pairwise(starts)}) == 1
        ):
            shown[2:-1] = ["..."]
        texts.append(f"{layer}:{','.join(shown)}" if len(by_layer) > 1 else ",".join(shown))
    return ",".join(texts)


Grads = Sequence[Tensor | None]


def _only(chosen: Sequence[int]) -> Callable[[Grads, Any], tuple[Tensor | None, ...]]:
    """Return a hook of a node that lets gradients pass to these inputs."""

    def hook(grads: Grads, _: Any) -> tuple[Tensor | None, ...]:
        return tuple(
            grad if grad is None or index in chosen else torch.zeros_like(grad) for index, grad in enumerate(grads)
        )

    return hook


def _first_half(dim: int) -> Callable[[Grads, Any], tuple[Tensor | None, ...]]:
    """Return a hook of a GLU that lets gradients pass to what is gated."""

    def hook(grads: Grads, _: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        gated, gate = grad.chunk(2, dim)
        return (torch.cat([gated, torch.zeros_like(gate)], dim),)

    return hook


def _per_unit(grad: Tensor, axes: Sequence[int]) -> Tensor:
    """Return which units received a gradient, ``(N,)``."""
    axes = [axis % grad.dim() for axis in axes]
    others = [dim for dim in range(grad.dim()) if dim not in axes]
    return grad.permute(*axes, *others).reshape(math.prod(grad.shape[axis] for axis in axes), -1).ne(0).any(1)
