"""Find the dimension of an activation tensor that holds the neurons, and how it is known.

The first of these that applies: *declared* by the user; *producer*, the last weighted call upstream of the activation,
with its axis tracked through the transposes, views and elementwise operations in between (a convolution or a batch norm
puts neurons on axis 1; a linear layer, a layer norm or a matrix product on the last axis); *nearest*, the last weighted
call of the forward, even if the activation does not depend on it; *assumed* from the number of dimensions.

A :class:`NeuronFlow` watches one forward and knows the neuron axis of every tensor in it. It uses shapes only, and
``torch.compile`` can trace it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuronscope.attach.dtensor import NeuronShard, is_distributed, is_later_shard, local_tensor, neuron_shard
from neuronscope.attach.tensor_map import TensorMap
from neuronscope.attach.torch_functions import spellings

__all__ = ["NeuronAxis", "NeuronFlow", "assume"]


class NeuronAxis(NamedTuple):
    """Where the neurons of a tensor lie.

    Attributes:
        axis: Dimension of the neurons, counted from the left, ≥ 0.
        source: ``declared``, ``producer (conv2d)``, ``nearest producer (linear)`` or ``assumed (rank)``.
        mixed: One index is a different neuron at different positions, for instance if the weights are a stack of
            experts.
        shard: Which neurons of the layer this rank holds, if ranks share the layer (tensor parallelism).
    """

    axis: int
    source: str
    mixed: bool = False
    shard: NeuronShard = NeuronShard()


def assume(dimensions: int) -> NeuronAxis:
    """Return the axis to assume if no weighted call was seen: 1 for 2, 4 and 5 dimensions, otherwise the last.

    >>> assume(4).axis, assume(3).axis
    (1, 2)
    """
    return NeuronAxis(1 if dimensions in (2, 4, 5) else max(dimensions - 1, 0), "assumed (rank)")


class _Producer(NamedTuple):
    """A weighted call: where it puts its neurons, and its name as a source.

    Attributes:
        from_right: Dimension of the neurons, counted from the right (1 = last), or from the left if it is negative
            (−2 = axis 1).
        source: As in :class:`NeuronAxis`.
    """

    from_right: int
    source: str

    def layout(self, rank: int) -> NeuronAxis:
        """Return the axis for an output with ``rank`` dimensions."""
        place = self.from_right
        return NeuronAxis(max(rank - place, 0) if place > 0 else min(-place - 1, rank - 1), self.source)


def _producers() -> dict[Callable[..., Any], _Producer]:
    """Return every weighted call of torch; the axis of a convolution counts from the right, for unbatched input."""
    matrix_products = ("matmul", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "addmv")
    recurrent = tuple(f"{name}{cell}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell"))
    grouped = ("grouped_mm", "_grouped_mm")
    last = ("linear", "bilinear", "layer_norm", "rms_norm", "embedding", "embedding_bag", "einsum", *recurrent)
    attention = ("scaled_dot_product_attention", "multi_head_attention_forward")
    places = {
        **{f"{stem}{n}d": n + 1 for stem in ("conv", "conv_transpose") for n in (1, 2, 3)},
        **dict.fromkeys(("batch_norm", "instance_norm", "group_norm"), -2),
        **dict.fromkeys((*last, *grouped, *attention, *matrix_products, "__matmul__", "__rmatmul__"), 1),
    }
    return {
        function: _Producer(place, f"producer ({name.strip('_')})")
        for name, place in places.items()
        for function in spellings(name)
    }


_PRODUCERS = _producers()
# Products of two tensors, either of which may be the weight; a weight on the left puts neurons on the rows.
_MATRIX_PRODUCTS = spellings("matmul", "mm", "bmm", "__matmul__")
# Products whose weight may be one of a stack: a matrix for each batch or row, or the one that the data selects.
_STACKED = _MATRIX_PRODUCTS | spellings("baddbmm")
_PICKABLE = _STACKED | spellings("linear", "einsum")
_PICKS = spellings("index_select", "__getitem__")
_GROUPED = spellings("grouped_mm", "_grouped_mm")
_MIXING = _PICKABLE | _GROUPED
_TRANSPOSES = spellings("transpose", "transpose_", "swapaxes", "swapdims")
_PERMUTES = spellings("permute")
_MOVEDIMS = spellings("movedim", "moveaxis")
_REVERSALS = spellings("t", "t_")
_DROPPING = spellings("mean", "sum", "amax", "amin", "logsumexp", "std", "var", "prod", "select")
_SHAPED = spellings("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_VIEWS = _TRANSPOSES | _PERMUTES | _MOVEDIMS | _REVERSALS | _SHAPED
_CHOOSING = _PICKS | _VIEWS


class NeuronFlow:
    """Tracks the neuron axis of each tensor of one forward, from every torch function called in it.

    Attributes:
        duplicate: Whether another rank was seen to hold the same data and the first shard of a weight.
    """

    def __init__(self) -> None:
        self._layouts: TensorMap[NeuronAxis] = TensorMap("layout")
        self._picked: TensorMap[tuple[bool]] = TensorMap("picked")  # weights that the data selected from a stack
        self._nearest: list[tuple[int, NeuronAxis]] = []  # at most one
        self._made: dict[
            tuple[Callable[..., Any], int], NeuronAxis
        ] = {}  # of each weighted call and number of dimensions
        self._shared: list[
            tuple[torch.Size, int, NeuronShard]
        ] = []  # of what the nearest gave: shape, own neurons, which
        self.duplicate = False  # whether another rank was seen to hold the same data, and the first part of a weight

    def clear(self) -> None:
        """Forget everything, because a forward begins or is over."""
        self._layouts.clear()
        self._picked.clear()
        self._nearest.clear()
        self._shared.clear()

    def of(self, tensor: Tensor) -> NeuronAxis:
        """Return the neuron axis of ``tensor``, with its source. There is always an answer."""
        found = self._layouts.get(tensor)
        if found is not None:
            return found
        layout = assume(tensor.dim())
        if self._nearest and self._nearest[0][0] == tensor.dim():
            nearest = self._nearest[0][1]
            layout = nearest._replace(source=f"nearest {nearest.source}")
        return layout._replace(shard=self.shard(tensor, layout.axis))

    def cache_key(self, tensor: Tensor) -> tuple[Any, ...]:
        """Return all that :meth:`of` and :meth:`shard` depend on, besides the shape of a plain tensor."""
        return self._layouts.get(tensor), *self._nearest, *self._shared

    def shard(self, tensor: Tensor, axis: int) -> NeuronShard:
        """Return which neurons of a tensor this rank holds, if its axis was declared or guessed.

        ``DTensor.to_local`` turns a rank's part into a plain tensor, without its placements. Such a tensor is
        recognized by its size.

        Args:
            tensor: Any tensor ``(…, N, …)``.
            axis: Dimension of the neurons.
        """
        if tensor.dim() <= axis:
            return NeuronShard()
        if is_distributed(tensor):
            return neuron_shard(tensor, axis)
        if not self._shared:
            return NeuronShard()
        shape, own, shard = self._shared[0]
        neurons = tensor.shape[axis]
        if neurons == own < shard.whole:
            return shard
        if neurons == shard.whole and math.prod(tensor.shape) < math.prod(shape):
            return NeuronShard(0, neurons)  # sharded along its positions: each rank has its own
        return NeuronShard()

    def same(self, source: Tensor, result: Any) -> None:
        """Give the result of an elementwise operation the neuron axis of its source.

        Args:
            source: A tensor of any shape.
            result: What was computed from it.
        """
        layout = self._layouts.get(source)
        if layout is not None and isinstance(result, Tensor) and result.dim() == source.dim():
            self._layouts.put(result, layout)

    def follow(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Find the neuron axis of the result of a torch function.

        Args:
            function: The function.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
            result: What the function returned.
        """
        if self._produced(function, result):
            return
        if isinstance(result, Tensor):
            outputs: tuple[Any, ...] = (result,)
        elif isinstance(result, (tuple, list)):
            outputs = tuple(result)
        else:
            return
        producer = _PRODUCERS.get(function)
        if producer is not None and outputs and isinstance(outputs[0], Tensor) and outputs[0].dim() > 0:
            rank = outputs[0].dim()
            if function in _MATRIX_PRODUCTS and _weight_is_left(args):
                producer = producer._replace(from_right=2)
            layout = producer.layout(rank)._replace(mixed=function in _MIXING and self._mixes(function, args))
            self._shared.clear()
            if is_distributed(outputs[0]):
                layout = layout._replace(shard=neuron_shard(outputs[0], layout.axis))
                self._shared.append((outputs[0].shape, local_tensor(outputs[0]).shape[layout.axis], layout.shard))
                weights = (value for value in (*args, *kwargs.values()) if isinstance(value, nn.Parameter))
                self.duplicate = self.duplicate or any(is_later_shard(weight) for weight in weights)
            self._layouts.put(outputs[0], layout)
            self._nearest[:] = [(rank, layout)]
            return
        if function in _CHOOSING and self._picks(function, args):
            for output in outputs:
                self._picked.put(output, (True,))
            return
        origin = _first_known(args, self._layouts)
        if origin is None:
            return
        tensor, layout = origin
        for output in outputs:
            if isinstance(output, Tensor) and output.dim() > 0 and not output.is_nested:
                try:
                    carried = _carry(function, args, kwargs, layout.axis, tensor, output)
                except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                    carried = None  # an unknown way to call it (named dimensions, say): no axis
                if carried is not None:
                    if is_distributed(output):
                        layout = layout._replace(shard=neuron_shard(output, carried))
                    self._layouts.put(output, layout if carried == layout.axis else layout._replace(axis=carried))

    def _produced(self, function: Callable[..., Any], result: Any) -> bool:
        """Handle the most frequent calls quickly: weighted ones whose axis follows from the output's rank alone."""
        if type(result) is not Tensor or self._picked.maybe_any():
            return False
        rank = result.dim()
        layout = self._made.get((function, rank))
        if layout is None:
            producer = _PRODUCERS.get(function)
            if producer is None or function in _STACKED or function in _GROUPED or not rank:
                return False
            layout = self._made[function, rank] = producer.layout(rank)
        self._shared.clear()
        self._layouts.put(result, layout)
        self._nearest[:] = [(rank, layout)]
        return True

    def _picks(self, function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Whether a call selects some matrices of a weight by data, or passes such a selection on."""
        weight = args[0] if args else None
        if not isinstance(weight, Tensor):
            return False
        if function in _PICKS:
            return isinstance(weight, nn.Parameter) and weight.dim() > 2 and _any_tensor(args[1:])
        return function in _VIEWS and self._picked.get(weight) is not None

    def _mixes(self, function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Whether a weighted call applies different weights at different positions."""
        if function in _GROUPED:
            return True
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if self._picked.maybe_any() and any(self._picked.get(tensor) is not None for tensor in tensors):
            return True
        return function in _STACKED and any(_is_stack(tensor) for tensor in tensors)


def _is_stack(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.dim() > 2 and math.prod(tensor.shape[:-2]) > 1


def _any_tensor(index: tuple[Any, ...]) -> bool:
    return any(isinstance(part, Tensor) or (isinstance(part, tuple) and _any_tensor(part)) for part in index)


def _weight_is_left(args: tuple[Any, ...]) -> bool:
    left, right = args[:2] if len(args) > 1 else (None, None)
    return isinstance(left, nn.Parameter) and left.dim() > 1 and not isinstance(right, nn.Parameter)


def _first_known(args: tuple[Any, ...], layouts: TensorMap[NeuronAxis]) -> tuple[Tensor, NeuronAxis] | None:
    """Return the argument whose axis the result inherits: the first known one of the highest rank."""
    best: tuple[Tensor, NeuronAxis] | None = None
    for arg in args:
        for tensor in arg if isinstance(arg, (tuple, list)) else (arg,):
            known = isinstance(tensor, Tensor) and not tensor.is_nested
            if known and (best is None or tensor.dim() > best[0].dim()):
                layout = layouts.get(tensor)
                if layout is not None:
                    best = (tensor, layout)
    return best


def _numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any], *names: str) -> list[int]:
    """Return the integers among the arguments after the tensor, flat, by position or by name."""
    flat: list[int] = []
    for value in (*args[1:], *(kwargs[name] for name in names if name in kwargs)):
        flat.extend(value if isinstance(value, (tuple, list)) else (value,))
    return [number for number in flat if isinstance(number, int) and not isinstance(number, bool)]


