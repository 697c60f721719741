"""A second opinion: dead neurons counted the slow and obvious way, with none of the library's code.

Every activation is kept whole, and its gradient too. The demo compares each run's last scan with this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["recount_dead"]


def recount_dead(network: nn.Sequential, images: Tensor, digits: Tensor) -> list[list[bool]]:
    """Which neurons give zero, and get zero gradient at their pre-activation, for every image.

    Args:
        network: Its activations are the children called ``act…``. In evaluation mode while this runs.
        images: ``(B, pixels)``.
        digits: ``(B,)``.

    Returns:
        One list of neurons a layer.
    """
    training = network.training
    network.eval()
    before: list[Tensor] = []
    after: list[Tensor] = []
    values = images
    for name, layer in network.named_children():
        activation = name.startswith("act")
        if activation:
            before.append(values)
        values = layer(values)
        if activation:
            after.append(values)
    gradients = torch.autograd.grad(F.cross_entropy(values, digits), before)
    network.train(training)
    return [
        ((output == 0).all(dim=0) & (gradient == 0).all(dim=0)).tolist()
        for output, gradient in zip(after, gradients, strict=True)
    ]
