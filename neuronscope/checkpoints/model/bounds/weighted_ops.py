"""Pass intervals through weighted calls: linear layers, convolutions, normalisations, embeddings, attention.

Each rule has the signature of the torch function that it stands for, after the type that the network computes in. A
tensor that depends on the input comes as an :class:`Interval`, any other argument as it is; a rule returns ``None``
where it knows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.model.bounds.batchnorm import layer_norm_extremes
from neuronscope.checkpoints.model.bounds.interval import (
    LAYER_NORM,
    Interval,
    NormalisedRows,
    gamma,
    product,
    unit_roundoff,
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
    "linear",
    "matmul",
    "rms_norm",
    "transposed_convolution",
]

# How many elements of a weight are converted to float64 at a time: 4 MB, which fit into a processor's cache.
_CHUNK = 500_000


def _norm_error(dtype: torch.dtype) -> float:
    """Return the largest relative rounding error of a normalised value: 2e-4 in float32.

    This covers rows whose mean is up to a hundred times their standard deviation; beyond that, torch's layer norm
    itself is not accurate.
    """
    return 3500 * unit_roundoff(dtype)


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
    """Bound ``x @ weight.mT + bias`` for ``x`` in ``[low, high]``, with each product rounded.

    Args:
        low: ``(…, d)``.
        high: ``(…, d)``.
        weight: ``(N, d)``, or a stack ``(G, N, d)``.
        bias: ``(N,)``.
        dtype: The type that the network computes in.
        terms: How many terms each sum has; its rounding error depends on it.

    Returns:
        Lower and upper bounds, both float64 ``(…, N)``.
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


def linear(dtype: torch.dtype, input: Any, weight: Any, bias: Any = None) -> Interval | None:
    """Bound ``input @ weight.T + bias``, more tightly where the input was normalised.

    Args:
        dtype: The type that the network computes in.
        input: ``(…, d)``.
        weight: ``(N, d)``.
        bias: ``(N,)``.
    """
    if not isinstance(input, Interval) or not isinstance(weight, Tensor) or isinstance(bias, Interval):
        return None
    if weight.dim() != 2:
        return None
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
        w = weight[part].detach()
        centre, reach, size = layer_norm_extremes(
            w, None if bias is None else bias[part].detach(), normed.scale, normed.shift, centred=normed.centred
        )
        offset = w.double().abs() @ normed.shift.abs() + (0 if bias is None else bias[part].detach().double().abs())
        parts.append((centre, reach + _norm_error(dtype) * size + gamma(weight.shape[1], dtype) * (size + offset)))
    centres, reaches = zip(*parts, strict=True)
    return torch.cat(centres), torch.cat(reaches)


def matmul(dtype: torch.dtype, input: Any, other: Any) -> Interval | None:
    """Bound ``input @ other`` where ``other`` is a constant matrix.

    Args:
        dtype: The type that the network computes in.
        input: ``(…, d)``.
        other: ``(d, N)``.
    """
    if isinstance(other, Tensor) and other.dim() == 2:
        return linear(dtype, input, other.mT)
    return None


