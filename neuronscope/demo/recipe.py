"""Define the experiment: one network, one optimizer, one spike of the learning rate, and the activations to compare.

All variants of a seed see the same batches, and all that have the same layers start with the same weights. No neuron is
made dead on purpose: neurons die in training, in two epochs at twenty times the learning rate, in a deep network
without normalisation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuronscope.attach.activations import Activation

__all__ = ["ACTIVATIONS", "QUICK", "VARIANTS", "Recipe", "SwiGLU", "Variant", "build_classifier", "build_network"]

_PIXELS, _DIGITS = 64, 10

#: What Neuronscope does not know as an activation: the demo counts the neurons of "no activation" too.
ACTIVATIONS = {nn.Identity: Activation("identity", "leaky")}


@dataclass(frozen=True)
class Recipe:
    """Hold the settings that all runs share."""

    layers: int = 6  # number of hidden layers
    width: int = 64  # number of neurons in each; gated networks have fewer, see :meth:`Variant.width`
    epochs: int = 20  # number of passes over the training images
    batch_size: int = 32  # number of images in a batch
    learning_rate: float = 1e-3  # learning rate of Adam
    spike_factor: float = 20.0  # factor on the learning rate in the epochs of the spike
    spike_epochs: tuple[int, int] = (6, 7)  # first and last epoch of the spike, counted from 1

    def rate(self, epoch: int, *, spike: bool) -> float:
        """Return the learning rate of an epoch.

        Args:
            epoch: Number of the epoch, counted from 1.
            spike: Whether the run has the spike.
        """
        first, last = self.spike_epochs
        return self.learning_rate * (self.spike_factor if spike and first <= epoch <= last else 1.0)


class SwiGLU(nn.Module):
    """Gate one half of the features with SiLU of the other: ``(…, 2 · N)`` → ``(…, N)``, as :class:`torch.nn.GLU`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated products."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


@dataclass(frozen=True)
class Variant:
    """Describe one variant of the comparison."""

    name: str  # name in folders and JSON
    label: str  # name in tables and sentences
    activation: Callable[[], nn.Module]  # a function that makes an activation module
    gated: bool = False  # whether the activation makes one neuron of two features
    batch_norm: bool = False  # whether each layer is normalised over the batch before its activation
    layer_norm: bool = False  # whether each layer's neurons are normalised after the activation, image by image
    spike: bool = True  # whether the learning rate has the spike

    def width(self, recipe: Recipe) -> int:
        """Return the number of neurons in a layer: the recipe's, or with gates as many as cost the same parameters."""
        if not self.gated:
            return recipe.width

        def parameters(width: int, features: int) -> int:
            return (_PIXELS + 1) * features + (width + 1) * ((recipe.layers - 1) * features + _DIGITS)

        wanted = parameters(recipe.width, recipe.width)
        return min(range(1, recipe.width + 1), key=lambda width: abs(parameters(width, 2 * width) - wanted))


# Six layers of SwiGLU need a norm between them: each multiplies what it is given with itself, so that without one the
# output grows like the 64th power of the input. In transformers a norm stands before each, too.
VARIANTS = (
    Variant("ReLU", "ReLU", nn.ReLU),
    Variant("GELU", "GELU", nn.GELU),
    Variant("SiLU", "SiLU", nn.SiLU),
    Variant("Mish", "Mish", nn.Mish),
    Variant("Hardswish", "Hardswish", nn.Hardswish),
    Variant("LeakyReLU", "LeakyReLU", nn.LeakyReLU),
    Variant("PReLU", "PReLU", nn.PReLU),
    Variant("ELU", "ELU", nn.ELU),
    Variant("Tanh", "Tanh", nn.Tanh),
    Variant("Sigmoid", "Sigmoid", nn.Sigmoid),
    Variant("GLU", "GLU", nn.GLU, gated=True),
    Variant("SwiGLU-LayerNorm", "SwiGLU + LayerNorm", SwiGLU, gated=True, layer_norm=True),
    Variant("none", "no activation", nn.Identity),
    Variant("ReLU-BatchNorm", "ReLU + BatchNorm", nn.ReLU, batch_norm=True),
    Variant("ReLU-no-spike", "ReLU, no spike", nn.ReLU, spike=False),
)

#: Names of the variants that ``--quick`` trains.
QUICK = ("ReLU", "GELU", "SiLU")


def build_network(variant: Variant, recipe: Recipe, seed: int) -> nn.Sequential:
    """Build the network of a variant: linear layers with He initialisation and zero biases, activations ``act1``, ….

    Networks of the same seed and width have the same weights for every activation. The global random state does not
    change.

    Args:
        variant: The variant.
        recipe: The settings that all runs share.
        seed: Seed of the weights.
    """
    width = variant.width(recipe)
    features = 2 * width if variant.gated else width
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(1, recipe.layers + 1):
            layers[f"linear{number}"] = _linear(width if number > 1 else _PIXELS, features)
            if variant.batch_norm:
                layers[f"norm{number}"] = nn.BatchNorm1d(features)
            layers[f"act{number}"] = variant.activation()
            if variant.layer_norm:
                layers[f"norm{number}"] = nn.LayerNorm(width, elementwise_affine=False)
        layers["head"] = _linear(width, _DIGITS)
    return nn.Sequential(layers)


def build_classifier(seed: int) -> nn.Linear:
    """Build a linear classifier, with the initialisation of the networks: what a network without activations equals."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _linear(_PIXELS, _DIGITS)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer
