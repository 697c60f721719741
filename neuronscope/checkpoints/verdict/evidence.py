"""Evidence: what one source says of the neurons of one layer, as arrays, and on what ground.

Everything that examines a checkpoint gives :class:`Evidence` and :class:`Abstention`; what they come to together is
decided elsewhere. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.errors import UsageError

__all__ = ["BASES", "CLAIMS", "Abstention", "Evidence"]

#: What may be said of a neuron, most serious first.
CLAIMS = (
    "not finite",  # a weight or bias of it is NaN or infinite
    "dead",  # its output is zero, always or at every position that was seen
    "never trained",  # none of its incoming weights ever got a gradient
    "no gradient",  # its incoming weights got none lately
    "zero row",  # all of its incoming weights are zero
    "unread",  # its output cannot reach the network's output: every weight that reads it is zero, or its reader is dead
    "quiet",  # it fires, but seldom at most
    "alive",  # it fires, or gets a gradient: speaks against the rest
)

#: On what ground, surest first. *proved*: holds for every input (of the declared box, where one is named); *measured*:
#: counted exactly on data that was seen; *inferred*: follows from what the optimizer or the weights hold; *suspected*:
#: likely under an assumption that is named.
BASES = ("proved", "measured", "inferred", "suspected")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one source says of some of the ``N`` neurons of one layer (``K`` of them).

    Attributes:
        layer: Site name where the site is known, else the path of the module that holds the incoming weights.
        width: ``N``.
        source: Who says so, in a word or two: ``monitor record``, ``adam state``, ``weights``, ``batch norm`` …
        claim: One of :data:`CLAIMS`.
        basis: One of :data:`BASES`.
        neurons: Indices along the layer's neuron axis, int64 ``(K,)``, rising, each once.
        numbers: The number behind the claim for each of them, float64 ``(K,)``; NaN where there is none.
        measure: What such a number is, with its unit: ``steps since its last gradient, at most``.
        text: One sentence for a reader: the ground, its bound and its limits.
        since: Optimizer step from which the claim holds for each of them, int64 ``(K,)``: −1 = since the beginning;
            ``None`` where the source cannot tell.
        whole_layer: Whether it is said of these neurons only because it is so of their layer as a whole, which was
            frozen, or cut off by what follows it. That says nothing of the single neurons.
        collapsed: Whether it is said of these neurons because their layer has collapsed: all of them went silent, and
            nothing passes it any more.
    """

    layer: str
    width: int
    source: str
    claim: str
    basis: str
    neurons: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.float64]
    measure: str
    text: str
    since: npt.NDArray[np.int64] | None = None
    whole_layer: bool = False
    collapsed: bool = False

    def __post_init__(self) -> None:
        if self.claim not in CLAIMS or self.basis not in BASES:
            raise UsageError(f"Expected a claim and a basis that are known, but got {self.claim!r}, {self.basis!r}.")
        arrays = (self.numbers,) if self.since is None else (self.numbers, self.since)
        if any(array.shape != self.neurons.shape for array in arrays):
            came = [array.shape for array in arrays]
            raise UsageError(f"Expected {self.neurons.shape} numbers for the neurons of {self.layer}, but got {came}.")
        inside = self.neurons.size == 0 or (self.neurons[0] >= 0 and self.neurons[-1] < self.width)
        if not inside or (np.diff(self.neurons) <= 0).any():
            raise UsageError(f"Expected rising neurons below {self.width} for {self.layer}, but got {self.neurons}.")

    @property
    def source_label(self) -> str:
        """Who says so, as it is shown: the source, and whether it speaks of the whole layer."""
        return f"{self.source}, whole layer" if self.whole_layer or self.collapsed else self.source


@dataclass(frozen=True)
class Abstention:
    """A source that could say nothing, and why. Not known is never written as healthy.

    Attributes:
        source: As in :class:`Evidence`.
        layer: The layer it concerns; ``""`` for the whole checkpoint.
        reason: One sentence, with what to do about it where something can be done.
    """

    source: str
    layer: str
    reason: str
