"""Compute the one map that several layers collapse to: its matrix, rank and size, and how well it does their work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from neuronscope.linear.affine_flow import CONVOLUTION, EACH_POSITION, WHOLE, Stretch
from neuronscope.linear.affine_functions import attention_arguments
from neuronscope.linear.replay import Replayed, replay

__all__ = ["CollapsedMap", "collapsed_map"]

#: A matrix with more elements than this is not computed: its rank would take minutes.
MOST_ELEMENTS = 1 << 23
#: A map that gives anything else than the layers by more than this, as a share of the largest output, is not shown.
_MOST_DIFFERENCE = 0.01
_MOST_AT_ONCE = 1 << 24  # elements of derivatives


class CollapsedMap(NamedTuple):
    """The affine map that a stretch of layers computes, in the fields of :mod:`neuronscope.linear.linear_report`."""

    inputs: int
    outputs: int
    rank: int = -1
    heads: int = 1
    kernel: tuple[int, ...] = ()
    matrix: Tensor | None = None  # float64 or the model's type
    offset: Tensor | None = None
    difference: float | None = None
    border_share: float = 0.0  # the kernel is that of the middle

    @property
    def parameters(self) -> int:
        """How many parameters the one layer needs that computes the map, its bias included."""
        return self.heads * self.inputs * self.outputs * math.prod(self.kernel) + self.outputs


def collapsed_map(run: Callable[[Any], Any], inputs: Any, stretch: Stretch, *, proved: bool) -> CollapsedMap:
    """Return the map that a stretch of layers collapses to.

    Args:
        run: Runs the model on inputs, in evaluation mode.
        inputs: One batch, ``(B, …)``.
        stretch: The stretch.
        proved: Whether it is affine for every input: then it is compared on random inputs too.

    Raises:
        RuntimeError: The model ran otherwise than before, or gave no gradients.
        ValueError: No one map does for each example what the layers do, as where examples are mixed.
    """
    affine = stretch.affine
    once = replay(run, inputs, affine, _leaf)
    if affine.mixing >= 0:
        return _by_heads(run, inputs, stretch, once)
    found = _of_places(affine.places, run, inputs, stretch, once, proved=proved)
    return found or cast("CollapsedMap", _of_places(WHOLE, run, inputs, stretch, once, proved=proved))


def _of_places(
    places: str, run: Callable[[Any], Any], inputs: Any, stretch: Stretch, once: Replayed, *, proved: bool
) -> CollapsedMap | None:
    """Return the map of an example, of a position or of a convolution; ``None`` if it is no convolution."""
    affine, source, result = stretch.affine, once.source, once.result
    rows, columns, kernel_of = _places(places, source, result)
    if len(rows) * source[0].numel() > MOST_ELEMENTS:
        return CollapsedMap(*_widths(places, source, result))
    derivatives = _jacobian(result[0].flatten()[rows], source)
    if derivatives[:, 1:].any():
        raise ValueError("an example's result depends on other examples")
    full = derivatives[:, 0].flatten(1)
    matrix, kernel = kernel_of(full)
    moved = result.detach().flatten(1)[:, rows] - source.detach().flatten(1) @ full.T  # the same for every example
    differences = [(moved - moved[:1]).abs().max()]
    scale = result.detach().abs().max()
    if proved:
        other = replay(run, inputs, affine, _random)
        found = other.result.detach().flatten(1)[:, rows] - other.source.detach().flatten(1) @ full.T
        differences.append((found - moved[:1]).abs().max())
        scale = torch.maximum(scale, other.result.detach().abs().max())
    elif len(moved) < 2:
        differences = []
    difference = float(max(differences) / scale.clamp_min(torch.finfo(scale.dtype).tiny)) if differences else None
    if difference is not None and not difference <= _MOST_DIFFERENCE:
        raise ValueError("the layers do otherwise than the map, as where examples are mixed")
    if not kernel:
        return CollapsedMap(columns, len(rows), _rank(matrix), 1, kernel, matrix, moved[0], difference)
    weight = matrix.reshape(len(rows), -1, *kernel)
    border_share = _border_share(weight, moved[0], full.reshape(len(rows), *source.shape[1:]), source, result)
    if border_share is None:
        return None
    return CollapsedMap(
        weight.shape[1], len(rows), _rank(matrix), 1, kernel, matrix, moved[0], difference, border_share
    )


def _border_share(weight: Tensor, offset: Tensor, middle: Tensor, source: Tensor, result: Tensor) -> float | None:
    """Return the share of positions at which one convolution gives something else than the layers.

    ``None`` if it gives the same at one position only: then the kernel is none, as behind a transposed convolution, or
    where the map is so small that the borders cut the kernel off in the middle too.

    Args:
        weight: The kernel in the middle of the map, ``(outputs, inputs, *kernel)``.
        offset: What is added there, ``(outputs,)``.
        middle: Derivatives of the outputs in the middle by one example, ``(outputs, inputs, *source)``.
        source: The source, ``(B, inputs, *source)``.
        result: The map's result, ``(B, outputs, *result)``.
    """
    given, kernel, strides = source.detach(), weight.shape[2:], []
    starts = _window_starts(middle.abs().sum((0, 1)))
    centre = [size // 2 for size in result.shape[2:]]
    for dim, size in enumerate(result.shape[2:]):
        before = [at - (dim == each) for each, at in enumerate(centre)]
        stride = 1
        if size > 1:  # how far the kernel moves from one position to the next
            neighbour = result[0].flatten(1)[:, _flat(before, result.shape[2:])].abs().sum()
            towards = torch.autograd.grad(neighbour, source, retain_graph=True)[0]
            stride = starts[dim] - _window_starts(towards[0].abs().sum(0))[dim]
        if stride < 1:
            return None
        first = starts[dim] - stride * centre[dim]
        missing = first + stride * (size - 1) + kernel[dim] - given.shape[dim + 2]
        padding = [0, 0] * (result.dim() - 3 - dim) + [-first, missing]
        given = functional.pad(given, padding)  # negative numbers cut off
        strides.append(stride)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
    found = convolve(given, weight, offset, stride=strides)
    scale = result.detach().abs().max()
    unlike = (found - result.detach()).abs().amax((0, 1)) > scale * torch.finfo(result.dtype).eps ** 0.5
    return None if unlike.sum() >= unlike.numel() - 1 > 0 else float(unlike.double().mean())


def _flat(at: list[int], shape: Sequence[int]) -> int:
    """Return the index of a position in a map of positions that was flattened."""
    index = 0
    for place, size in zip(at, shape, strict=True):
        index = index * size + place
    return index


def _window_starts(weights: Tensor) -> list[int]:
    """Return where, in each dimension, what is not zero begins; 0 if all is zero."""
    used = weights.nonzero()
    return used.amin(0).tolist() if len(used) else [0] * weights.dim()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def _random(tensor: Tensor) -> Tensor:
    """Return random numbers of a tensor's shape and size, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    return drawn * tensor.abs().max().clamp_min(1)


