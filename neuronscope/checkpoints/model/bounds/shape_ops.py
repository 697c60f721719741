"""How intervals pass through functions that move elements, choose among them, or add them up with positive weights.

All of these never fall in any of their inputs, so that a bound is what the function itself makes of the bounds: views,
permutations, slices, concatenation, padding, pooling, means, sums, interpolation. Those that only move elements
(:data:`MOVES`) serve the search for neurons that nobody reads too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuronscope.checkpoints.model.bounds.interval import Interval, gamma, nearly, widened
from neuronscope.checkpoints.model.traced_graph import substitute

__all__ = ["LAYOUT_RULES", "MOVES", "SAME"]

_HOMES = (F, torch, Tensor)


def _named(*names: str) -> frozenset[Callable[..., Any]]:
    found = (getattr(home, name, None) for home in _HOMES for name in names)
    return frozenset(function for function in found if callable(function))


#: What gives its input back, element by element, in evaluation mode or in another type.
SAME = _named(
    *("contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type_as", "cpu", "positive"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("dropout_", "alpha_dropout_", "feature_dropout", "feature_dropout_", "requires_grad_"),
)
_CASTS = _named("to", "float", "double", "half", "bfloat16", "type_as", "cpu")
_DROPOUTS = frozenset(function for function in SAME if "dropout" in getattr(function, "__name__", ""))

#: What moves elements to other places, leaves some out, doubles some or puts constants between them.
MOVES = _named(
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"),
    *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint"),
    *("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "roll", "flip"),
    *("narrow", "select", "chunk", "split", "tensor_split", "unbind", "index_select", "__getitem__"),
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "pad"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold"),
) | {getattr(Tensor, name).__get__ for name in ("T", "mT")}

# What chooses among elements; and what adds them up, which rounds.
_CHOICES = _named(
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("amax", "amin", "maximum", "minimum", "max", "min", "cummax"),
)
_SUMS = _named(
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("mean", "sum", "cumsum"),
)
_POSITIVE_MODES = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")


def _identity(function: Callable[..., Any]) -> Callable[..., Any]:
    def rule(dtype: torch.dtype, *args: Any, **kwargs: Any) -> Interval | None:
        x = args[0] if args else kwargs.get("input")
        if function in _DROPOUTS and (args[2] if len(args) > 2 else kwargs.get("training", True)):
            return None
        if not isinstance(x, Interval):
            return None
        # What is known of rows counts on the rounding of one type.
        return nearly(replace(x, normed=None) if function in _CASTS else x, dtype)

    return rule


def _carried(function: Callable[..., Any], *, rounds: bool) -> Callable[..., Any]:
    def rule(dtype: torch.dtype, *args: Any, **kwargs: Any) -> list[Interval] | None:
        kwargs.pop("dtype", None)
        if any(isinstance(argument, torch.dtype) for argument in args):
            return None  # a view of the same bits as another type
        given = _intervals((args, kwargs))
        terms = max((math.prod(x.shape[1:]) for x in given), default=0)
        relative = gamma(terms, dtype) if rounds else 0.0
        lows, highs = (_called(function, args, kwargs, side, relative) for side in (0, 1))
        ground = given[0].ground if len(given) == 1 else given[0].ground if _alike(given) else None
        found = [
            Interval(low, high, tuple(low.shape)) if ground is None else Interval(low, high, tuple(low.shape), ground)
            for low, high in zip(lows, highs, strict=True)
        ]
        if function is F.pad:  # what is put there is rounded
            found = [nearly(made, dtype) for made in found]
        if len(given) == 1 and function in MOVES:
            found = [_rows_kept(given[0], made, function) for made in found]
        return found

    return rule


def _alike(given: list[Interval]) -> bool:
    return len({x.ground for x in given}) == 1


def _rows_kept(before: Interval, after: Interval, function: Callable[..., Any]) -> Interval:
    """Views that leave the last axis alone leave what is known of its rows."""
    name = getattr(function, "__name__", "")
    kept = name in ("view", "reshape", "flatten", "unflatten", "expand", "repeat_interleave") and (
        after.shape[-1:] == before.shape[-1:]
    )
    if before.normed is None or not kept:
        return after
    return Interval(after.low, after.high, after.shape, after.ground, before.normed)


def _intervals(tree: Any) -> list[Interval]:
    found: list[Interval] = []
    substitute(tree, lambda leaf: found.append(leaf) if isinstance(leaf, Interval) else None)
    return found


def _called(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], side: int, relative: float
) -> list[Tensor]:
    """What the function makes of the lower (0) or the upper (1) bounds."""

    def end(leaf: Any) -> Any:
        if not isinstance(leaf, Interval):
            return leaf
        bound = (leaf.full_low, leaf.full_high)[side].contiguous()  # as a view may want it
        return widened(bound, bound, relative)[side] if relative else bound

    args, kwargs = substitute((args, dict(kwargs)), end)
    result = function(*args, **kwargs)
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [part.double() for part in parts]


def _interpolate(dtype: torch.dtype, *args: Any, **kwargs: Any) -> list[Interval] | None:
    mode = args[3] if len(args) > 3 else kwargs.get("mode", "nearest")
    if mode not in _POSITIVE_MODES:
        return None
    found: list[Interval] | None = _carried(F.interpolate, rounds=True)(dtype, *args, **kwargs)
    return found


#: Torch function → the rule that stands for it; some give one interval for each tensor that the function gives.
LAYOUT_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    **{function: _identity(function) for function in SAME},
    **{function: _carried(function, rounds=False) for function in MOVES | _CHOICES},
    **{function: _carried(function, rounds=True) for function in _SUMS},
    F.interpolate: _interpolate,
}
