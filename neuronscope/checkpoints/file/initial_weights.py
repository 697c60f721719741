"""Tell whether rows of weights still look as they were initialised, as those of a neuron that was never trained do.

An optimizer's state of zero shows that a row got no gradient since that optimizer began. Before that, another one may
have trained it: the weights of a fine-tuned network come from elsewhere. A trained row does not look like an initial
one: its bias is not exactly zero, and its weights leave the range from which torch draws them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import StoredTensor
from neuronscope.checkpoints.file.layers import Layer

__all__ = ["as_initialised"]

#: The range's rounding: the largest weight may exceed the bound by this fraction.
_ROUNDING = 1e-6
#: With fewer weights than this a trained row may lie in the range by chance. Weight decay may have shrunk an initial
#: row to this fraction of the range.
_MANY, _SHRUNK = 16, 0.5
#: The mean square of ``F`` uniform numbers in (−1, 1) is 1/3 with a standard deviation of .298 / √F.
_MEAN_SQUARE, _DEVIATION, _DEVIATIONS = 1.0 / 3.0, 0.298, 4.0


def as_initialised(layer: Layer, tensors: Mapping[str, StoredTensor], rows: Tensor) -> Tensor:
    """Return which of some rows look as they were initialised, bool ``(N,)``.

    They do if they have a bias of exactly zero and weights that are not; or if their weights (16 or more) and their
    bias lie in torch's default range for linear and convolutional layers, ±1/√fan-in, and are spread over it evenly.

    Args:
        layer: The layer.
        tensors: The checkpoint's tensors; they are read only if there are such rows.
        rows: The rows in question, bool ``(N,)``.
    """
    if not rows.any():
        return rows
    weight = layer.rows(tensors[layer.weight].read())[rows].double()
    largest = weight.abs().amax(dim=1)
    bias = torch.full_like(largest, torch.nan)
    if layer.bias is not None:
        bias = layer.rows(tensors[layer.bias].read())[rows, 0].double()
    found = torch.zeros_like(rows)
    found[rows] = ((bias == 0) & (largest > 0)) | _in_default_range(weight, largest, bias.nan_to_num(0.0))
    return found


def _in_default_range(weight: Tensor, largest: Tensor, bias: Tensor) -> Tensor:
    """Return which rows torch's default initialisation may have given, bool ``(K,)``, by weights ``(K, F)``."""
    count = weight.shape[1]
    if count < _MANY:
        return torch.zeros_like(largest, dtype=torch.bool)
    bound = 1.0 / math.sqrt(count)
    inside = torch.maximum(largest, bias.abs()) <= bound * (1.0 + _ROUNDING)
    even = (weight / largest.clamp(min=1e-300)[:, None]).square().mean(dim=1)
    slack = _DEVIATION * _DEVIATIONS / math.sqrt(count) + 2.0 / count
    return inside & (largest >= _SHRUNK * bound) & ((even - _MEAN_SQUARE).abs() <= slack)
