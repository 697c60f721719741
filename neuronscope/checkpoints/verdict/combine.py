"""Assembly: what all sources say of the neurons of a layer, brought to one verdict each, contradictions kept.

1. *alive* speaks against *dead*, *never trained* and *no gradient*: a claim is **refuted** where *alive* stands on a
   surer basis, and **contested** where both were said at all. The other claims are true of a neuron that fires too.
2. A claim that is not refuted stands. Of what stands on firm ground (proved, measured, inferred) the most serious
   claim is the verdict, on the surest basis that it has; what is only suspected counts where nothing else stands.
3. Where nothing stands, the neuron is *unknown*, which is not *alive*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from neuronscope.checkpoints.verdict.evidence import BASES, CLAIMS, Evidence
from neuronscope.checkpoints.verdict.layer_verdicts import (
    DEAD_CLAIMS,
    NO_BASIS,
    UNKNOWN,
    BoolArray,
    ByteArray,
    Confirmation,
    IntArray,
    LayerReport,
)
from neuronscope.errors import UsageError
from neuronscope.judge.symptoms import UNDATED

__all__ = ["combine_evidence", "confirmations", "name_by_site"]

_ALIVE = CLAIMS.index("alive")
_DEAD = [CLAIMS.index(claim) for claim in DEAD_CLAIMS]
_FIRM = BASES.index("inferred")  # the last basis that is firm

#: What measuring must say of a neuron for a claim of it to have held.
HOLDS = {"dead": ("dead",), "never trained": ("dead", "no gradient"), "no gradient": ("dead", "no gradient")}


def combine_evidence(evidence: Sequence[Evidence], widths: Mapping[str, int] | None = None) -> tuple[LayerReport, ...]:
    """Bring evidence to verdicts, layer by layer.

    Args:
        evidence: Of any layers and sources, in any order.
        widths: Neurons by layer, in the order that the report is to have; a layer of which nothing is said is in the
            report too, and unknown. Layers that are not in it follow, in the order in which they are first named.

    Returns:
        One report a layer.

    Raises:
        UsageError: Two sources give one layer different widths.

    >>> one = Evidence("relu", 3, "weights", "dead", "proved", np.array([1]), np.array([np.nan]), "", "Zero row.")
    >>> combine_evidence([one])[0].label_of(1), combine_evidence([one])[0].label_of(0)
    ('dead', 'unknown')
    """
    known = dict(widths or {})
    layers: dict[str, list[Evidence]] = {name: [] for name in known}
    for one in evidence:
        layers.setdefault(one.layer, []).append(one)
        if known.setdefault(one.layer, one.width) != one.width:
            raise UsageError(
                f"Expected all evidence on {one.layer} to be of {known[one.layer]} neurons, but {one.source} has "
                f"{one.width}."
            )
    return tuple(_combine_layer(name, known[name], said) for name, said in layers.items())


def name_by_site(evidence: Sequence[Evidence], ties: Mapping[str, str]) -> list[Evidence]:
    """Evidence under the names of sites, where a module's path is tied to one of the same width.

    Args:
        evidence: From any source.
        ties: Site by the path of the module that holds its incoming weights.
    """
    widths = {one.layer: one.width for one in evidence}
    fits = {module: site for module, site in ties.items() if widths.get(module) == widths.get(site, widths.get(module))}
    return [replace(one, layer=fits.get(one.layer, one.layer)) for one in evidence]


def confirmations(layers: Sequence[LayerReport]) -> tuple[Confirmation, ...]:
    """How the claims that were not measured fared where they were: by source, claim and basis."""
    tally: dict[tuple[str, str, str], list[int]] = {}
    for layer in layers:
        measured = _measured(layer)
        if measured is None:
            continue
        for one in layer.evidence:
            if one.basis == "measured" or one.claim not in HOLDS:
                continue
            codes = measured[one.neurons]
            held = np.isin(codes, [CLAIMS.index(claim) for claim in HOLDS[one.claim]])
            counts = tally.setdefault((one.source_label, one.claim, one.basis), [0, 0, 0])
            for at, number in enumerate((held.sum(), (codes == _ALIVE).sum(), codes.size)):
                counts[at] += int(number)
    return tuple(
        Confirmation(*key, held=held, refuted=refuted, untested=total - held - refuted)
        for key, (held, refuted, total) in tally.items()
    )


def _measured(layer: LayerReport) -> ByteArray | None:
    """The most serious claim measured of each neuron, code into :data:`CLAIMS`; ``None`` where nothing was measured."""
    said = [one for one in layer.evidence if one.basis == "measured"]
    if not said:
        return None
    codes = np.full(layer.neurons, UNKNOWN, dtype=np.uint8)
    for one in sorted(said, key=lambda one: -CLAIMS.index(one.claim)):
        codes[one.neurons] = CLAIMS.index(one.claim)
    return codes


def _combine_layer(name: str, width: int, evidence: list[Evidence]) -> LayerReport:
    surest = np.full((len(CLAIMS), width), NO_BASIS, dtype=np.uint8)  # basis of each claim
    behind = np.full((len(CLAIMS), width), -1, dtype=np.int64)  # and whose it is
    for index, one in enumerate(evidence):
        claim, basis = CLAIMS.index(one.claim), BASES.index(one.basis)
        better = one.neurons[surest[claim, one.neurons] > basis]
        surest[claim, better], behind[claim, better] = basis, index
    alive = surest[_ALIVE]
    contested = (alive != NO_BASIS) & (surest[_DEAD] != NO_BASIS).any(axis=0)
    standing = surest.copy()
    for claim in _DEAD:
        standing[claim, alive < surest[claim]] = NO_BASIS
    firm = _most_serious(standing <= _FIRM)
    labels = np.where(firm == UNKNOWN, _most_serious(standing != NO_BASIS), firm)
    known = labels != UNKNOWN
    at = np.where(known, labels, 0), np.arange(width)
    deciding = np.where(known, behind[at], -1).astype(np.int64)
    numbers = np.full(width, np.nan)
    for index, one in enumerate(evidence):
        mine = deciding[one.neurons] == index
        numbers[one.neurons[mine]] = one.numbers[mine]
    since, dating = _since(labels, evidence)
    return LayerReport(
        name=name,
        labels=labels,
        basis=np.where(known, standing[at], NO_BASIS).astype(np.uint8),
        deciding=deciding,
        numbers=numbers,
        since=since,
        dating=dating,
        contested=contested,
        evidence=tuple(evidence),
    )


def _most_serious(stands: BoolArray) -> ByteArray:
    """The most serious claim that stands of each neuron, ``(N,)`` from ``(claims, N)``; UNKNOWN where none does."""
    return np.where(stands.any(axis=0), stands.argmax(axis=0), UNKNOWN).astype(np.uint8)


def _since(labels: ByteArray, evidence: list[Evidence]) -> tuple[IntArray, IntArray]:
    """Since when each verdict holds, by the surest source that can tell, and which source that is (−1 = none)."""
    since = np.full(labels.size, UNDATED, dtype=np.int64)
    dating = np.full(labels.size, -1, dtype=np.int64)
    for index in sorted(range(len(evidence)), key=lambda index: BASES.index(evidence[index].basis)):
        one = evidence[index]
        if one.since is None:
            continue
        claim = CLAIMS.index(one.claim)
        alike = _DEAD if claim in _DEAD else [claim]
        fits = np.isin(labels[one.neurons], alike) & (dating[one.neurons] < 0) & (one.since >= -1)
        since[one.neurons[fits]], dating[one.neurons[fits]] = one.since[fits], index
    return since, dating