def _rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix))


def _widths(places: str, source: Tensor, result: Tensor) -> tuple[int, int]:
    if places == EACH_POSITION:
        return source.shape[-1], result.shape[-1]
    if places == CONVOLUTION:
        return source.shape[1], result.shape[1]
    return source[0].numel(), result[0].numel()


def _places(
    places: str, source: Tensor, result: Tensor
) -> tuple[Tensor, int, Callable[[Tensor], tuple[Tensor, tuple[int, ...]]]]:
    """Return which outputs of an example to compute, how many inputs they have, and what makes the map of rows."""
    every = torch.arange(result[0].numel(), device=result.device).reshape(result[0].shape)
    if places == EACH_POSITION and source.shape[:-1] == result.shape[:-1]:
        width = source.shape[-1]
        return every.reshape(-1, result.shape[-1])[0], width, lambda rows: (rows[:, :width], ())
    if places == CONVOLUTION and source.dim() == result.dim() > 2:
        middle = every
        for size in result.shape[2:]:
            middle = middle[:, size // 2]  # far from the borders

        def window(rows: Tensor) -> tuple[Tensor, tuple[int, ...]]:
            maps = rows.reshape(len(rows), *source.shape[1:])
            used = (maps != 0).any(0).any(0).nonzero()
            if not len(used):
                return maps.flatten(2)[:, :, 0], (1,) * (maps.dim() - 2)
            low, high = used.amin(0), used.amax(0) + 1
            cut = maps
            for dim, (start, stop) in enumerate(zip(low.tolist(), high.tolist(), strict=True), start=2):
                cut = cut.narrow(dim, start, stop - start)
            return cut.flatten(1), tuple(cut.shape[2:])

        return middle, source.shape[1], window
    return every.flatten(), source[0].numel(), lambda rows: (rows, ())


def _by_heads(run: Callable[[Any], Any], inputs: Any, stretch: Stretch, once: Replayed) -> CollapsedMap:
    """Return the map of a value projection and an output projection, one for each head."""
    source, result = once.source, once.result
    width, outputs = source.shape[-1], result.shape[-1]
    unknown = CollapsedMap(width, outputs)
    if stretch.affine.mixing == stretch.affine.end.call:
        return _fused(stretch, once) or unknown
    if source.shape[:-1] != result.shape[:-1]:
        return unknown
    ranks, head, heads, matrix = [], 0, 1, None
    while head < heads:
        piece = replay(run, inputs, stretch.affine, _leaf, head)
        if piece.result.shape != result.shape:
            return unknown
        row = piece.result.reshape(-1, outputs)[0]
        matrix = _jacobian(row, piece.source).reshape(outputs, -1, width)[:, 0]
        ranks.append(_rank(matrix))
        heads, head = piece.heads, head + 1
    return CollapsedMap(width, outputs, max(ranks), heads, matrix=matrix if heads == 1 else None)


def _fused(stretch: Stretch, once: Replayed) -> CollapsedMap | None:
    """Return the map of the projections of ``multi_head_attention_forward``; ``None`` if more layers lie before it."""
    if len(stretch.layers) > 2:
        return None
    given = attention_arguments(*once.mixing)
    width, heads, output = given["embed_dim_to_check"], given["num_heads"], given["out_proj_weight"]
    separate = given.get("use_separate_proj_weight")
    values = given["v_proj_weight"] if separate else given["in_proj_weight"][2 * width :]
    pairs = zip(output.chunk(heads, 1), values.chunk(heads, 0), strict=True)
    ranks = [_rank(reads.detach() @ gives.detach()) for reads, gives in pairs]
    return CollapsedMap(values.shape[1], len(output), max(ranks), heads)


def _jacobian(outputs: Tensor, source: Tensor) -> Tensor:
    """Return the derivatives of some outputs, ``(N,)``, by a tensor, as ``(N, *source.shape)``."""
    step = max(1, _MOST_AT_ONCE // source.numel())
    parts = []
    for start in range(0, len(outputs), step):
        chosen = torch.zeros(min(step, len(outputs) - start), len(outputs), dtype=outputs.dtype, device=outputs.device)
        chosen[torch.arange(len(chosen)), start + torch.arange(len(chosen))] = 1
        (found,) = torch.autograd.grad(outputs, source, chosen, retain_graph=True, is_grads_batched=True)
        parts.append(found)
    return torch.cat(parts)
