"""Count dead neurons in a slow and simple way, without any of the library's code, as a check.

All activations and their gradients are kept in memory. The demo compares the last scan of each run with this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["recount_dead"]


def recount_dead(network: nn.Sequential, images: Tensor, digits: Tensor) -> list[list[bool]]:
    """Return which neurons have zero output and zero gradient at the pre-activation for every image.

    Args:
        network: The network; its activations are the children named ``act…``. It runs in evaluation mode.
        images: float32 ``(B, 64)``.
        digits: int64 ``(B,)``.

    Returns:
        For each layer, whether each of its neurons is dead.
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
