"""Pass intervals through weighted calls: linear layers, convolutions, normalisations, embeddings, attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.model.bounds.interval import (
    LAYER_NORM,
    Interval,
    NormalisedRows,
    NotKnownError,
    Rule,
    gamma,
    product,
    rule,
    widened,
)

__all__ = [
    "addmm",
    "attention",
    "batch_norm",
    "convolution",
    "embedding",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "layer_norm_extremes",
    "linear",
    "matmul",
    "rms_norm",
]

# How many elements of a weight are converted to float64 at a time: 4 MB, which fit into a processor's cache.
_CHUNK = 500_000
# A weight, a bias or a statistic, if there is one.
_Maybe = Tensor | None


def _norm_error(dtype: torch.dtype) -> float:
    """Return the largest relative rounding error of a normalised value, 2e-4 in float32.

    It covers means of up to a hundred standard deviations; beyond, torch's layer norm itself is not accurate.
    """
    return 1750 * torch.finfo(dtype).eps


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, weight[:1].numel()))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _underflow(bound: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """Return what products that underflow may add to a bound; zero where all terms were zero."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return torch.where(bound == 0, 0.0, terms * smallest)


def _combined(
    low: Tensor, high: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, terms: int
) -> tuple[Tensor, Tensor]:
    """Bound ``x @ weight.mT + bias`` by float64 ``(…, N)``, for ``x`` in ``[low, high]``, with each product rounded.

    The weight is ``(N, d)`` or a stack ``(G, N, d)``, the ends are ``(…, d)``. Each sum has so many ``terms``.
    """
    ends = torch.stack(widened(low, high, gamma(terms, dtype)))
    lows, highs = [], []
    for part in _row_chunks(weight) if weight.dim() == 2 else (slice(None),):
        w = weight[part].detach().double()
        up, down = _matmul_with_infinities(ends, w.clamp_min(0).mT), _matmul_with_infinities(ends, w.clamp_max(0).mT)
        lows.append(up[0] + down[1])
        highs.append(up[1] + down[0])
    lowest, highest = torch.cat(lows, dim=-1), torch.cat(highs, dim=-1)
    if bias is not None:
        start, end = widened(bias.detach().double(), bias.detach().double(), gamma(terms, dtype))
        lowest, highest = lowest + start, highest + end
    return lowest - _underflow(lowest, terms, dtype), highest + _underflow(highest, terms, dtype)


