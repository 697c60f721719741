"""Formulas for neurons after a batch norm or a layer norm: what follows from β and γ alone.

**Batch norm.** A channel's values in a training batch are normalised by their own mean and variance, so ``Σz = 0`` and
``Σz² ≤ n`` over its ``n`` values (ε only makes it smaller). With ``c = −β/|γ| > 0`` the neuron fires where ``z > c``
(or ``z < −c``). By Cantelli's inequality, at most ``1/(1 + c²)`` of the values do. None of ``n`` values is larger than
``√(n − 1)``, so none fires if ``β + |γ|√(n − 1) ≤ 0`` (Samuelson 1968). For normally distributed values the share is
``Φ(−c)``.

**Layer norm.** A row is normalised by its own mean and variance, so the same two facts hold over its ``d`` elements. A
linear row ``w, b`` gives ``b + w·β + (w⊙γ)·z``. Since ``z`` is orthogonal to 1, this is at most
``b + w·β + √d‖P(w⊙γ)‖`` by Cauchy–Schwarz, where ``P`` removes the mean. ``z ∝ P(w⊙γ)`` attains it. RMS norm is the
same without ``P``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["firing_share_bound", "layer_norm_extremes", "normal_firing_share", "threshold", "training_maximum"]


def threshold(scale: Tensor, shift: Tensor) -> Tensor:
    """Return how many standard deviations above its mean a channel's value must be for its neuron to fire.

    It is ``c = −β/|γ|``, float64 ``(C,)``: ∞ where γ = 0 and β ≤ 0, −∞ where γ = 0 and β > 0.

    Args:
        scale: γ, ``(C,)``.
        shift: β, ``(C,)``.

    >>> threshold(torch.tensor([2.0, 0.0]), torch.tensor([-6.0, -1.0]))
    tensor([3., inf], dtype=torch.float64)
    """
    scale, shift = scale.double().abs(), shift.double()
    constant = torch.where(shift > 0, -torch.inf, torch.inf)
    return torch.where(scale > 0, -shift / scale.clamp_min(torch.finfo(torch.float64).tiny), constant)


def firing_share_bound(scale: Tensor, shift: Tensor) -> Tensor:
    """Return the largest share of a batch's values for which each neuron can fire, float64 ``(C,)`` (Cantelli).

    Args:
        scale: γ, ``(C,)``.
        shift: β, ``(C,)``.

    >>> firing_share_bound(torch.tensor([1.0]), torch.tensor([-3.0]))
    tensor([0.1000], dtype=torch.float64)
    """
    c = threshold(scale, shift)
    bound: Tensor = torch.where(c > 0, 1 / (1 + c * c), 1.0)
    return bound


def normal_firing_share(scale: Tensor, shift: Tensor) -> Tensor:
    """Return the share of normally distributed values for which each neuron fires: Φ(β/|γ|), float64 ``(C,)``.

    Args:
        scale: γ, ``(C,)``.
        shift: β, ``(C,)``.
    """
    share: Tensor = torch.special.ndtr(-threshold(scale, shift))
    return share


def training_maximum(scale: Tensor, shift: Tensor, values: int) -> Tensor:
    """Return the largest value that each channel can have in a training batch: ``β + |γ|√(n − 1)``, float64 ``(C,)``.

    Args:
        scale: γ, ``(C,)``.
        shift: β, ``(C,)``.
        values: How many values a channel has in a batch, ``n``.

    >>> training_maximum(torch.tensor([1.0]), torch.tensor([-9.0]), 65)
    tensor([-1.], dtype=torch.float64)
    """
    return shift.double() + scale.double().abs() * math.sqrt(values - 1)


def layer_norm_extremes(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return centre ``b + w·β``, reach ``√d‖P(w⊙γ)‖`` and size ``√d‖w⊙γ‖`` of each row of a linear layer.

    All are float64 ``(N,)``. Over all outputs of a layer norm (or RMS norm) before it, the extremes are the centre
    plus and minus the reach, approached as the input's scale grows and ε becomes negligible. Rounding is
    proportional to the size.

    Args:
        weight: ``(N, d)``.
        bias: ``(N,)``.
        scale: γ, ``(d,)``.
        shift: β, ``(d,)``.
        centred: ``True`` for layer norm, ``False`` for RMS norm.
    """
    weight = weight.double()
    scaled = weight * scale.double()
    centre = weight @ shift.double() + (0 if bias is None else bias.double())
    root = weight.shape[1] ** 0.5
    size = root * torch.linalg.vector_norm(scaled, dim=1)
    if centred:
        scaled = scaled - scaled.mean(1, keepdim=True)
    return centre, root * torch.linalg.vector_norm(scaled, dim=1), size
