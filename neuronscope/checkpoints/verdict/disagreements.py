"""Find disagreements: groups of neurons of which some evidence says that they are dead and some that they are alive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from neuronscope.arrays import FloatArray, IntArray
from neuronscope.checkpoints.verdict.evidence import CLAIMS, Evidence
from neuronscope.checkpoints.verdict.layer_verdicts import LABELS, LayerReport, contradicts

__all__ = ["Disagreement", "find_disagreements"]

#: Whether a claim contradicts a label, bool ``(claims, labels)``.
_CONTRADICTS = np.array([[contradicts(claim, label) for label in LABELS] for claim in CLAIMS])


@dataclass(frozen=True, eq=False)
class Disagreement:
    """A group of ``K`` neurons of one layer on which the same sources disagree in the same way.

    Attributes:
        layer: The layer's name.
        neurons: Indices of the neurons, int64 ``(K,)``, increasing.
        verdict: The evidence that decides the verdict on them.
        numbers: The number that supports each verdict, float64 ``(K,)``; NaN = none.
        against: The evidence that contradicts the verdict.
    """

    layer: str
    neurons: IntArray
    verdict: Evidence
    numbers: FloatArray
    against: tuple[Evidence, ...]

    @property
    def alive_in_training(self) -> tuple[str, ...]:
        """The sources that say, without data, that the neurons fired or got a gradient in recent training steps."""
        return tuple(one.source_label for one in self.against if one.claim == "alive" and one.basis == "inferred")

    @property
    def silent_on_data(self) -> bool:
        """Whether the neurons never fired on the data, although they were alive in recent training steps.

        Such neurons most likely fire for other inputs. (They may also have died in the last steps.)
        """
        counted = self.verdict.claim == "dead" and self.verdict.basis == "measured"
        return counted and bool(self.alive_in_training)


def find_disagreements(layers: Iterable[LayerReport]) -> list[Disagreement]:
    """Return all disagreements, layer by layer; each contested neuron is in exactly one of them.

    Args:
        layers: The layers of a post-mortem.
    """
    return [disagreement for layer in layers for disagreement in _in_layer(layer)]


def _in_layer(layer: LayerReport) -> list[Disagreement]:
    neurons = np.flatnonzero(layer.contested)
    if not neurons.size:
        return []
    claims = np.array([CLAIMS.index(one.claim) for one in layer.evidence])
    against = np.array([np.isin(neurons, one.neurons) for one in layer.evidence])  # (evidence, contested)
    against &= _CONTRADICTS[claims[:, None], layer.labels[neurons]]
    groups, group_of = np.unique(np.vstack([layer.deciding[neurons], against]), axis=1, return_inverse=True)
    found = []
    for group, (deciding, *is_against) in enumerate(groups.T):
        members = neurons[group_of.reshape(-1) == group]
        contradicting = tuple(one for one, flag in zip(layer.evidence, is_against, strict=True) if flag)
        found.append(Disagreement(layer.name, members, layer.evidence[deciding], layer.numbers[members], contradicting))
    return sorted(found, key=lambda disagreement: int(disagreement.neurons[0]))