def _matmul_with_infinities(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight``, where 0 · ∞ is 0 and all weights have one sign."""
    finite = torch.isfinite(x)
    if bool(finite.all()):
        return torch.matmul(x, weight)
    parts = torch.stack((torch.where(finite, x, 0.0), (x == torch.inf).double(), (x == -torch.inf).double()))
    total: Tensor
    # The sign of `above` and `below` says whether an infinite term counts.
    total, above, below = torch.matmul(parts, weight)
    for reach, infinity in ((above, torch.inf), (below, -torch.inf)):
        total = torch.where(reach == 0, total, total + reach.sign() * infinity)
    return total


@rule
def linear(dtype: torch.dtype, input: Interval, weight: Tensor, bias: Tensor | None = None) -> Interval:
    """Bound ``input @ weight.T + bias``, ``(…, d)`` by ``(N, d)``, more tightly where the input was normalised."""
    if weight.dim() != 2:
        raise NotKnownError
    width = weight.shape[1]
    shape = (*input.shape[:-1], weight.shape[0])
    leading = input.low.shape[:-1]
    low, high = input.low.expand(*leading, width), input.high.expand(*leading, width)
    lowest, highest = _combined(low, high, weight, bias, dtype, width)
    if input.normed is None:
        return Interval(lowest, highest, shape)
    centre, reach = _normed_extremes(input.normed, weight, bias, dtype)
    lowest, highest = torch.maximum(lowest, centre - reach), torch.minimum(highest, centre + reach)
    return Interval(lowest, highest, shape, LAYER_NORM)


def _normed_extremes(
    normed: NormalisedRows, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return centre and reach of each row over all normalised inputs, rounding included; both float64 ``(N,)``."""
    parts = []
    for part in _row_chunks(weight):
        w, b = weight[part].detach(), torch.zeros(()) if bias is None else bias[part].detach()
        centre, reach, size = layer_norm_extremes(normed, w, b)
        offset = w.double().abs() @ normed.shift.abs() + b.double().abs()
        parts.append((centre, reach + _norm_error(dtype) * size + gamma(weight.shape[1], dtype) * (size + offset)))
    centres, reaches = zip(*parts, strict=True)
    return torch.cat(centres), torch.cat(reaches)


def layer_norm_extremes(normed: NormalisedRows, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return centre ``b + w·β``, reach ``√d‖P(w⊙γ)‖`` and size ``√d‖w⊙γ‖`` of each row of a linear layer.

    A row is normalised by its own mean and variance, so that ``Σz = 0`` and ``Σz² ≤ d``. A linear row ``w, b`` gives
    ``b + w·β + (w⊙γ)·z``. Since ``z`` is orthogonal to 1, this is at most the centre plus the reach by Cauchy–Schwarz,
    where ``P`` removes the mean. ``z ∝ P(w⊙γ)`` attains it as the input's scale grows and ε becomes negligible. RMS
    norm is the same without ``P``. Rounding is proportional to the size.

    Args:
        normed: What is known of the inputs, with γ and β ``(d,)``.
        weight: ``(N, d)``.
        bias: ``(N,)``, or a single 0.
    """
    weight = weight.double()
    scaled = weight * normed.scale.double()
    centre = weight @ normed.shift.double() + bias.double()
    root = weight.shape[1] ** 0.5
    size = root * torch.linalg.vector_norm(scaled, dim=1)
    if normed.centred:
        scaled = scaled - scaled.mean(1, keepdim=True)
    return centre, root * torch.linalg.vector_norm(scaled, dim=1), size


@rule
def matmul(dtype: torch.dtype, input: Interval, other: Tensor) -> Interval:
    """Bound ``input @ other``, ``(…, d)`` by ``(d, N)``."""
    return linear(dtype, input, other.mT)


def addmm(
    dtype: torch.dtype, input: Tensor, mat1: Interval, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Interval:
    """Bound ``input + mat1 @ mat2``, ``(N,)`` and ``(B, d)`` by ``(d, N)``; no other factors than 1."""
    if not beta == alpha == 1 or input.dim() != 1:
        raise NotKnownError
    return linear(dtype, mat1, mat2.mT, input)


def convolution(spatial: int, *, transposed: bool = False) -> Rule:
    """Return the rule of a convolution.

    Args:
        spatial: Number of spatial dimensions.
        transposed: Whether it is a transposed one.
    """

    @rule
    def bound(
        dtype: torch.dtype,
        input: Interval,
        weight: Tensor,
        bias: _Maybe = None,
        stride: Any = 1,
        padding: Any = 0,
        fifth: Any = None,  # the dilation; of a transposed convolution, the output's padding
        groups: int = 1,
        *args: Any,
        **kwargs: Any,
    ) -> Interval:
        if len(input.shape) != spatial + 2:
            raise NotKnownError  # without a batch
        taps = weight.flatten(2)  # (O, C/groups, taps)
        numbers = padding if isinstance(padding, (tuple, list)) else (padding,)
        padded = padding == "same" or (padding != "valid" and any(number != 0 for number in numbers))
        if transposed:
            inner, outer = weight.shape[0] // groups, weight.shape[1]
            taps = taps.reshape(groups, inner, outer, -1).transpose(1, 2).reshape(groups * outer, inner, -1)
            padded = True  # which elements of the kernel meet an input depends on the position
        low, high = input.along(1)
        if padded:
            low, high = low.clamp_max(0), high.clamp_min(0)
        low, high = (end.repeat_interleave(taps.shape[2]).view(groups, 1, -1) for end in (low, high))
        by_group = taps.flatten(1).view(groups, len(taps) // groups, -1)
        low, high = _combined(
            low, high, by_group, None if bias is None else bias.view(groups, 1, -1), dtype, taps[0].numel()
        )
        view = (1, -1, *(1 for _ in range(spatial)))  # the caller fills in the sizes of these dimensions
        return Interval(low.view(view), high.view(view), (input.shape[0], len(taps), *view[2:]))

    return bound


@rule
def batch_norm(
    dtype: torch.dtype,
    input: Interval,
    running_mean: _Maybe,
    running_var: _Maybe,
    weight: _Maybe = None,
    bias: _Maybe = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    """Bound batch norm in evaluation mode, an affine map of each channel; none that uses the batch's own statistics."""
    if training or running_mean is None or running_var is None or len(input.shape) < 2:
        raise NotKnownError
    mean, deviation = running_mean.double(), (running_var.double() + eps).sqrt()
    scale = (1 if weight is None else weight.detach().double()) / deviation
    terms = [-mean * scale, torch.zeros_like(mean) if bias is None else bias.detach().double()]
    low, high = input.along(1)
    ends = torch.stack((product(low, scale), product(high, scale)))
    lowest, highest = widened(ends.amin(0), ends.amax(0), gamma(0, dtype))
    for term in terms:
        start, end = widened(term, term, gamma(0, dtype))
        lowest, highest = lowest + start, highest + end
    view = (1, -1, *(1 for _ in input.shape[2:]))
    return Interval(lowest.view(view), highest.view(view), input.shape)


def _normalised(
    dtype: torch.dtype, x: Interval, elements: int, scale: Tensor, shift: Tensor, *, centred: bool
) -> Interval:
    """Bound ``z·scale + shift``: ``|z| ≤ √(n − 1)`` if the mean was removed, else ``√n``; ε makes it smaller."""
    reach = scale.abs() * max(elements - centred, 0) ** 0.5
    slack = _norm_error(dtype) * (scale.abs() * elements**0.5 + shift.abs())
    return Interval(shift - reach - slack, shift + reach + slack, x.shape)


@rule
def layer_norm(
    dtype: torch.dtype, input: Interval, normalized_shape: Any, weight: _Maybe = None, bias: _Maybe = None, eps: Any = 0
) -> Interval:
    """Bound layer norm: for any input, a row is an affine image of the sphere of radius √d that is orthogonal to 1."""
    return _row_norm(dtype, input, normalized_shape, weight, bias, centred=True)


@rule
def rms_norm(
    dtype: torch.dtype, input: Interval, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Interval:
    """Bound RMS norm, which is layer norm that keeps the mean."""
    return _row_norm(dtype, input, normalized_shape, weight, None, centred=False)


def _row_norm(
    dtype: torch.dtype, x: Interval, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None, *, centred: bool
) -> Interval:
    dims = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    scale, shift = _scale_and_shift(dims, weight, bias)
    view = (*(1 for _ in range(len(x.shape) - len(dims))), *dims)
    found = _normalised(dtype, x, math.prod(dims), scale.view(view), shift.view(view), centred=centred)
    return found if len(dims) > 1 else replace(found, normed=NormalisedRows(scale, shift, centred))


@rule
def group_norm(
    dtype: torch.dtype, input: Interval, num_groups: int, weight: _Maybe = None, bias: _Maybe = None, eps: Any = 0
) -> Interval:
    """Bound group norm, which normalises over a group's channels and positions."""
    elements = math.prod(input.shape[1:]) // num_groups
    return _channel_norm(dtype, input, elements, weight, bias)


@rule
def instance_norm(
    dtype: torch.dtype,
    input: Interval,
    running_mean: _Maybe = None,
    running_var: _Maybe = None,
    weight: _Maybe = None,
    bias: _Maybe = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    """Bound instance norm, which normalises over a channel's positions, or by running statistics as batch norm."""
    if len(input.shape) < 3:
        raise NotKnownError
    if not use_input_stats:
        return batch_norm(dtype, input, running_mean, running_var, weight, bias, eps=eps)
    return _channel_norm(dtype, input, math.prod(input.shape[2:]), weight, bias)


def _channel_norm(
    dtype: torch.dtype, x: Interval, elements: int, weight: Tensor | None, bias: Tensor | None
) -> Interval:
    view = (1, -1, *(1 for _ in x.shape[2:]))
    scale, shift = (one.view(view) for one in _scale_and_shift(x.shape[1:2], weight, bias))
    return _normalised(dtype, x, elements, scale, shift, centred=True)


def _scale_and_shift(shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return γ and β of a norm, float64 of their shape; 1 and 0 if it has none."""
    scale = torch.ones(shape, dtype=torch.float64) if weight is None else weight.detach().double()
    return scale, torch.zeros(shape, dtype=torch.float64) if bias is None else bias.detach().double()


@rule
def embedding(
    dtype: torch.dtype,
    input: Interval,
    weight: Tensor,
    padding_idx: Any = None,
    max_norm: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Interval:
    """Bound an embedding: each column of the weight ``(rows, d)`` lies between its minimum and its maximum."""
    if max_norm is not None:
        raise NotKnownError
    view = (*(1 for _ in input.shape), -1)
    low, high = (end.detach().double().view(view) for end in (weight.amin(0), weight.amax(0)))
    return Interval(low, high, (*input.shape, weight.shape[1]))


def attention(
    dtype: torch.dtype,
    query: Interval,
    key: Any,
    value: Interval,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Interval:
    """Bound attention: a weighted mean of the rows of ``value``, ``(…, S, e)``, or zero where all are masked."""
    if dropout_p or not isinstance(value, Interval) or not isinstance(query, Interval) or enable_gqa:
        raise NotKnownError
    low, high = value.low.amin(-2, keepdim=True).clamp_max(0), value.high.amax(-2, keepdim=True).clamp_min(0)
    low, high = widened(low, high, gamma(value.shape[-2] + 16, dtype))
    return Interval(low, high, (*query.shape[:-1], value.shape[-1]))
