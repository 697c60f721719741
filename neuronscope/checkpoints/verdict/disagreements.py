"""Contests: where sources differ over whether neurons are dead, brought together by layer and by who says what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.checkpoints.verdict.evidence import CLAIMS, Evidence
from neuronscope.checkpoints.verdict.layer_verdicts import LABELS, LayerReport, contradicts

__all__ = ["Disagreement", "find_disagreements"]

#: Which claim speaks against which label, bool ``(claims, labels)``.
_AGAINST = np.array([[contradicts(claim, label) for label in LABELS] for claim in CLAIMS])


@dataclass(frozen=True, eq=False)
class Disagreement:
    """Neurons of one layer over which the same sources differ in the same way.

    Attributes:
        layer: The layer's name.
        neurons: Their indices, int64 ``(K,)``, rising.
        verdict: What the verdict on them rests on.
        numbers: The number behind each verdict, float64 ``(K,)``; NaN = none.
        against: What was said against it.
    """

    layer: str
    neurons: npt.NDArray[np.int64]
    verdict: Evidence
    numbers: npt.NDArray[np.float64]
    against: tuple[Evidence, ...]

    @property
    def silent_on_data(self) -> bool:
        """Whether they were silent on the data, while the optimizer had gradients for them lately.

        Such neurons most likely fire for other inputs. (They may also have died in the last steps.)
        """
        counted = self.verdict.claim == "dead" and self.verdict.basis == "measured"
        return counted and any(one.claim == "alive" and one.basis == "inferred" for one in self.against)


def find_disagreements(layers: Iterable[LayerReport]) -> list[Disagreement]:
    """All contests, layer by layer; each contested neuron is in one of them.

    Args:
        layers: The layers of a post-mortem.
    """
    return [contest for layer in layers for contest in _of_layer(layer)]


def _of_layer(layer: LayerReport) -> list[Disagreement]:
    neurons = np.flatnonzero(layer.contested)
    if not neurons.size:
        return []
    claims = np.array([CLAIMS.index(one.claim) for one in layer.evidence])
    said = np.array([np.isin(neurons, one.neurons) for one in layer.evidence])  # (evidence, contested)
    said &= _AGAINST[claims[:, None], layer.labels[neurons]]
    kinds, which = np.unique(np.vstack([layer.deciding[neurons], said]), axis=1, return_inverse=True)
    found = []
    for kind, (deciding, *against) in enumerate(kinds.T):
        mine = neurons[which.reshape(-1) == kind]
        others = tuple(one for one, speaks in zip(layer.evidence, against, strict=True) if speaks)
        found.append(Disagreement(layer.name, mine, layer.evidence[deciding], layer.numbers[mine], others))
    return sorted(found, key=lambda contest: int(contest.neurons[0]))
