"""Define the experiment: one network, one optimizer, one spike of the learning rate, and the activations to compare.

All variants of a seed start with the same weights and see the same batches. No neuron is made dead on purpose: neurons
die in training, in two epochs at twenty times the learning rate, in a deep network without normalisation.
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
    """Hold the settings that all runs share.

    Attributes:
        layers: Number of hidden layers.
        width: Number of neurons in each.
        epochs: Number of passes over the training images.
        batch_size: Number of images in a batch.
        learning_rate: Learning rate of Adam.
        spike_factor: Factor on the learning rate in the epochs of the spike.
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
        """Number of hidden neurons of a network."""
        return self.layers * self.width

    def rate(self, epoch: int, *, spike: bool) -> float:
        """Return the learning rate of an epoch.

        Args:
            epoch: Number of the epoch, counted from 1.
            spike: Whether the run has the spike.
        """
        first, last = self.spike_epochs
        return self.learning_rate * (self.spike_factor if spike and first <= epoch <= last else 1.0)


@dataclass(frozen=True)
class Variant:
    """Describe one variant of the comparison.

    Attributes:
        name: Name in folders and JSON.
        label: Name in tables and sentences.
        activation: A function that makes an activation module.
        batch_norm: Whether each layer is normalised over the batch before its activation.
        spike: Whether the learning rate has the spike.
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
    """Build the network of a variant: linear layers with He initialisation and zero biases, activations ``act1``, ….

    Networks of the same seed have the same weights for every activation. The global random state does not change.

    Args:
        variant: The variant.
        recipe: The settings that all runs share.
        seed: Seed of the weights.
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
