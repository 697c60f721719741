"""Evidence: a claim of one source about neurons of one layer, as arrays, with the basis of the claim.

Everything that examines a checkpoint returns :class:`Evidence` and :class:`Abstention`. :mod:`.combine` turns them
into verdicts. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from neuronscope.arrays import FloatArray, IntArray
from neuronscope.errors import UsageError

__all__ = ["BASES", "CLAIMS", "PERMANENT", "Abstention", "Evidence", "evidence_on_site", "evidence_where"]

#: The possible claims about a neuron, most serious first.
CLAIMS = (
    "not finite",  # one of its weights, its bias or its output is NaN or infinite
    "dead",  # its output is always zero, or was zero at every position that was counted
    "silent",  # its output was zero at every position that was counted, but it got a gradient
    "never trained",  # none of its incoming weights ever got a gradient
    "no gradient",  # none of its incoming weights got a gradient recently
    "zero row",  # all of its incoming weights are zero
    "unread",  # its output cannot reach the network's output: all its outgoing weights are zero or lead to dead neurons
    "quiet",  # it fires rarely, if at all
    "alive",  # it fires, or gets a gradient; contradicts "dead", "never trained" and "no gradient"
)

#: The possible bases of a claim, surest first. *proved*: true for every input (of the box, if one was given);
#: *measured*: counted exactly on data; *inferred*: follows from the optimizer state or the weights; *suspected*: likely
#: under an assumption that the text names.
BASES = ("proved", "measured", "inferred", "suspected")

#: The source of proofs that no training on the same data gives a neuron a gradient.
PERMANENT = "fixed data"


@dataclass(frozen=True, eq=False)
class Evidence:
    """One claim of one source about ``K`` of the ``N`` neurons of a layer.

    Raises:
        UsageError: A claim or basis is unknown, shapes differ, or ``neurons`` is not increasing within the width.
    """

    #: Path of the layer; of evidence on a site, its name, until
    #: :func:`~neuronscope.checkpoints.verdict.join_units.join_units` has found the units of layers.
    layer: str
    width: int  # ``N``
    source: str  # where the claim comes from: ``monitor record``, ``adam state``, ``weights``, ``batch norm`` …
    claim: str  # one of :data:`CLAIMS`
    basis: str  # one of :data:`BASES`
    neurons: IntArray  # indices along the layer's neuron axis, int64 ``(K,)``, strictly increasing
    numbers: FloatArray  # a number that supports the claim for each neuron, float64 ``(K,)``; NaN = none
    measure: str  # the meaning of the numbers, with their unit: ``steps since its last gradient, at most``
    text: str  # an explanation for the reader: the reason, its bound and its limits
    #: Optimizer step from which the claim holds for each neuron, int64 ``(K,)``: −1 = from the start; ``None`` if the
    #: source does not know.
    since: IntArray | None = None
    #: True if the claim holds only because the whole layer was frozen, or cut off by a later layer. It then says
    #: nothing about the single neurons.
    whole_layer: bool = False
    #: True if the claim holds because the layer has collapsed: all its neurons output zero, and nothing passes it.
    collapsed: bool = False
    site: str = ""  # name of the site that the claim is about; ``""`` if it is about the layer's weights

    def __post_init__(self) -> None:
        if self.claim not in CLAIMS or self.basis not in BASES:
            raise UsageError(f"Expected a claim and a basis that are known, but got {self.claim!r}, {self.basis!r}.")
        arrays = (self.numbers,) if self.since is None else (self.numbers, self.since)
        if any(array.shape != self.neurons.shape for array in arrays):
            shapes = [array.shape for array in arrays]
            raise UsageError(
                f"Expected {self.neurons.shape} numbers for the neurons of {self.layer}, but got {shapes}."
            )
        inside = self.neurons.size == 0 or (self.neurons[0] >= 0 and self.neurons[-1] < self.width)
        if not inside or (np.diff(self.neurons) <= 0).any():
            raise UsageError(f"Expected rising neurons below {self.width} for {self.layer}, but got {self.neurons}.")

    @property
    def source_label(self) -> str:
        """The source as reports show it: with "whole layer" if the claim is about the layer as a whole."""
        return f"{self.source}, whole layer" if self.whole_layer or self.collapsed else self.source


def evidence_where(
    layer: str, mask: ArrayLike, numbers: ArrayLike | None = None, *, since: ArrayLike | None = None, **fields: Any
) -> Iterator[Evidence]:
    """Yield evidence on those ``K`` of the ``N`` neurons of a layer or site that a mask selects, if there are any.

    Args:
        layer: The layer, or the site's name.
        mask: The neurons that the claim holds for, bool ``(N,)``; like the other arrays, of numpy or of torch.
        numbers: A number for each of the ``N`` neurons, float64 ``(N,)``; ``None`` = none.
        since: Optimizer step for each of the ``N`` neurons, int64 ``(N,)``; ``None`` = not known.
        **fields: The other attributes of :class:`Evidence`.
    """
    mask = np.asarray(mask)
    neurons = np.flatnonzero(mask).astype(np.int64)
    if neurons.size:
        yield Evidence(
            layer=layer,
            width=len(mask),
            neurons=neurons,
            numbers=np.full(neurons.size, np.nan) if numbers is None else np.asarray(numbers)[neurons],
            since=None if since is None else np.asarray(since)[neurons],
            **{"measure": "", **fields},
        )


def evidence_on_site(name: str, mask: ArrayLike, numbers: ArrayLike | None = None, **fields: Any) -> Iterator[Evidence]:
    """Yield evidence on neurons of a site.

    Args:
        name: The site's name.
        mask: The neurons, bool ``(N,)``.
        numbers: A number for each neuron of the site, float64 ``(N,)``.
        **fields: As for :func:`evidence_where`.
    """
    return evidence_where(name, mask, numbers, site=name, **fields)


@dataclass(frozen=True)
class Abstention:
    """A source that could not examine a layer, and why. An unknown neuron is never reported as healthy."""

    source: str  # as in :class:`Evidence`
    layer: str  # the layer concerned; ``""`` for the whole checkpoint
    reason: str  # one sentence, with a remedy if there is one
