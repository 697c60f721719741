"""Find the layers of a checkpoint: which tensors are weight and bias of a layer, and along which axis its neurons lie.

Only names, shapes and order are used; no tensor is read. Row ``i`` of a layer holds the weights into its neuron ``i``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from neuronscope.attach.layer_names import layer_name
from neuronscope.checkpoints.checkpoint import StoredTensor

__all__ = [
    "NEURON_KINDS",
    "Layer",
    "find_layers",
    "find_projections",
    "is_parameter",
    "normalised_layers",
    "unexamined_types",
]

#: Kinds of layers whose rows are neurons; the other kinds are ``norm``, ``embedding`` and ``experts``.
NEURON_KINDS = ("linear", "conv")

#: Possible names of a weight in its module; and if weight norm splits the weight, the name of the magnitudes.
_WEIGHTS = {
    "weight": "",
    "parametrizations.weight.original1": "parametrizations.weight.original0",
    "parametrizations.weight.original": "",
    "weight_v": "weight_g",
    "weight_orig": "",
}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_EMBEDDING = re.compile(
    r"(^|[._])(w[tp]e|emb|embed|embeddings?|embed_tokens)([._]|$)|(^|\.)(shared|relative_attention_bias)$"
)
_ADAPTER = re.compile(r"(^|\.)lora_")
_EXPERTS = re.compile(r"(^|[._])experts?([._]|$)")
#: Paths of layers whose rows go through no activation, by the names that they have in common networks: the projections
#: of attention, and the one that leads out of a block of two layers.
_PROJECTION = re.compile(
    r"(^|[._])((qkv|[qkvo])_proj|[qkv]_lin|out_lin|to_[qkv]|to_out(\.0)?|w?qkv|c_attn|query|key|value|query_key_value|"
    r"w[qkvo]|down_proj|(attention|attn|self|mlp)\.(out_proj|c_proj|proj)|output\.dense|SelfAttention\.[qkvo]|"
    r"EncDecAttention\.[qkvo])$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Layer:
    """A layer of ``N`` rows.

    >>> layer = Layer("fc", "linear", "fc.weight", None, None, width=3, axis=1, inputs=2)
    >>> import torch
    >>> layer.rows(torch.arange(6).view(2, 3)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """

    path: str  # path of the layer; see ``neuronscope.attach.layer_names.layer_name``. It is that of a site's layer.
    kind: str  # ``linear``, ``conv``, ``norm``, ``embedding``, or ``experts`` (several layers stacked in one tensor)
    weight: str  # name of the weight in the checkpoint
    bias: str | None  # name of the bias ``(N,)``, or ``None``
    gain: str | None  # name of the magnitudes ``(N, 1, …)`` if weight norm splits them from the weight, else ``None``
    width: int  # ``N``
    #: Dimension of the weight along which the rows lie: 0, or 1 if it is stored transposed (the ``Conv1D`` of GPT-2, a
    #: transposed convolution).
    axis: int
    inputs: int  # size of the weight's other leading dimension: input features, or input channels of a group
    axis_known: bool = True  # true if shapes determine ``axis``; else it is the usual one

    @property
    def incoming(self) -> tuple[str, ...]:
        """Names of the tensors that belong to the rows: weight, magnitudes and bias."""
        return tuple(name for name in (self.weight, self.gain, self.bias) if name is not None)

    def rows(self, tensor: Tensor) -> Tensor:
        """Reshape one of the :attr:`incoming` tensors to one row per neuron: ``(N, fan-in)``."""
        if tensor.dim() > 1 and self.axis:
            tensor = tensor.transpose(0, self.axis)
        return tensor.reshape(self.width, -1)

    def columns(self, weight: Tensor) -> Tensor:
        """Reshape the weight to one row per input feature or channel: ``(inputs, the rest)``."""
        return weight.transpose(0, 1 - self.axis).reshape(self.inputs, -1)


def _is_floating(tensor: StoredTensor) -> bool:
    return "float" in tensor.dtype


def is_parameter(name: str, tensor: StoredTensor) -> bool:
    """Whether a tensor may be a parameter by its name and dtype: it is not a running statistic or a counter.

    Args:
        name: Its name in the checkpoint.
        tensor: The tensor.
    """
    return _is_floating(tensor) and not name.endswith(_STATISTICS)


def find_layers(tensors: Mapping[str, StoredTensor]) -> tuple[Layer, ...]:
    """Return the layers of a network in the order of the file.

    Weights without the name of a layer's weight are left out: the stacked gates of a recurrent layer, attention's
    ``in_proj_weight``, adapters.
    """
    found = []
    transposed = _Transposed(tensors)
    for name, tensor in tensors.items():
        if not _is_floating(tensor) or _ADAPTER.search(name) or not all(tensor.shape):
            continue
        if _EXPERTS.search(name) and len(tensor.shape) == 3:
            module, _, leaf = name.rpartition(".")
            found.append(
                Layer(layer_name(module, leaf), "experts", name, None, None, tensor.shape[0], 0, tensor.shape[1])
            )
            continue
        parts = _split(name, tensors)
        if parts is not None:
            layer = _layer(name, *parts, tensors, transposed)
            if layer is not None:
                found.append(layer)
    return tuple(found)


def unexamined_types(tensors: Mapping[str, StoredTensor]) -> dict[str, list[str]]:
    """Return the names of weights and biases that are not floating-point (integer or complex), by dtype."""
    found: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if not _is_floating(tensor) and (_split(name, tensors) is not None or name.rpartition(".")[2] == "bias"):
            found.setdefault(tensor.dtype, []).append(name)
    return found


def normalised_layers(layers: Sequence[Layer]) -> set[str]:
    """Return the paths of layers with a norm of their size directly before or after them in the file."""
    found = set()
    for first, second in pairwise(layers):
        if second.kind == "norm" and first.kind in NEURON_KINDS and second.width == first.width:
            found.add(first.path)
        if first.kind == "norm" and second.kind in NEURON_KINDS and first.width == second.inputs:
            found.add(second.path)
    return found


def find_projections(
    layers: Sequence[Layer], networks: Sequence[str] = (), *, is_ordered: bool = True
) -> dict[str, str]:
    """Return the layers whose rows most likely go through no activation, as far as order, names and sizes show it.

    Each is a ``projection``, or the ``output``: the last layer of a network, unless a norm follows it or a later
    layer has as many inputs as it has rows; in no known order see :func:`_last_unread`.

    Args:
        layers: The checkpoint's layers, in the order of the file.
        networks: With several networks, what the paths of each one's layers begin with.
        is_ordered: Whether that is the order of the network; else the file holds one network.
    """
    found = {
        layer.path: "projection" for layer in layers if layer.kind in NEURON_KINDS and _PROJECTION.search(layer.path)
    }
    if not is_ordered:
        output = _last_unread(layers, found)
        return found if output is None else {**found, output.path: "output"}
    last = {
        next((name for name in networks if layer.path.startswith(f"{name}.")), ""): number
        for number, layer in enumerate(layers)
    }
    for number in last.values():
        layer = layers[number]
        is_read = any(later.inputs == layer.width for later in layers[number + 1 :])
        if layer.kind in NEURON_KINDS and not is_read:
            found[layer.path] = "output"
    return found


def _last_unread(layers: Sequence[Layer], projections: Container[str]) -> Layer | None:
    """Return the last layer that no other one reads, as far as sizes show it; projections are not looked at.

    A layer may read several outputs of each row (a flattened picture, a concatenation) or a part of the rows (a gate).
    Small numbers divide others by chance: so a layer whose width fits no other one's inputs in this way is taken first,
    and then one whose width, or half of it, is not another one's inputs.
    """
    inputs = Counter(layer.inputs for layer in layers if layer.inputs > 1)
    candidates = [layer for layer in layers[::-1] if layer.kind in NEURON_KINDS and layer.path not in projections]
    for is_wide in (True, False):
        for layer in candidates:
            others = (size for size, number in inputs.items() if number > 1 or size != layer.inputs)
            width = layer.width
            if not any(
                width in (size, 2 * size) or (is_wide and not (size % width and width % size)) for size in others
            ):
                return layer
    return None


def _split(name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, str | None] | None:
    """Return a weight's module path and the name of its magnitudes; ``None`` if the tensor is not a weight."""
    for leaf, gain in _WEIGHTS.items():
        if name != leaf and not name.endswith("." + leaf):
            continue
        path = name[: -len(leaf)].removesuffix(".")
        magnitudes = _join(path, gain) if gain else None
        if magnitudes is not None and magnitudes not in tensors:
            continue  # `weight_v` without its magnitudes is a buffer of spectral norm
        return path, magnitudes
    return None


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _layer(
    name: str, path: str, gain: str | None, tensors: Mapping[str, StoredTensor], transposed: _Transposed
) -> Layer | None:
    shape = tensors[name].shape
    layer, bias_name = layer_name(path, "weight"), _join(path, "bias")
    bias = tensors.get(bias_name)
    size = bias.shape[0] if bias is not None and len(bias.shape) == 1 and _is_floating(bias) else None
    if len(shape) == 1:
        return Layer(layer, "norm", name, bias_name if size == shape[0] else None, None, shape[0], 0, 1)
    if not 2 <= len(shape) <= 5:
        return None
    if len(shape) == 2 and size is None and _EMBEDDING.search(path):
        return Layer(layer, "embedding", name, None, None, shape[0], 0, shape[1])
    kind = "linear" if len(shape) == 2 else "conv"
    axis, axis_known = transposed.axis(path, shape, size)
    if axis is None or (gain is not None and tensors[gain].shape[:1] != (shape[axis],)):
        return None
    own_bias = bias_name if size == shape[axis] else None
    return Layer(layer, kind, name, own_bias, gain, shape[axis], axis, shape[1 - axis], axis_known)


class _Transposed:
    """Decides which weights are stored transposed: by the bias's size, else by layers of the same name or rank."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._by_leaf: Counter[tuple[int, str, int]] = Counter()
        self._by_rank: Counter[tuple[int, int]] = Counter()
        for name, tensor in tensors.items():
            path = name.removesuffix("weight").removesuffix(".")
            bias = tensors.get(_join(path, "bias"))
            shape = tensor.shape
            if name.endswith("weight") and len(shape) > 1 and bias is not None and len(bias.shape) == 1:
                axis = _axis(shape, bias.shape[0])
                if axis is not None:
                    self._by_leaf[len(shape), _leaf(path), axis] += 1
                    self._by_rank[len(shape), axis] += 1

    def axis(self, path: str, shape: tuple[int, ...], bias: int | None) -> tuple[int | None, bool]:
        """Return the dimension of the rows and whether it is certain; ``None`` if the bias fits neither dimension."""
        if bias is not None and bias not in shape[:2]:
            return None, False
        known = None if bias is None else _axis(shape, bias)
        if known is not None:
            return known, True
        if bias is None:  # a `Conv1D` has a bias; a convolution without bias is rarely transposed
            return 0, len(shape) == 2
        for votes in (
            [self._by_leaf[len(shape), _leaf(path), axis] for axis in (0, 1)],
            [self._by_rank[len(shape), axis] for axis in (0, 1)],
        ):
            if any(votes) and not all(votes):
                return int(votes[1] > 0), True
        return 0, False


def _axis(shape: tuple[int, ...], bias: int) -> int | None:
    """Return which of the first two dimensions has the bias's size; ``None`` if both or neither have it."""
    fits = [dimension for dimension in (0, 1) if shape[dimension] == bias]
    return fits[0] if len(fits) == 1 else None


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
