"""Training: what a checkpoint says of how the network was trained, and of what weight decay did to dead rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.file.layers import Layer
from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport

__all__ = ["dead_norm_ratios", "learning_rates", "weight_decay_per_step"]


def learning_rates(checkpoint: Checkpoint) -> list[float]:
    """Learning rates of the optimizers' groups, as they were saved.

    Args:
        checkpoint: What the file holds.
    """
    return [rate for rate, _ in _rates(checkpoint)]


def weight_decay_per_step(checkpoint: Checkpoint) -> float:
    """By what share weight decay shrinks weights a step, at most.

    Args:
        checkpoint: What the file holds.
    """
    return max((rate * decay for rate, decay in _rates(checkpoint)), default=0.0)


def dead_norm_ratios(
    said: Sequence[LayerReport], layers: Sequence[Layer], sites: Mapping[str, str], checkpoint: Checkpoint
) -> dict[str, float]:
    """By layer, the middle norm of the dead neurons' incoming weights over that of the others.

    Args:
        said: The verdicts.
        layers: The checkpoint's layers.
        sites: Name in the verdicts by a layer's path, where it is another.
        checkpoint: Where the weights are; each weight is read once more.
    """
    reports = {layer.name: layer for layer in said}
    found = {}
    for layer in layers:
        report = reports.get(sites.get(layer.path, layer.path))
        if report is None or report.neurons != layer.width or not 0 < report.dead < report.neurons:
            continue
        norms = torch.linalg.vector_norm(layer.rows(checkpoint.tensors[layer.weight].read()).double(), dim=1)
        dead = torch.from_numpy(report.dead_mask)
        middle = float(norms[~dead].median())
        if middle > 0:
            found[report.name] = float(norms[dead].median()) / middle
    return found


def _rates(checkpoint: Checkpoint) -> list[tuple[float, float]]:
    """Learning rate and weight decay of each of the optimizers' groups that has a rate."""
    groups = [group for state in checkpoint.optimizers for group in state.groups]
    return [
        (_number(group.get("lr")), _number(group.get("weight_decay"), 0.0))
        for group in groups
        if not math.isnan(_number(group.get("lr")))
    ]


def _number(value: Any, otherwise: float = math.nan) -> float:
    """A hyperparameter as a number, if it is one; tensors of one number are (``capturable`` optimizers keep such)."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else otherwise
