"""Leave out positions of a tensor that are padding.

There are two ways, both exact:

- :func:`keep_positions` returns a smaller tensor. Its size depends on the numbers in the mask, so a device must be
  waited for, and a compiler cannot trace it. It is for the CPU in eager mode.
- :func:`blank_positions` returns a tensor of the same shape, with zeros in place of what is left out, and how many
  these are. What is counted of it has that many zeros and positions too many, which
  :func:`neuronscope.count.compiled_graphs.leave_out` takes off again. It never waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["blank_positions", "keep_positions", "mask_dims"]


def mask_dims(shape: Sequence[int], axis: int, mask_shape: Sequence[int]) -> int:
    """Return how many dimensions of a tensor a mask covers.

    Args:
        shape: Shape of the tensor.
        axis: Dimension of its neurons.
        mask_shape: Shape of the mask, ``(B, T)``.

    Returns:
        2 if the tensor begins with ``(B, T)``; 1 if it begins with ``B * T``; 0 if the mask does not fit.

    >>> mask_dims((2, 5, 8), 2, (2, 5)), mask_dims((10, 8), 1, (2, 5)), mask_dims((2, 8, 5), 1, (2, 5))
    (2, 1, 0)
    """
    batch, length = mask_shape
    if axis >= 2 and shape[0] == batch and shape[1] == length:
        return 2
    return 1 if axis >= 1 and shape[0] == batch * length else 0


def keep_positions(tensor: Tensor, axis: int, mask: Tensor | None) -> tuple[Tensor, int]:
    """Return the part of an activation or gradient at the positions that a mask keeps. It waits for the device.

    Args:
        tensor: ``(…, N, …)``.
        axis: Dimension of the neurons, ≥ 0.
        mask: Which positions are kept, bool ``(B, T)``.

    Returns:
        The part, ``(K, …, N, …)`` for ``K`` kept positions, and its neuron axis; the same tensor and axis if the mask
        does not fit.
    """
    dims = 0 if mask is None else mask_dims(tensor.shape, axis, mask.shape)
    if mask is None or dims == 0:
        return tensor, axis
    rows = mask.to(tensor.device).reshape(tensor.shape[:dims])
    return tensor[rows], axis - dims + 1


def blank_positions(tensor: Tensor, axis: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return an activation or gradient with zeros at the positions that a mask leaves out, and how many these are.

    Args:
        tensor: ``(…, N, …)``.
        axis: Dimension of the neurons, ≥ 0.
        mask: Which positions are kept, bool ``(B, T)``.

    Returns:
        The tensor, of the same shape, and the number of positions that were left out of each neuron, int64 without
        dimensions, on the tensor's device. The same tensor and ``None`` if the mask does not fit.
    """
    dims = 0 if mask is None else mask_dims(tensor.shape, axis, mask.shape)
    if mask is None or dims == 0:
        return tensor, None
    hidden = mask.to(tensor.device).logical_not().reshape(tensor.shape[:dims])
    inner = 1  # positions of one index of the mask
    for dim in range(dims, tensor.dim()):
        if dim != axis:
            inner = inner * tensor.shape[dim]
    blank = tensor.masked_fill(hidden.reshape(hidden.shape + (1,) * (tensor.dim() - dims)), 0)
    return blank, hidden.sum() * inner
