"""Find the layer that a weight belongs to: the module that holds it, by the path that names the layer.

A weight is recognised by identity. A weight that several modules share belongs to the module that is running, and so
does a tensor that took the place of a parameter (FSDP, ``torch.func.functional_call``): the module is looked for among
the callers of the function that received the weight.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Container, Iterable, Iterator
from types import FrameType

from torch import Tensor, nn
from torch.autograd.graph import Node

from neuronscope.attach.compiling import traced_modules
from neuronscope.attach.module_paths import walk
from neuronscope.sites import NAMES_EXPERTS, expert_number

__all__ = ["LayerNames", "lacking_layers", "layer_name"]

#: The dimension of the weight that indexes the units, from the end, by class of a module.
_OWN_SIDES = {
    nn.Linear: -2,
    nn.Conv1d: -3,
    nn.Conv2d: -4,
    nn.Conv3d: -5,
    nn.ConvTranspose1d: -2,
    nn.ConvTranspose2d: -3,
    nn.ConvTranspose3d: -4,
}
#: How many frames lie between a torch function and the module that called it, at most.
_FARTHEST = 8


def layer_name(path: str, name: str) -> str:
    """Return the name of the layer of a parameter.

    Args:
        path: Path of the module that holds it.
        name: Its name in the module.

    >>> layer_name("fc", "weight"), layer_name("block", "w1"), layer_name("", "w1")
    ('fc', 'block.w1', 'w1')
    >>> layer_name("fc.parametrizations.weight", "original0"), layer_name("rnn", "weight_hh_l0")
    ('fc', 'rnn')
    """
    module, parametrized, rest = path.partition("parametrizations.")
    if parametrized and (not module or module.endswith(".")):
        path, name = module.rstrip("."), rest.partition(".")[0]
    if name.startswith(("weight", "running_mean", "in_proj_weight", "all_weights")):
        return path or "(root)"
    return f"{path}.{name}" if path else name


def lacking_layers(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return those of some names of layers, or of places of activations, that a model does not have.

    Args:
        model: The model.
        layers: The names; ``a+b`` for two layers.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> lacking_layers(net, ["0", "1", "relu()", "0(0:1)", "0(transposed)", "0+2", "block.relu()", "0.scale"])
    ['0+2', 'block.relu()', '0.scale']
    """
    modules = dict(walk(model))

    def has(path: str) -> bool:
        if path.endswith(")") and not path.endswith("()"):  # a part of a weight, or its other direction
            path = path.partition("(")[0]
        parent, _, name = path.rpartition(".")
        if path in modules or path == "(root)":
            return True
        if parent not in modules:  # a matrix of a stack bears its number
            return name.isdigit() and bool(parent) and has(parent)
        held = modules[parent]
        if name.endswith("()") or any(name in place for place in (held._parameters, held._buffers, vars(held))):
            return True
        parametrizations = held._modules.get("parametrizations")
        return parametrizations is not None and name in parametrizations._modules

    return [layer for layer in layers if not all(has(path) for path in layer.split("+"))]


def _running_modules(frame: FrameType | None) -> Iterator[nn.Module]:
    """Yield the modules whose methods run, the innermost first, as far as they are near.

    Args:
        frame: The frame that called a torch function.
    """
    traced = traced_modules()
    if traced is not None:
        yield from traced
        return
    for _ in range(_FARTHEST):
        if frame is None:
            return
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            yield module
        frame = frame.f_back


def _name_in(module: nn.Module, tensor: Tensor) -> str | None:
    for held in (module._parameters, module._buffers, vars(module)):
        for name, value in held.items():
            if value is tensor:
                return name
    return None


