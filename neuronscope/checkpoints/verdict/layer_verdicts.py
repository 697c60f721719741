"""Verdicts: what is said of each neuron of one layer, on what ground, and all that was said for and against it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from neuronscope.checkpoints.verdict.evidence import BASES, CLAIMS, Evidence
from neuronscope.judge.symptoms import UNDATED

__all__ = [
    "DEAD_CLAIMS",
    "FIRM",
    "LABELS",
    "NO_BASIS",
    "UNKNOWN",
    "Confirmation",
    "LayerReport",
    "PostmortemVerdict",
    "contradicts",
]

BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: Every label that a neuron can bear, most serious first.
LABELS = (*CLAIMS, "unknown")
#: Code of *unknown*: no source said anything that stands. This is not *alive*.
UNKNOWN = len(CLAIMS)
#: Claims that are counted as dead in totals and shares: it gives nothing, or learns nothing.
DEAD_CLAIMS = ("dead", "never trained", "no gradient")
#: Bases that count in totals and shares. What is only suspected never does.
FIRM = ("proved", "measured", "inferred")
#: Code of the basis where there is none.
NO_BASIS = 255

_FIRM_CODES = BASES.index(FIRM[-1])
_GONE_CODES = [CLAIMS.index(claim) for claim in DEAD_CLAIMS]


@dataclass(frozen=True)
class PostmortemVerdict:
    """What is said of one neuron, on what ground, and what else was said of it.

    Attributes:
        site: Name of the site, or the path of the module that holds the incoming weights.
        neuron: Index along the neuron axis.
        label: One of :data:`LABELS`.
        basis: ``proved``, ``measured``, ``inferred`` or ``suspected``; ``""`` where nothing is known.
        source: Who says so.
        number: The number behind it; ``None`` where there is none.
        measure: What the number is, with its unit.
        since: Optimizer step from which it holds; −1 = since the beginning, ``None`` = not known.
        since_source: Who says since when; ``""`` = nobody.
        supports: All that was said for it, each as ``claim · basis · source``.
        contradictions: All that was said against it, likewise.
    """

    site: str
    neuron: int
    label: str
    basis: str
    source: str
    number: float | None
    measure: str
    since: int | None
    since_source: str
    supports: tuple[str, ...]
    contradictions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain data."""
        return {**asdict(self), "supports": list(self.supports), "contradictions": list(self.contradictions)}


@dataclass(frozen=True)
class Confirmation:
    """How one source's claims fared where the model was run over data.

    Attributes:
        source: Who claimed.
        claim: What.
        basis: On what ground.
        held: Neurons of which measuring says the same.
        refuted: Neurons that measuring found alive.
        untested: Neurons of which measuring says neither.
    """

    source: str
    claim: str
    basis: str
    held: int
    refuted: int
    untested: int


