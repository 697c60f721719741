"""Which dimension of an activation tensor holds the neurons, and how we know.

In order: *declared* by the user; *producer*, the last weighted call upstream of the activation (a convolution or a batch
norm puts neurons on axis 1, a linear layer, a layer norm or a matrix product on the last), its axis carried through the
transposes, views and elementwise operations in between; *nearest*, the last weighted call of the forward whatever it fed;
and last *assumed* from the rank.

A :class:`Flow` watches one forward and knows the layout of every tensor in it. It draws on nothing but shapes, and is
written so that ``torch.compile`` can trace it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Flow", "Layout", "TensorMap", "assume"]


class Layout(NamedTuple):
    """Where the neurons of a tensor lie.

    Attributes:
        axis: Dimension of the neurons, counted from the left, ≥ 0.
        source: ``declared``, ``producer (conv2d)``, ``nearest (linear)`` or ``assumed (rank)``.
    """

    axis: int
    source: str


def assume(dimensions: int) -> Layout:
    """The layout to assume where no weighted call was seen: 2, 4 and 5 dimensions → 1, otherwise the last.

    >>> assume(4).axis, assume(3).axis
    (1, 2)
    """
    return Layout(1 if dimensions in (2, 4, 5) else max(dimensions - 1, 0), "assumed (rank)")


class TensorMap:
    """A map from living tensors to what is known of them, keyed by identity; it keeps no tensor alive.

    While ``torch.compile`` traces there are no weak references and no identities that last, so the traced tensors are
    held in a list that is emptied at the end of the forward.
    """

    def __init__(self) -> None:
        self._eager: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        self._traced: list[tuple[Tensor, Any]] = []

    def put(self, tensor: Tensor, value: Any) -> None:
        """Remember ``value`` for ``tensor``."""
        if torch.compiler.is_compiling():
            self._traced.append((tensor, value))
        else:
            self._eager[id(tensor)] = (weakref.ref(tensor), value)

    def get(self, tensor: Tensor) -> Any:
        """What was last remembered for ``tensor``, or ``None``."""
        if torch.compiler.is_compiling():
            found = None
            for known, value in self._traced:
                if known is tensor:
                    found = value
            return found
        entry = self._eager.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def clear(self) -> None:
        """Forget everything."""
        if torch.compiler.is_compiling():
            self._traced = []
        else:
            self._eager.clear()


def _named(*homes_and_names: tuple[Any, tuple[str, ...]]) -> frozenset[Callable[..., Any]]:
    return frozenset(getattr(home, name) for home, names in homes_and_names for name in names if hasattr(home, name))


_SPATIAL_NAMES = {
    dimensions: tuple(f"{stem}{dimensions}d" for stem in ("conv", "conv_transpose")) for dimensions in (1, 2, 3)
}
_SPATIAL: dict[Callable[..., Any], int] = {
    function: dimensions
    for dimensions, names in _SPATIAL_NAMES.items()
    for function in _named((F, names), (torch, names))
}
_CHANNEL_NORMS = _named(
    (F, ("batch_norm", "instance_norm", "group_norm")), (torch, ("batch_norm", "instance_norm", "group_norm"))
)
_LAST = _named(
    (F, ("linear", "bilinear", "layer_norm", "rms_norm", "embedding", "embedding_bag", "scaled_dot_product_attention")),
    (F, ("multi_head_attention_forward",)),
    (torch, ("matmul", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "addmv", "einsum", "layer_norm", "rms_norm")),
    (torch, ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")),
    (torch.Tensor, ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "addmv")),
)
_TRANSPOSES = _named(
    (torch, ("transpose", "swapaxes", "swapdims")),
    (torch.Tensor, ("transpose", "transpose_", "swapaxes", "swapdims")),
)
_PERMUTES = _named((torch, ("permute",)), (torch.Tensor, ("permute",)))
_MOVEDIMS = _named((torch, ("movedim", "moveaxis")), (torch.Tensor, ("movedim", "moveaxis")))
_REVERSALS = _named((torch, ("t",)), (torch.Tensor, ("t", "t_")))
_DROPPING = _named(
    (torch, ("mean", "sum", "amax", "amin", "logsumexp", "std", "var", "prod", "select")),
    (torch.Tensor, ("mean", "sum", "amax", "amin", "logsumexp", "std", "var", "prod", "select")),
)
_SHAPED = _named(
    (torch, ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze")),
    (torch.Tensor, ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")),
)


class Flow:
    """The layouts of the tensors of one forward, kept by following every torch function called in it."""

    def __init__(self) -> None:
        self._layouts = TensorMap()
        self._nearest: tuple[int, Layout] | None = None

    def clear(self) -> None:
        """Forget everything: a forward begins or is over."""
        self._layouts.clear()
        self._nearest = None

    def of(self, tensor: Tensor) -> Layout:
        """The layout of ``tensor``, with its source; never fails."""
        found: Layout | None = self._layouts.get(tensor)
        if found is not None:
            return found
        if self._nearest is not None and self._nearest[0] == tensor.dim():
            axis, source = self._nearest[1]
            return Layout(axis, source.replace("producer", "nearest"))
        return assume(tensor.dim())

    def same(self, source: Tensor, result: Any) -> None:
        """``result`` was made elementwise from ``source``."""
        layout = self._layouts.get(source)
        if layout is not None and isinstance(result, Tensor) and result.dim() == source.dim():
            self._layouts.put(result, layout)

    def follow(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """A torch function was called with ``args`` and gave ``result``: learn the result's layout."""
        if isinstance(result, Tensor):
            outputs: tuple[Any, ...] = (result,)
        elif isinstance(result, (tuple, list)):
            outputs = tuple(result)
        else:
            return
        axis_from_right = _weighted(function, outputs)
        if axis_from_right:
            layout = Layout(outputs[0].dim() - axis_from_right, f"producer ({function.__name__.strip('_')})")
            self._layouts.put(outputs[0], layout)
            self._nearest = (outputs[0].dim(), layout)
            return
        origin = _first_known(args, self._layouts)
        if origin is None:
            return
        tensor, layout = origin
        for output in outputs:
            if isinstance(output, Tensor) and output.dim() > 0:
                axis = _carry(function, args, kwargs, layout.axis, tensor, output)
                if axis is not None:
                    self._layouts.put(output, Layout(axis, layout.source))