def _carry(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    axis: int,
    before: Tensor,
    after: Tensor,
) -> int | None:
    """Return the neuron axis of ``after``, computed from ``before`` with neurons along ``axis``; ``None`` if lost."""
    rank = before.dim()
    if after.dim() == rank and function not in _VIEWS and getattr(function, "__name__", "") != "__get__":
        return axis
    if function in _TRANSPOSES:
        a, b = (number % rank for number in _numbers(args, kwargs, "dim0", "dim1", "axis0", "axis1"))
        return b if axis == a else a if axis == b else axis
    if function in _PERMUTES:
        return [number % rank for number in _numbers(args, kwargs, "dims")].index(axis)
    if function in _MOVEDIMS:
        return _moved(args, kwargs, axis, rank)
    if function in _REVERSALS or getattr(function, "__self__", None) in (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH):
        return {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis, axis) if rank > 1 else axis
    if function in _SHAPED:
        return _reshaped(axis, before.shape, after.shape)
    if after.dim() == rank:
        return axis
    if function in _DROPPING:
        dropped = {number % rank for number in _numbers(args, kwargs, "dim", "axis")[: rank - after.dim()]}
        return None if axis in dropped else axis - sum(1 for number in dropped if number < axis)
    return _by_size(axis, before.shape, after.shape)


