"""What a network of the tables in :mod:`vision` and :mod:`language` is: small, of random weights, with real inputs.

Where the neurons lie is said here by what the network is: of a convolution's map, axis 1; of a linear layer's features,
the last. Neuronscope is told nothing. See :mod:`tests.networks.agreement` for how a network is held to the twin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn


@dataclass(frozen=True)
class Experts:
    """Activations whose rows are of several experts, and how that is known from what the modules are given.

    Attributes:
        layer: The stack of their weights, beside the activation: ``gate_up_proj``.
        units: Which of an expert's units are given to the activation, as a site's name shows it.
        of: Path of the module, beside the activation, whose arguments say which rows are of which expert; ``""`` for
            the module that holds the activation.
        owners: Returns the number of each row's expert, or of experts for a row of none: from that module, its
            arguments, the pre-activation, and how many times the activation ran before in this call of the module.
        swish: The activation is a sigmoid whose product with its own units is a SiLU.
    """

    layer: str
    units: str
    owners: Callable[[nn.Module, tuple[Any, ...], Tensor, int], Tensor]
    of: str = ""
    swish: bool = False


CHANNELS = {"*": 1}
FEATURES = {"*": -1}
#: Of the pixels of ImageNet, by colour: torchvision's and timm's networks are given pictures on that scale.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Network:
    """One network to try.

    Attributes:
        family: The package it comes from.
        name: As it is shown.
        config: What its configuration says, in words.
        build: Makes it.
        inputs: Makes what its forward is given, from a generator.
        axes: The neurons' dimension, or dimensions, by pattern on where the activation is applied (the path of its
            module, or ``block.relu()``); the first that matches.
        gated: How many gated products it has.
        unseen: Activations that cannot be measured: pattern on the place → how the reason begins.
        experts: Activations whose rows are of several experts, by pattern on the place.
    """

    family: str
    name: str
    config: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    axes: Mapping[str, int | tuple[int, ...]] = field(default_factory=lambda: CHANNELS)
    gated: int = 0
    unseen: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, Experts] = field(default_factory=dict)


def images(size: int, name: str = "x") -> Callable[[torch.Generator], dict[str, Any]]:
    """A crop of each of two photographs, ``(2, 3, size, size)``, normalised as is usual for networks of pictures."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
        crops = [(_crop(photograph, size, generator) - mean) / deviation for photograph in _photographs()]
        return {name: torch.stack(crops)}

    return make


def tokens(length: int = 12, **more: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    """Text as bytes, by the keywords of a language model; ``labels=True`` makes the bytes the labels too."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        ids = text(generator, length)
        return {"input_ids": ids, **{name: ids if value is True else value for name, value in more.items()}}

    return make


def text(generator: torch.Generator, length: int, rows: int = 2) -> Tensor:
    """Pieces of an English text as bytes, ``(rows, length)``; none below 10, where networks have their own tokens."""
    whole = torch.frombuffer(bytearray(_text(), "utf-8"), dtype=torch.uint8).long()
    starts = torch.randint(len(whole) - length, (rows,), generator=generator)
    return torch.stack([whole[start : start + length] for start in starts.tolist()])


def _crop(photograph: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A square of a photograph at some place, of every second, third or fourth pixel where it is large enough."""
    step = min(photograph.shape[1] // size, 4)
    top, left = (int(torch.randint(side - step * size + 1, (), generator=generator)) for side in photograph.shape[1:])
    return photograph[:, top : top + step * size : step, left : left + step * size : step]


@functools.cache
def _photographs() -> list[Tensor]:
    """The two photographs that come with scikit-learn, ``(3, 427, 640)``, from 0 to 1."""
    return [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]


@functools.cache
def _text() -> str:
    """What scikit-learn says of its digits, some thousand characters of English."""
    return load_digits().DESCR


def words(options: Mapping[str, Any]) -> str:
    """A configuration as it is shown."""
    return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items())