def _weighted(function: Callable[..., Any], outputs: tuple[Any, ...]) -> int:
    """The neurons' dimension counted from the right (1 = last) after a weighted call, or 0 for any other call."""
    if not outputs or not isinstance(outputs[0], Tensor) or outputs[0].dim() == 0:
        return 0
    if function in _SPATIAL:
        return _SPATIAL[function] + 1
    if function in _CHANNEL_NORMS:
        return outputs[0].dim() - 1
    return 1 if function in _LAST else 0


def _first_known(args: tuple[Any, ...], layouts: TensorMap) -> tuple[Tensor, Layout] | None:
    """The argument whose layout carries on: the first known one of the highest rank."""
    best: tuple[Tensor, Layout] | None = None
    for arg in args:
        for tensor in arg if isinstance(arg, (tuple, list)) else (arg,):
            if isinstance(tensor, Tensor) and (best is None or tensor.dim() > best[0].dim()):
                layout = layouts.get(tensor)
                if layout is not None:
                    best = (tensor, layout)
    return best


def _numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any], *names: str) -> list[int]:
    """The integers given to a function after its tensor, flat, by position or by name."""
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
    """The neurons' dimension of ``after``, made from ``before`` whose neurons lie along ``axis``; ``None`` if lost."""
    rank = before.dim()
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
    sources = [s % rank for s in (source if isinstance(source, (tuple, list)) else (source,))]
    targets = [t % rank for t in (target if isinstance(target, (tuple, list)) else (target,))]
    if axis in sources:
        return targets[sources.index(axis)]
    free = [dimension for dimension in range(rank) if dimension not in targets]
    return free[[dimension for dimension in range(rank) if dimension not in sources].index(axis)]


def _reshaped(axis: int, before: torch.Size, after: torch.Size) -> int | None:
    """The neurons' dimension after a view: the one that starts at the same stride, or that swallowed it.

    Where the neurons' dimension was split, as in (features → heads × head size), the innermost part is taken.
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
    for dimension in reversed(range(len(after))):  # the innermost dimension that reaches across the neurons' stride
        rest = math.prod(after[dimension + 1 :])
        if after[dimension] > 1 and rest <= inner < rest * after[dimension]:
            return dimension
    return None


def _by_size(axis: int, before: torch.Size, after: torch.Size) -> int | None:
    """The neurons' dimension after an operation that changed the rank: the one of the same size, nearest to its place."""
    from_right = len(before) - axis
    for candidate in (len(after) - from_right, axis):
        if 0 <= candidate < len(after) and after[candidate] == before[axis]:
            return candidate
    same = [dimension for dimension, size in enumerate(after) if size == before[axis]]
    return same[0] if len(same) == 1 else None
