"""Combine the evidence of all sources into one verdict per neuron, and keep the contradictions.

1. *alive* contradicts *dead*, *never trained* and *no gradient*. Such a claim is **refuted** if *alive* has a surer
   basis, and **contested** if there is any evidence of *alive*. The other claims can be true of a neuron that fires.
   *silent* shows a measured gradient, so it contradicts them in the same way, with one exception: it agrees with *dead*
   that the output is zero and says more, since a neuron that gets a gradient is not dead. So *dead* gives way to a firm
   *silent*, and a suspected *dead* to a suspected *silent*, and neither is contested.
2. A claim that is not refuted is **valid**. The verdict is the most serious valid claim with a firm basis (proved,
   measured or inferred), on the surest basis that it has. A suspected claim is the verdict only if no valid claim has
   a firm basis.
3. Without a valid claim the neuron is *unknown*, which is not *alive*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neuronscope.arrays import BoolArray, ByteArray, FloatArray, IntArray
from neuronscope.checkpoints.verdict.evidence import BASES, CLAIMS, Evidence
from neuronscope.checkpoints.verdict.join_units import JoinedLayer
from neuronscope.checkpoints.verdict.layer_verdicts import (
    DEAD_CLAIMS,
    LABELS,
    NO_BASIS,
    UNKNOWN,
    Confirmation,
    LayerReport,
    contradicts,
)
from neuronscope.errors import UsageError
from neuronscope.judge.symptoms import UNDATED

__all__ = ["Disagreement", "combine_evidence", "confirmations", "find_disagreements"]

_ALIVE = CLAIMS.index("alive")
_SILENT = CLAIMS.index("silent")
_ZERO_OUTPUT = CLAIMS.index("dead")
_DEAD = [CLAIMS.index(claim) for claim in DEAD_CLAIMS]
_MEASURED = BASES.index("measured")
_FIRM = BASES.index("inferred")  # the last basis that is firm

#: Whether a claim contradicts a label, bool ``(claims, labels)``.
_CONTRADICTS = np.array([[contradicts(claim, label) for label in LABELS] for claim in CLAIMS])
#: For each claim, the measured claims that agree with it.
AGREEING_CLAIMS = {
    "dead": ("dead", "silent"),
    "never trained": ("dead", "no gradient"),
    "no gradient": ("dead", "no gradient"),
}


def combine_evidence(
    evidence: Sequence[Evidence], layers: Mapping[str, JoinedLayer] | None = None
) -> tuple[LayerReport, ...]:
    """Combine evidence into verdicts: one report per layer.

    Args:
        evidence: Evidence on any layers from any sources, in any order.
        layers: The layers by name, in the order of the report. A layer without evidence is included, as unknown.
            Layers that are missing here follow in the order in which the evidence names them.

    Raises:
        UsageError: Two sources disagree on the width of a layer.

    >>> one = Evidence("relu", 3, "weights", "dead", "proved", np.array([1]), np.array([np.nan]), "", "Zero row.")
    >>> combine_evidence([one])[0].label_of(1), combine_evidence([one])[0].label_of(0)
    ('dead', 'unknown')
    """
    known = dict(layers or {})
    by_layer: dict[str, list[Evidence]] = {name: [] for name in known}
    for one in evidence:
        by_layer.setdefault(one.layer, []).append(one)
        width = known.setdefault(one.layer, JoinedLayer(one.width)).width
        if width != one.width:
            raise UsageError(
                f"Expected all evidence on {one.layer} to be of {width} neurons, but {one.source} has {one.width}."
            )
    return tuple(_combine_layer(name, known[name], found) for name, found in by_layer.items())


def confirmations(layers: Sequence[LayerReport]) -> tuple[Confirmation, ...]:
    """Count how often measurements agree with all other claims, by source, claim and basis."""
    tally: dict[tuple[str, str, str], list[int]] = {}
    for layer in layers:
        measured = _measured(layer)
        if measured is None:
            continue
        for one in layer.evidence:
            if one.basis == "measured" or one.claim not in AGREEING_CLAIMS:
                continue
            codes = measured[one.neurons]
            held = np.isin(codes, [CLAIMS.index(claim) for claim in AGREEING_CLAIMS[one.claim]])
            counts = tally.setdefault((one.source_label, one.claim, one.basis), [0, 0, 0])
            refuted = np.isin(codes, (_ALIVE, _SILENT)) & ~held
            for at, number in enumerate((held.sum(), refuted.sum(), codes.size)):
                counts[at] += int(number)
    return tuple(
        Confirmation(*key, held=held, refuted=refuted, untested=total - held - refuted)
        for key, (held, refuted, total) in tally.items()
    )


def _measured(layer: LayerReport) -> ByteArray | None:
    """Return the most serious measured claim on each neuron, as an index, uint8 ``(N,)``; ``None`` without any."""
    evidence = [one for one in layer.evidence if one.basis == "measured"]
    if not evidence:
        return None
    codes = np.full(layer.neurons, UNKNOWN, dtype=np.uint8)
    for one in sorted(evidence, key=lambda one: -CLAIMS.index(one.claim)):
        codes[one.neurons] = CLAIMS.index(one.claim)
    return codes


def _combine_layer(name: str, layer: JoinedLayer, evidence: list[Evidence]) -> LayerReport:
    width = layer.width
    surest = np.full((len(CLAIMS), width), NO_BASIS, dtype=np.uint8)  # the surest basis of each claim
    surest_evidence = np.full((len(CLAIMS), width), -1, dtype=np.int64)  # the evidence that has it
    for index, one in enumerate(evidence):
        claim, basis = CLAIMS.index(one.claim), BASES.index(one.basis)
        better = one.neurons[surest[claim, one.neurons] > basis]
        surest[claim, better], surest_evidence[claim, better] = basis, index
    valid = surest.copy()  # the basis of each claim that is not refuted
    silent = surest[_SILENT]
    refined = (silent <= _FIRM) | ((silent != NO_BASIS) & (surest[_ZERO_OUTPUT] > _FIRM))
    valid[_ZERO_OUTPUT, refined] = NO_BASIS
    # A silent neuron's gradient was counted: however few examples there were, that is measured.
    gradient = np.minimum(surest[_ALIVE], np.where(silent != NO_BASIS, _MEASURED, NO_BASIS))
    contested = (gradient != NO_BASIS) & (valid[_DEAD] != NO_BASIS).any(axis=0)
    for claim in _DEAD:
        valid[claim, gradient < surest[claim]] = NO_BASIS
    firm = _most_serious(valid <= _FIRM)
    labels = np.where(firm == UNKNOWN, _most_serious(valid != NO_BASIS), firm)
    known = labels != UNKNOWN
    at = np.where(known, labels, 0), np.arange(width)
    deciding = np.where(known, surest_evidence[at], -1).astype(np.int64)
    numbers = np.full(width, np.nan)
    for index, one in enumerate(evidence):
        decided = deciding[one.neurons] == index
        numbers[one.neurons[decided]] = one.numbers[decided]
    since, dating = _since(labels, evidence)
    return LayerReport(
        name=name,
        labels=labels,
        basis=np.where(known, valid[at], NO_BASIS).astype(np.uint8),
        deciding=deciding,
        numbers=numbers,
        since=since,
        dating=dating,
        contested=contested,
        evidence=tuple(evidence),
        sites=layer.sites,
        left_out=layer.left_out,
    )


def _most_serious(valid: BoolArray) -> ByteArray:
    """Return the most serious valid claim on each neuron, ``(N,)`` from ``(claims, N)``, or UNKNOWN without one."""
    return np.where(valid.any(axis=0), valid.argmax(axis=0), UNKNOWN).astype(np.uint8)


def _since(labels: ByteArray, evidence: list[Evidence]) -> tuple[IntArray, IntArray]:
    """Return the step from which each verdict holds, and the index of the surest evidence that has one.

    Both are int64 ``(N,)``; the index is −1 if no evidence has a step.
    """
    since = np.full(labels.size, UNDATED, dtype=np.int64)
    dating = np.full(labels.size, -1, dtype=np.int64)
    for index in sorted(range(len(evidence)), key=lambda index: BASES.index(evidence[index].basis)):
        one = evidence[index]
        if one.since is None:
            continue
        claim = CLAIMS.index(one.claim)
        same_kind = _DEAD if claim in _DEAD else [claim]
        fits = np.isin(labels[one.neurons], same_kind) & (dating[one.neurons] < 0) & (one.since >= -1)
        since[one.neurons[fits]], dating[one.neurons[fits]] = one.since[fits], index
    return since, dating


@dataclass(frozen=True, eq=False)
class Disagreement:
    """A group of ``K`` neurons of one layer on which the same sources disagree in the same way."""

    layer: str  # the layer's name
    neurons: IntArray  # indices of the neurons, int64 ``(K,)``, increasing
    verdict: Evidence  # the evidence that decides the verdict on them
    numbers: FloatArray  # the number that supports each verdict, float64 ``(K,)``; NaN = none
    against: tuple[Evidence, ...]  # the evidence that contradicts the verdict

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
    """Return all disagreements, layer by layer; each contested neuron is in exactly one of them."""
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