def _moved(args: tuple[Any, ...], kwargs: Mapping[str, Any], axis: int, rank: int) -> int:
    source = args[1] if len(args) > 1 else kwargs["source"]
    target = args[2] if len(args) > 2 else kwargs["destination"]
    sources: list[int] = [s % rank for s in (source if isinstance(source, (tuple, list)) else (source,))]
    targets: list[int] = [t % rank for t in (target if isinstance(target, (tuple, list)) else (target,))]
    if axis in sources:
        return targets[sources.index(axis)]
    free = [dimension for dimension in range(rank) if dimension not in targets]
    return free[[dimension for dimension in range(rank) if dimension not in sources].index(axis)]


def _reshaped(axis: int, before: torch.Size, after: torch.Size) -> int | None:
    """Return the neuron axis after a view: the dimension of the same stride, or the one that it was merged into.

    If the neuron axis was split, as in (features → heads × head size), the innermost part is taken.
    """
    if len(before) == len(after) and before[axis] == after[axis] and before == after:
        return axis
    outer, size = math.prod(before[:axis]), before[axis]
    inner = math.prod(before[axis + 1 :])
    covered = 1
    for dimension, length in enumerate(after):
        rest = math.prod(after[dimension + 1 :])
        if length == size and covered == outer and rest == inner:
            return dimension
        covered *= length
    for dimension in reversed(range(len(after))):  # the innermost dimension that contains the neurons' stride
        rest = math.prod(after[dimension + 1 :])
        if after[dimension] > 1 and rest <= inner < rest * after[dimension]:
            return dimension
    return None


def _by_size(axis: int, before: torch.Size, after: torch.Size) -> int | None:
    """Return the neuron axis after a change of rank: the dimension of the same size nearest to its place."""
    from_right = len(before) - axis
    for candidate in (len(after) - from_right, axis):
        if 0 <= candidate < len(after) and after[candidate] == before[axis]:
            return candidate
    same = [dimension for dimension, size in enumerate(after) if size == before[axis]]
    return same[0] if len(same) == 1 else None
