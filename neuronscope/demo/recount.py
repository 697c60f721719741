"""Compute what the demo reports in a slow and simple way, without any of the library's code, as a check.

All activations and their gradients are kept in memory. The demo compares the last scan of each run with this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["gradient_reach", "product_of_layers", "recount_dead"]


def recount_dead(network: nn.Sequential, images: Tensor, digits: Tensor) -> list[list[bool]]:
    """Return which neurons have zero output and zero gradient at the pre-activation for every image.

    The pre-activation of a gated product is that of its gate, the second half of the features.

    Args:
        network: The network; its activations are the children named ``act…``. It runs in evaluation mode.
        images: float32 ``(B, 64)``.
        digits: int64 ``(B,)``.

    Returns:
        For each layer, whether each of its neurons is dead.
    """
    return [
        ((output == 0).all(dim=0) & (gradient[:, -output.shape[1] :] == 0).all(dim=0)).tolist()
        for output, gradient in zip(*_outputs_and_gradients(network, images, digits), strict=True)
    ]


def gradient_reach(network: nn.Sequential, images: Tensor, digits: Tensor) -> float:
    """Return the gradient at the first layer's pre-activations ÷ that at the last layer's, as root mean squares.

    Args:
        network: The network, as for :func:`recount_dead`.
        images: float32 ``(B, 64)``.
        digits: int64 ``(B,)``.
    """
    _, gradients = _outputs_and_gradients(network, images, digits)
    first, last = (float(gradients[place].double().square().mean().sqrt()) for place in (0, -1))
    return first / last if last else 0.0


def product_of_layers(network: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Return the product of a network's linear layers, float64 ``(10, 64)``, and its offset, float64 ``(10,)``.

    Whatever is not :class:`torch.nn.Linear` is taken to do nothing.
    """
    first, *others = (layer for layer in network if isinstance(layer, nn.Linear))
    matrix, offset = first.weight.detach().double(), first.bias.detach().double()
    for layer in others:
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        matrix, offset = weight @ matrix, weight @ offset + bias
    return matrix, offset


def _outputs_and_gradients(
    network: nn.Sequential, images: Tensor, digits: Tensor
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return the outputs of all activations, and the gradients at their pre-activations."""
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
    return after, gradients
