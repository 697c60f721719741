"""What a site is: its key, its name, and what is known of it apart from its counts.

A site is known by a :class:`SiteKey`, whose name is built here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["SiteInfo", "SiteKey"]


class SiteKey(NamedTuple):
    """Identity of a site: where, by which function, the how-manieth call of a forward, and whether a gated product.

    Attributes:
        path: Module path without wrapper prefixes; the owner's path for a functional site; ``""`` for the root.
        function: Function name for a functional site, else ``""``.
        call: 0 for the first call in a forward, then 1, 2, …
        gated: The product of this site's output with another tensor.

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
        """The site's name, as it is shown and as patterns match it."""
        if self.function:
            base = f"{self.path}.{self.function}()" if self.path else f"{self.function}()"
        else:
            base = self.path or "(root)"
        return base + (f"#{self.call}" if self.call else "") + (".gated" if self.gated else "")


@dataclass(frozen=True)
class SiteInfo:
    """What a site is, apart from its counts.

    Attributes:
        activation: Name of the activation function.
        kind: See :data:`neuronscope.attach.activations.KINDS`.
        linear_when_on: See :class:`neuronscope.attach.activations.Activation`.
        axis: The neurons' dimension at the site's first observed call, ≥ 0.
        axis_source: How the axis is known; see :mod:`neuronscope.attach.neuron_flow`.
        first: Where this rank's neurons begin in the whole layer, if ranks share its neurons; −1 where another rank
            counts the very same ones at the same positions.
        whole: Neurons of the whole layer; 0 where it is not known to be shared.
    """

    activation: str
    kind: str
    linear_when_on: bool
    axis: int
    axis_source: str
    first: int = 0
    whole: int = 0