def addmm(
    dtype: torch.dtype,
    input: Any,
    mat1: Any,
    mat2: Any,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Interval | None:
    """Bound ``input + mat1 @ mat2`` where ``mat2`` is a constant matrix and ``input`` its bias.

    Args:
        dtype: The type that the network computes in.
        input: ``(N,)``.
        mat1: ``(B, d)``.
        mat2: ``(d, N)``.
        beta: Factor of the bias; nothing is known unless it is 1.
        alpha: Factor of the product; nothing is known unless it is 1.
    """
    if beta == alpha == 1 and isinstance(input, Tensor) and input.dim() == 1 and isinstance(mat2, Tensor):
        return linear(dtype, mat1, mat2.mT, input)
    return None


def _channel_bounds(
    dtype: torch.dtype, x: Interval, matrix: Tensor, bias: Any, groups: int, zeros: bool, terms: int
) -> tuple[Tensor, Tensor]:
    """Return the bounds of each output channel, both float64 ``(O,)``.

    Args:
        dtype: The type that the network computes in.
        x: The input, channels on axis 1.
        matrix: The weight, ``(O, C/groups, taps)``.
        bias: ``(O,)``, or ``None``.
        groups: How many groups the channels are in.
        zeros: Whether an element of the kernel may meet padding instead of the input.
        terms: How many terms each sum has.
    """
    low, high = x.along(1)
    if zeros:
        low, high = low.clamp_max(0), high.clamp_min(0)
    weight = matrix.flatten(1).view(groups, matrix.shape[0] // groups, -1)
    low, high = (end.repeat_interleave(matrix.shape[2]).view(groups, 1, -1) for end in (low, high))
    low, high = _combined(low, high, weight, None if bias is None else bias.view(groups, 1, -1), dtype, terms)
    return low.flatten(), high.flatten()


def convolution(spatial: int) -> Callable[..., Interval | None]:
    """Return the rule of a convolution over ``spatial`` dimensions."""

    def rule(
        dtype: torch.dtype,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Interval | None:
        batched = isinstance(input, Interval) and len(input.shape) == spatial + 2
        if not batched or not isinstance(weight, Tensor) or isinstance(bias, Interval):
            return None
        numbers = padding if isinstance(padding, (tuple, list)) else (padding,)
        padded = padding == "same" or (padding != "valid" and any(number != 0 for number in numbers))
        taps = weight.flatten(2)
        low, high = _channel_bounds(dtype, input, taps, bias, groups, padded, taps[0].numel())
        return _by_channel(low, high, input, spatial)

    return rule


def transposed_convolution(spatial: int) -> Callable[..., Interval | None]:
    """Return the rule of a transposed convolution over ``spatial`` dimensions."""

    def rule(
        dtype: torch.dtype,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Interval | None:
        batched = isinstance(input, Interval) and len(input.shape) == spatial + 2
        if not batched or not isinstance(weight, Tensor) or isinstance(bias, Interval):
            return None
        inner, outer = weight.shape[0] // groups, weight.shape[1]
        matrix = weight.flatten(2).reshape(groups, inner, outer, -1).transpose(1, 2).reshape(groups * outer, inner, -1)
        # Which elements of the kernel meet an input depends on the position: any of them may be left out.
        low, high = _channel_bounds(dtype, input, matrix, bias, groups, True, matrix[0].numel())
        return _by_channel(low, high, input, spatial)

    return rule


def _by_channel(low: Tensor, high: Tensor, x: Interval, spatial: int) -> Interval:
    """Return an interval from bounds by channel. The caller fills in the sizes of the spatial dimensions."""
    view = (1, -1, *(1 for _ in range(spatial)))
    return Interval(low.view(view), high.view(view), (x.shape[0], low.numel(), *(1 for _ in range(spatial))))


def batch_norm(
    dtype: torch.dtype,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval | None:
    """Bound batch norm in evaluation mode, an affine map of each channel.

    Nothing is known where it uses the batch's own statistics.

    Args:
        dtype: The type that the network computes in.
        input: ``(B, C, …)``.
        running_mean: ``(C,)``.
        running_var: ``(C,)``.
        weight: γ, ``(C,)``.
        bias: β, ``(C,)``.
        training: Whether the batch's own statistics are used.
        momentum: Ignored.
        eps: Added to the variance.
    """
    if training or not isinstance(input, Interval) or running_mean is None or len(input.shape) < 2:
        return None
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
    """Bound ``z·scale + shift`` for values that were normalised over ``n`` elements.

    ``|z| ≤ √(n − 1)`` if the mean was removed (``centred``), else ``|z| ≤ √n``.
    """
    reach = scale.abs() * max(elements - centred, 0) ** 0.5
    slack = _norm_error(dtype) * (scale.abs() * elements**0.5 + shift.abs())
    return Interval(shift - reach - slack, shift + reach + slack, x.shape)


def layer_norm(
    dtype: torch.dtype,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Interval | None:
    """Bound layer norm: for any input, a row is an affine image of the sphere of radius √d that is orthogonal to 1.

    Args:
        dtype: The type that the network computes in.
        input: ``(…, *normalized_shape)``.
        normalized_shape: Sizes of the dimensions that are normalised over.
        weight: γ, of that shape.
        bias: β, of that shape.
        eps: Ignored: it only makes values smaller.
    """
    return _row_norm(dtype, input, normalized_shape, weight, bias, centred=True)


def rms_norm(
    dtype: torch.dtype,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    eps: float | None = None,
) -> Interval | None:
    """Bound RMS norm, which is layer norm that keeps the mean.

    Args:
        dtype: The type that the network computes in.
        input: ``(…, *normalized_shape)``.
        normalized_shape: Sizes of the dimensions that are normalised over.
        weight: γ, of that shape.
        eps: Ignored: it only makes values smaller.
    """
    return _row_norm(dtype, input, normalized_shape, weight, None, centred=False)


def _row_norm(
    dtype: torch.dtype, x: Any, normalized_shape: Any, weight: Any, bias: Any, *, centred: bool
) -> Interval | None:
    if not isinstance(x, Interval) or isinstance(weight, Interval) or isinstance(bias, Interval):
        return None
    dims = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    scale = torch.ones(dims, dtype=torch.float64) if weight is None else weight.detach().double()
    shift = torch.zeros(dims, dtype=torch.float64) if bias is None else bias.detach().double()
    lead = (1,) * (len(x.shape) - len(dims))
    found = _normalised(dtype, x, math.prod(dims), scale.view(*lead, *dims), shift.view(*lead, *dims), centred=centred)
    if len(dims) > 1:
        return found
    return Interval(found.low, found.high, x.shape, normed=NormalisedRows(scale, shift, centred))


def group_norm(
    dtype: torch.dtype,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Interval | None:
    """Bound group norm, which normalises over a group's channels and positions.

    Args:
        dtype: The type that the network computes in.
        input: ``(B, C, …)``.
        num_groups: How many groups the channels are in.
        weight: γ, ``(C,)``.
        bias: β, ``(C,)``.
        eps: Ignored: it only makes values smaller.
    """
    if not isinstance(input, Interval) or len(input.shape) < 2:
        return None
    elements = math.prod(input.shape[1:]) // num_groups
    return _normalised(dtype, input, elements, *_affine(input, weight, bias), centred=True)


def instance_norm(
    dtype: torch.dtype,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval | None:
    """Bound instance norm, which normalises over a channel's positions, or by running statistics as batch norm.

    Args:
        dtype: The type that the network computes in.
        input: ``(B, C, …)``.
        running_mean: ``(C,)``.
        running_var: ``(C,)``.
        weight: γ, ``(C,)``.
        bias: β, ``(C,)``.
        use_input_stats: Whether the statistics of the input are used, not the running ones.
        momentum: Ignored.
        eps: Added to the running variance.
    """
    if not isinstance(input, Interval) or len(input.shape) < 3:
        return None
    if not use_input_stats:
        return batch_norm(dtype, input, running_mean, running_var, weight, bias, eps=eps)
    return _normalised(dtype, input, math.prod(input.shape[2:]), *_affine(input, weight, bias), centred=True)


def _affine(x: Interval, weight: Any, bias: Any) -> tuple[Tensor, Tensor]:
    view = (1, -1, *(1 for _ in x.shape[2:]))
    ones = torch.ones(x.shape[1], dtype=torch.float64)
    scale = ones if weight is None else weight.detach().double()
    shift = 0 * ones if bias is None else bias.detach().double()
    return scale.view(view), shift.view(view)


def embedding(
    dtype: torch.dtype,
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    *rest: Any,
    **options: Any,
) -> Interval | None:
    """Bound an embedding: each column lies between its minimum and its maximum over all rows.

    Args:
        dtype: The type that the network computes in.
        input: Indices, of any shape.
        weight: ``(rows, d)``.
        padding_idx: Ignored.
        max_norm: Nothing is known unless it is ``None``.
        rest: Ignored.
        options: Ignored.
    """
    if not isinstance(weight, Tensor) or not isinstance(input, Interval) or max_norm is not None:
        return None
    lead = (1,) * len(input.shape)
    shape = (*input.shape, weight.shape[1])
    return Interval(
        weight.detach().amin(0).double().view(*lead, -1), weight.detach().amax(0).double().view(*lead, -1), shape
    )


def attention(
    dtype: torch.dtype,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> Interval | None:
    """Bound attention: a weighted mean of the rows of ``value``, or zero where all are masked.

    Args:
        dtype: The type that the network computes in.
        query: ``(…, L, d)``.
        key: ``(…, S, d)``.
        value: ``(…, S, e)``.
        attn_mask: Ignored: masked rows have weight 0.
        dropout_p: Nothing is known unless it is 0.
        options: ``is_causal``, ``scale`` and ``enable_gqa``; nothing is known with the last.
    """
    if dropout_p or not isinstance(value, Interval) or not isinstance(query, Interval) or options.get("enable_gqa"):
        return None
    low, high = value.low.amin(-2, keepdim=True).clamp_max(0), value.high.amax(-2, keepdim=True).clamp_min(0)
    low, high = widened(low, high, gamma(value.shape[-2] + 16, dtype))
    return Interval(low, high, (*query.shape[:-1], value.shape[-1]))
