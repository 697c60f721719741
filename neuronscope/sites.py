"""Identify and describe a site: its key, its name, and its properties other than counts.

A site is a place in the network where an activation is observed. Its name is built by :class:`SiteKey` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["SiteInfo", "SiteKey"]


class SiteKey(NamedTuple):
    """Identify a site by its place, its function, the index of the call, and whether it is a gated product.

    Attributes:
        path: Module path without wrapper prefixes; ``""`` is the root. For a functional site, the path of the module
            that calls the function.
        function: Function name of a functional site, else ``""``.
        call: Index of the call within one forward pass: 0 for the first.
        gated: Whether the site is the product of this activation's output with another tensor.

    >>> SiteKey("layer1.0.relu", "", 1, False).name
    'layer1.0.relu#1'
    >>> SiteKey("", "relu", 0, False).name
    'relu()'
    """

    path: str
    function: str
    call: int
    gated: bool

    @property
    def name(self) -> str:
        """The site's name, as reports show it and patterns match it."""
        if self.function:
            base = f"{self.path}.{self.function}()" if self.path else f"{self.function}()"
        else:
            base = self.path or "(root)"
        return base + (f"#{self.call}" if self.call else "") + (".gated" if self.gated else "")


@dataclass(frozen=True)
class SiteInfo:
    """Describe a site: all that is known about it except its counts.

    Attributes:
        activation: Name of the activation function.
        kind: See :data:`neuronscope.attach.activations.KINDS`.
        linear_when_on: See :class:`neuronscope.attach.activations.Activation`.
        axis: The dimension of the activation tensor that indexes the neurons, at the first observed call; ≥ 0.
        axis_source: How the axis was found; see :mod:`neuronscope.attach.neuron_flow`.
        first: If ranks share a layer's neurons, the index of this rank's first neuron in the whole layer; −1 if another
            rank counts the same neurons at the same positions.
        whole: Number of neurons in the whole layer; 0 if the layer is not known to be shared between ranks.
        layer: Path of the layer whose units the neurons are; ``""`` if no layer is known. Branches that were joined
            have both paths, as in ``a+b``.
        units: The units that the neurons are, in their order: (layer, start, stop, step) of each run of units; empty if
            no layer is known.
        output: Whether the layer gives outputs of the network (no other layer reads it) and a function was applied to
            it, as a loss does.
        readers: Paths of the layers that read the site's output.
    """

    activation: str
    kind: str
    linear_when_on: bool
    axis: int
    axis_source: str
    first: int = 0
    whole: int = 0
    layer: str = ""
    units: tuple[tuple[str, int, int, int], ...] = ()
    output: bool = False
    readers: tuple[str, ...] = ()

    @property
    def assumed(self) -> bool:
        """Whether it was only assumed which dimension indexes the neurons."""
        return self.axis_source.startswith("assumed")

    @property
    def in_headlines(self) -> bool:
        """Whether totals, metrics and alarms include the site: its units are known, and are not outputs."""
        return not (self.assumed or self.output)
