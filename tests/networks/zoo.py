"""What a network of the tables in :mod:`vision` and :mod:`language` is: small, with random weights, its neurons known.

Where the neurons lie is said here by what the network is: of a convolution's map, axis 1; of a linear layer's features,
the last. Neuronscope is told nothing. See :mod:`tests.networks.agreement` for how a network is held to the twin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

EXPERTS = "its weights are a stack (experts)"
CHANNELS = {"*": 1}
FEATURES = {"*": -1}


@dataclass(frozen=True)
class Network:
    """One network to try.

    Attributes:
        family: The package it comes from.
        name: As it is shown.
        config: What its configuration says, in words.
        build: Makes it.
        inputs: Makes what its forward is given, from a generator.
        axes: The neurons' dimension by pattern on the site's name; the first that matches.
        gated: How many gated products it has.
        unseen: Sites that cannot be measured: pattern on the name → how the reason begins.
    """

    family: str
    name: str
    config: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    axes: Mapping[str, int] = field(default_factory=lambda: CHANNELS)
    gated: int = 0
    unseen: Mapping[str, str] = field(default_factory=dict)


def images(size: int, name: str = "x", batch: int = 2) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {name: torch.randn(batch, 3, size, size, generator=generator)}


def tokens(length: int = 12, **more: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    """Token ids, by the keywords of a language model; ``labels=True`` makes the ids the labels too."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        ids = torch.randint(3, 90, (2, length), generator=generator)
        return {"input_ids": ids, **{name: ids if value is True else value for name, value in more.items()}}

    return make


def words(options: Mapping[str, Any]) -> str:
    """A configuration as it is shown."""
    return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items())
