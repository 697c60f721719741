"""Read from a checkpoint how the network was trained, and what weight decay did to the weights of dead neurons."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.file.layers import Layer
from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport

__all__ = ["dead_norm_ratios", "finite_settings", "learning_rates", "weight_decay_per_step"]


def learning_rates(checkpoint: Checkpoint) -> list[float]:
    """Return the saved learning rates of the optimizers' groups."""
    return [rate for group in _groups(checkpoint) for rate in finite_settings(group, "lr")]


def weight_decay_per_step(checkpoint: Checkpoint) -> float:
    """Return the largest fraction by which weight decay shrinks weights per step."""
    pairs = ((finite_settings(group, "lr"), finite_settings(group, "weight_decay")) for group in _groups(checkpoint))
    return max((rate[0] * decay[0] for rate, decay in pairs if rate and decay), default=0.0)


def dead_norm_ratios(
    verdicts: Sequence[LayerReport], layers: Sequence[Layer], names: Mapping[str, str], checkpoint: Checkpoint
) -> dict[str, float]:
    """Return the median norm of the dead neurons' incoming weights over that of the others, by layer.

    Args:
        verdicts: The verdicts.
        layers: The checkpoint's layers.
        names: Name in the verdicts by a layer's path, if it differs from the path.
        checkpoint: The opened checkpoint; each weight is read once more.
    """
    reports = {layer.name: layer for layer in verdicts}
    found = {}
    for layer in layers:
        report = reports.get(names.get(layer.path, layer.path))
        if report is None or report.neurons != layer.width or not 0 < report.dead < report.neurons:
            continue
        norms = torch.linalg.vector_norm(layer.rows(checkpoint.tensors[layer.weight].read()).double(), dim=1)
        dead = torch.from_numpy(report.dead_mask)
        living_norm = float(norms[~dead].median())
        if living_norm > 0:
            found[report.name] = float(norms[dead].median()) / living_norm
    return found


def _groups(checkpoint: Checkpoint) -> Iterator[Mapping[str, Any]]:
    return (group for optimizer in checkpoint.optimizers for group in optimizer.groups)


def finite_settings(group: Mapping[str, Any], *names: str) -> list[float]:
    """Return the hyperparameters of these names that are finite numbers, or tensors of one.

    Args:
        group: The hyperparameters of a parameter group.
        *names: Their names.
    """
    values = (group.get(name) for name in names)
    numbers = (value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in values)
    # A damaged file may hold an integer that no float can hold; NaN is not below anything.
    return [float(one) for one in numbers if isinstance(one, (int, float)) and abs(one) <= sys.float_info.max]