def layers_before(
    node: Node, layers: Container[str], names: LayerNames, most: int = 50
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the layers that lie next before a node of autograd's graph, the node itself included.

    Args:
        node: The node.
        layers: The layers to look for.
        names: The layers of the model's weights.
        most: How many nodes to look at.

    Returns:
        The layers; other layers whose weights the node itself was given; and the names of the nodes in between, those
        of the layers not included.
    """
    found: dict[str, None] = {}
    between: list[str] = []
    hidden = tuple(layer for child in _children(node) if (layer := names.of_node(child)) and layer not in layers)
    queue, seen = [node], {node}
    while queue and len(seen) < most:
        next_node = queue.pop(0)
        children = _children(next_node)
        own = [layer for child in children if (layer := names.of_node(child)) in layers]
        found.update(dict.fromkeys(own))
        if not own:
            between.append(next_node.name())
            queue.extend(child for child in children if child not in seen)
            seen.update(children)
    return tuple(found), hidden, tuple(between)


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


class LayerNames:
    """The layers of a model's weights, by identity.

    Args:
        model: The model.

    Attributes:
        sides: By layer, the dimension of its weight that indexes its units, from the end, where the class of the module
            says it; of other layers :class:`~neuronscope.attach.unit_rules.operation.Operation` notes it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sides: dict[str, int] = {}
        self._layers: dict[int, tuple[weakref.ref[Tensor], str, bool]] = {}
        self._shared: set[int] = set()
        self._shared_layers: set[str] = set()
        self._paths: dict[int, str] = {}
        self._model = weakref.ref(model)
        self.refresh()

    def refresh(self) -> None:
        """Look again at all parameters and buffers of the model, and at tensors in lists of its modules."""
        model = self._model()
        if model is None:
            return
        self._layers.clear()
        self._shared.clear()
        self._shared_layers.clear()
        self._paths.clear()
        for path, module in walk(model):
            self._paths[id(module)] = path
            side = next((side for kind, side in _OWN_SIDES.items() if isinstance(module, kind)), None)
            if side is not None:
                self.sides[layer_name(path, "weight")] = side
            for held, is_weight in ((module._parameters, True), (module._buffers, False)):
                for name, tensor in held.items():
                    if tensor is not None:
                        self._note(path, name, tensor, is_weight)
            for name, values in vars(module).items():
                if name != "_flat_weights" and isinstance(values, (list, tuple)):  # such as the anchors of a detector
                    for value in values:
                        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                            self._note(path, name, value, is_weight=False)

    def _note(self, path: str, name: str, tensor: Tensor, is_weight: bool) -> None:
        known = self._layers.get(id(tensor))
        layer = layer_name(path, name)
        if known is not None and known[0]() is tensor and known[1] != layer:
            self._shared.add(id(tensor))
            self._shared_layers.update((layer, known[1]))
            return
        self._layers[id(tensor)] = (weakref.ref(tensor), layer, is_weight)

    def of(self, tensor: Tensor) -> tuple[str, bool] | None:
        """Return the layer of a parameter or buffer of the model, and whether it is a parameter; else ``None``."""
        known = self._layers.get(id(tensor))
        return known[1:] if known is not None and known[0]() is tensor else None

    def layers(self) -> set[str]:
        """Return the layers of all weights, but for biases."""
        return {layer for _, layer, is_weight in self._layers.values() if is_weight and not layer.endswith("bias")}

    def other_experts(self, layer: str, place: str) -> list[tuple[str, str]]:
        """Return the layers of the other experts of a mixture that are like that of one, whether they ran or not.

        Experts are the modules of one ``ModuleList``, or the matrices of one stack, whose path names experts.

        Args:
            layer: Path of the layer of one expert.
            place: Place of an activation behind it: the path of a module, or the function in a module.

        Returns:
            The layer of each other expert, and the place of its activation.
        """
        numbered, model = expert_number(layer), self._model()
        if numbered is None or model is None:
            return []
        start, stop, number = numbered
        if not NAMES_EXPERTS.search(layer[:start]):
            return []
        weights = [(known, weight()) for weight, known, is_weight in self._layers.values() if is_weight]
        shapes = {known: weight.shape for known, weight in weights if weight is not None}
        stack = shapes.get(layer[: start - 1], ()) if layer not in shapes and stop == len(layer) else ()
        if len(stack) > 2:
            return [(f"{layer[:start]}{each}", place) for each in range(stack[0]) if each != number]
        modules = dict(walk(model))
        holder = modules.get(layer[: start - 1])
        if layer not in shapes or not isinstance(holder, nn.ModuleList):
            return []
        found = []
        for each in range(len(holder)):
            other = f"{layer[:start]}{each}{layer[stop:]}"
            where = f"{layer[:start]}{each}{place[stop:]}" if place.startswith(layer[:stop]) else place
            alike = type(modules.get(where)) is type(modules.get(place)) and shapes.get(other) == shapes[layer]
            if each != number and alike:
                found.append((other, where))
        return found

    def of_node(self, node: Node | None) -> str:
        """Return the layer of the weight that a node of autograd's graph gives, or a view of it; else ``""``."""
        for _ in range(_FARTHEST):
            if node is None:
                return ""
            weight = getattr(node, "variable", None)
            if weight is not None:
                layer, is_weight = self.of(weight) or ("", False)
                return layer if is_weight and not (layer.endswith("bias") or self.is_shared(weight)) else ""
            children = _children(node)
            if len(children) != 1 or node.name().startswith("Embedding"):
                return ""
            node = children[0]
        return ""

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether several modules hold a parameter, so that the running one must be asked for."""
        return id(tensor) in self._shared

    def shared_layers(self) -> set[str]:
        """Return the layers that hold a parameter or buffer which another one holds too."""
        return self._shared_layers

    def running(self, tensor: Tensor, depth: int = 1) -> str | None:
        """Return the layer of a tensor in the module that runs now and holds it, or ``None``.

        Args:
            tensor: The tensor.
            depth: How many frames lie between the caller and the function that received the tensor.
        """
        for module in _running_modules(sys._getframe(depth)):
            name = _name_in(module, tensor)
            if name is not None:
                if id(module) not in self._paths:
                    self.refresh()
                path = self._paths.get(id(module))
                return None if path is None else layer_name(path, name)
        return None