@dataclass(frozen=True, eq=False)
class LayerReport:
    """The verdicts on one layer's ``N`` neurons, and the evidence that they rest on.

    Attributes:
        name: Site name, or the path of the module that holds the incoming weights.
        labels: Code into :data:`LABELS`, uint8 ``(N,)``.
        basis: Code into ``BASES``, uint8 ``(N,)``; :data:`NO_BASIS` where the label is *unknown*.
        deciding: Index into ``evidence`` of what the verdict rests on, int64 ``(N,)``; −1 = none.
        numbers: The number behind each verdict, float64 ``(N,)``; NaN = none.
        since: Step from which each verdict holds, int64 ``(N,)``: −1 = since the beginning, ``UNDATED`` = not known.
        dating: Index into ``evidence`` of what tells since when, int64 ``(N,)``; −1 = none.
        contested: Neurons of which both *alive* and its opposite were said, bool ``(N,)``.
        evidence: All that was said, whatever came of it.
    """

    name: str
    labels: ByteArray
    basis: ByteArray
    deciding: IntArray
    numbers: FloatArray
    since: IntArray
    dating: IntArray
    contested: BoolArray
    evidence: tuple[Evidence, ...]

    @property
    def neurons(self) -> int:
        """``N``."""
        return int(self.labels.size)

    @cached_property
    def dead_or_suspected(self) -> BoolArray:
        """Neurons that are dead, never trained or without gradient, on whatever ground, bool ``(N,)``."""
        return np.isin(self.labels, _GONE_CODES)

    @cached_property
    def idle(self) -> BoolArray:
        """Neurons that get no gradient because their whole layer gets none, bool ``(N,)``; not counted as dead."""
        whole = [index for index, one in enumerate(self.evidence) if one.whole_layer]
        mask: BoolArray = self.dead_or_suspected & (self.labels != CLAIMS.index("dead")) & np.isin(self.deciding, whole)
        return mask

    @cached_property
    def dead_mask(self) -> BoolArray:
        """Neurons that are dead, never trained or without gradient, on firm ground, bool ``(N,)``."""
        return self.dead_or_suspected & ~self.idle & (self.basis <= _FIRM_CODES)

    @property
    def dead(self) -> int:
        """Neurons that are dead, never trained or without gradient: proved, measured or inferred."""
        return int(self.dead_mask.sum())

    @property
    def suspected(self) -> int:
        """Neurons that are only suspected to be so."""
        return int((self.dead_or_suspected & ~self.idle & (self.basis > _FIRM_CODES)).sum())

    @cached_property
    def collapse(self) -> str:
        """How sure it is that the whole layer has collapsed: ``firm``, ``suspected`` or ``""``.

        Firm where every neuron is dead, never trained or without gradient on firm ground. A layer of one neuron is
        not called so.
        """
        if self.neurons < 2 or not self.dead_or_suspected.all():
            return ""
        if self.dead_mask.all():
            return "firm"
        told = any(one.collapsed for one in self.evidence)
        return "suspected" if told and not self.idle.any() else ""

    @property
    def dead_percent(self) -> float:
        """``dead`` in percent of the layer."""
        return 100.0 * self.dead / self.neurons if self.neurons else float("nan")

    @property
    def is_clocked(self) -> bool:
        """Whether any step since when a neuron is dead is inferred: the earliest possible, by the optimizer's clock."""
        dating = {int(index) for index in np.unique(self.dating[self.dead_mask & (self.since >= 0)])}
        return any(self.evidence[index].basis != "measured" for index in dating)

    def dead_by_basis(self) -> dict[str, int]:
        """``dead`` by its basis, surest first."""
        return {basis: int((self.dead_mask & (self.basis == BASES.index(basis))).sum()) for basis in FIRM}

    def count(self, label: str) -> int:
        """Neurons that bear a label, on firm ground where it has a basis."""
        return int(
            ((self.labels == LABELS.index(label)) & ((self.basis <= _FIRM_CODES) | (self.basis == NO_BASIS))).sum()
        )

    def label_of(self, neuron: int) -> str:
        """The label of one neuron."""
        return LABELS[self.labels[neuron]]

    def verdict(self, neuron: int) -> PostmortemVerdict:
        """All that is said of one neuron."""
        label = self.label_of(neuron)
        said = [one for one in self.evidence if neuron in one.neurons[np.searchsorted(one.neurons, neuron) :][:1]]
        against = [one for one in said if contradicts(one.claim, label)]
        behind = self.evidence[self.deciding[neuron]] if self.deciding[neuron] >= 0 else None
        dating = self.evidence[self.dating[neuron]] if self.dating[neuron] >= 0 else None
        number = float(self.numbers[neuron])
        return PostmortemVerdict(
            site=self.name,
            neuron=neuron,
            label=label,
            basis=behind.basis if behind else "",
            source=behind.source_label if behind else "",
            number=None if np.isnan(number) else number,
            measure=behind.measure if behind else "",
            since=None if dating is None else int(self.since[neuron]),
            since_source=dating.source_label if dating else "",
            supports=tuple(_said(one) for one in said if one not in against),
            contradictions=tuple(map(_said, against)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The layer as plain data: what is not plainly alive or unknown neuron by neuron, and all evidence."""
        told = np.flatnonzero(self.contested | (self.labels < CLAIMS.index("alive")))
        return {
            "name": self.name,
            "neurons": self.neurons,
            "dead": self.dead,
            "suspected": self.suspected,
            "idle": int(self.idle.sum()),
            "collapse": self.collapse or None,
            "contested": int(self.contested.sum()),
            "labels": {label: int((self.labels == code).sum()) for code, label in enumerate(LABELS)},
            "dead_by_basis": self.dead_by_basis(),
            "verdicts": {
                "neuron": told.tolist(),
                "label": [LABELS[code] for code in self.labels[told]],
                "basis": [BASES[code] for code in self.basis[told]],
                "evidence": self.deciding[told].tolist(),
                "number": _plain(self.numbers[told]),
                "since": [None if step == UNDATED else step for step in self.since[told].tolist()],
                "contested": self.contested[told].tolist(),
            },
            "evidence": [_evidence_as_dict(one) for one in self.evidence],
        }


def contradicts(claim: str, label: str) -> bool:
    """Whether a claim cannot be true where a label is."""
    return (claim == "alive" and label in DEAD_CLAIMS) or (claim in DEAD_CLAIMS and label in ("alive", "quiet"))


def _said(one: Evidence) -> str:
    return f"{one.claim} · {one.basis} · {one.source_label}"


def _evidence_as_dict(one: Evidence) -> dict[str, Any]:
    return {
        "source": one.source,
        "whole_layer": one.whole_layer,
        "collapsed": one.collapsed,
        "claim": one.claim,
        "basis": one.basis,
        "measure": one.measure,
        "text": one.text,
        "neuron": one.neurons.tolist(),
        "number": _plain(one.numbers),
        "since": None if one.since is None else one.since.tolist(),
    }


def _plain(values: FloatArray) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.tolist()]
