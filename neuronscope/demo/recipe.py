"""The experiment as data: one network, one optimizer, one learning-rate spike, and the activations that are compared.

All variants of a seed begin with the same weights and see the same batches. No unit is planted: the dying comes from
training alone, from two epochs at twenty times the learning rate, in a deep network without normalisation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["QUICK", "VARIANTS", "Recipe", "Variant", "build_network"]

_PIXELS, _DIGITS = 64, 10


@dataclass(frozen=True)
class Recipe:
    """What all runs share.

    Attributes:
        layers: Hidden layers.
        width: Neurons of each.
        epochs: Passes over the training images.
        batch_size: Images of a batch.
        learning_rate: Of Adam.
        spike_factor: How many times the learning rate in the spike's epochs.
        spike_epochs: First and last epoch of the spike, counted from 1.
    """

    layers: int = 6
    width: int = 64
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-3
    spike_factor: float = 20.0
    spike_epochs: tuple[int, int] = (6, 7)

    @property
    def neurons(self) -> int:
        """Hidden neurons of a network."""
        return self.layers * self.width

    def rate(self, epoch: int, *, spike: bool) -> float:
        """The learning rate of an epoch, counted from 1."""
        first, last = self.spike_epochs
        return self.learning_rate * (self.spike_factor if spike and first <= epoch <= last else 1.0)


@dataclass(frozen=True)
class Variant:
    """One line of the comparison.

    Attributes:
        name: For folders and JSON.
        label: For people.
        activation: Makes an activation module.
        batch_norm: Whether each layer is normalised over the batch before its activation.
        spike: Whether the learning rate jumps.
    """

    name: str
    label: str
    activation: Callable[[], nn.Module]
    batch_norm: bool = False
    spike: bool = True


VARIANTS = (
    Variant("ReLU", "ReLU", nn.ReLU),
    Variant("LeakyReLU", "LeakyReLU", nn.LeakyReLU),
    Variant("GELU", "GELU", nn.GELU),
    Variant("SiLU", "SiLU", nn.SiLU),
    Variant("Mish", "Mish", nn.Mish),
    Variant("Tanh", "Tanh", nn.Tanh),
    Variant("Hardswish", "Hardswish", nn.Hardswish),
    Variant("ReLU-BatchNorm", "ReLU + BatchNorm", nn.ReLU, batch_norm=True),
    Variant("ReLU-no-spike", "ReLU, no spike", nn.ReLU, spike=False),
)

#: Names of the variants that ``--quick`` trains.
QUICK = ("ReLU", "GELU", "SiLU")


def build_network(variant: Variant, recipe: Recipe, seed: int) -> nn.Sequential:
    """The network of a variant: linear layers, He-initialised and biases at zero; activations ``act1`` … ``act6``.

    Networks of one seed have the same weights, whatever their activation. The global random numbers are left alone.

    Args:
        variant: Which activation.
        recipe: How deep and wide.
        seed: For the weights.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(1, recipe.layers + 1):
            layers[f"linear{number}"] = _linear(recipe.width if number > 1 else _PIXELS, recipe.width)
            if variant.batch_norm:
                layers[f"norm{number}"] = nn.BatchNorm1d(recipe.width)
            layers[f"act{number}"] = variant.activation()
        layers["head"] = _linear(recipe.width, _DIGITS)
    return nn.Sequential(layers)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer
