"""Verdicts on the neurons of one layer, with the basis of each and all evidence for and against it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from neuronscope.arrays import BoolArray, ByteArray, FloatArray, IntArray
from neuronscope.checkpoints.verdict.evidence import BASES, CLAIMS, PERMANENT, Evidence
from neuronscope.judge.symptoms import UNDATED

__all__ = [
    "DEAD_CLAIMS",
    "FIRM",
    "LABELS",
    "NO_BASIS",
    "UNKNOWN",
    "Confirmation",
    "InBox",
    "LayerReport",
    "PostmortemVerdict",
    "contradicts",
]


#: The labels that a neuron can have, most serious first.
LABELS = (*CLAIMS, "unknown")
#: Code of *unknown*: there is no valid evidence. This is not *alive*.
UNKNOWN = len(CLAIMS)
#: Claims that count as dead in totals and percentages: the neuron outputs nothing, or learns nothing.
DEAD_CLAIMS = ("dead", "never trained", "no gradient")
#: Bases that are *firm*: they count in totals and percentages. Suspected verdicts never do.
FIRM = ("proved", "measured", "inferred")
#: Code that stands for no basis.
NO_BASIS = 255

_FIRM_CODES = BASES.index(FIRM[-1])
#: Whether a label counts as dead, by its code.
_IS_GONE = np.array([label in DEAD_CLAIMS for label in LABELS])


@dataclass(frozen=True)
class PostmortemVerdict:
    """The verdict on one neuron, with its basis and all evidence for and against it.

    Attributes:
        site: Name of the layer.
        neuron: Number of the unit.
        label: One of :data:`LABELS`.
        basis: ``proved``, ``measured``, ``inferred`` or ``suspected``; ``""`` = nothing is known.
        source: Where the deciding evidence comes from.
        number: The number that supports it; ``None`` = none.
        measure: The meaning of the number, with its unit.
        since: Optimizer step from which it holds; −1 = from the start, ``None`` = not known.
        since_source: Where ``since`` comes from; ``""`` = not known.
        supports: All evidence for it, each as ``claim · basis · source``.
        contradictions: All evidence against it, in the same form.
        woken_by: Index into the report's ``waking_inputs`` of an input that makes it fire; ``None`` if none is known.
        permanent: Whether it is proved that no training on the same data revives it.
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
    woken_by: int | None = None
    permanent: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return {**asdict(self), "supports": list(self.supports), "contradictions": list(self.contradictions)}


@dataclass(frozen=True)
class Confirmation:
    """How often measurements on data agree with one kind of claim of one source."""

    source: str  # the source of the claims
    claim: str
    basis: str
    held: int  # number of neurons for which the measurement agrees
    refuted: int  # number of neurons for which the measurement shows the opposite
    untested: int  # number of neurons for which the measurement shows neither


class InBox(NamedTuple):
    """What is known of dead neurons for the inputs of the box."""

    dead: int  # how many neurons are dead, never trained or without gradient on a firm basis: the sum of the others
    proved: int  # number of those that are proved dead for every input of the box
    woken: int  # number of those that an input of the box makes fire
    open: int  # number of those for which neither is known


@dataclass(frozen=True, eq=False)
class LayerReport:
    """The verdicts on the ``N`` neurons of one layer, and the evidence for them.

    Attributes:
        name: Path of the layer; of a site whose units are not known, the site's name.
        labels: Index into :data:`LABELS`, uint8 ``(N,)``.
        basis: Index into ``BASES``, uint8 ``(N,)``; :data:`NO_BASIS` if the label is *unknown*.
        deciding: Index into ``evidence`` of the evidence that decides each verdict, int64 ``(N,)``; −1 = none.
        numbers: The number that supports each verdict, float64 ``(N,)``; NaN = none.
        since: Step from which each verdict holds, int64 ``(N,)``: −1 = from the start, ``UNDATED`` = not known.
        dating: Index into ``evidence`` of the evidence that ``since`` comes from, int64 ``(N,)``; −1 = none.
        contested: True for neurons with evidence of both *alive* or *silent* and its opposite, bool ``(N,)``.
        evidence: All evidence on the layer, used or not.
        sites: Names of the sites at which the neurons were seen.
        left_out: Why totals leave the layer out; ``""`` if they include it; see
            :class:`~neuronscope.checkpoints.verdict.join_units.JoinedLayer`.
        woken: Index into the report's ``waking_inputs`` of an input of the box that makes each neuron fire, int64
            ``(N,)``; −1 = none is known. ``None`` if none was searched for.
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
    sites: tuple[str, ...] = ()
    left_out: str = ""
    woken: IntArray | None = None

    def __repr__(self) -> str:
        return f"<LayerReport {self.name!r}: {self.dead} of {self.neurons} neurons dead>"

    @property
    def in_headlines(self) -> bool:
        """Whether totals include the layer."""
        return not self.left_out

    @cached_property
    def proved_dead(self) -> BoolArray:
        """True for neurons that are proved dead, bool ``(N,)``."""
        mask: BoolArray = (self.labels == CLAIMS.index("dead")) & (self.basis == BASES.index("proved"))
        return mask

    @cached_property
    def permanent(self) -> BoolArray:
        """True for dead neurons of which it is proved that no training on the same data revives them, bool ``(N,)``.

        See :class:`neuronscope.checkpoints.data.fixed_data.FixedData`.
        """
        proved = np.zeros(self.neurons, dtype=np.bool_)
        for one in self.evidence:
            if one.source == PERMANENT:
                proved[one.neurons] = True
        return proved & self.dead_mask

    @property
    def in_box(self) -> InBox | None:
        """How many of the dead neurons are proved dead, woken, or open; ``None`` if no input was searched for."""
        if self.woken is None:
            return None
        proved = self.dead_mask & self.proved_dead
        woken = self.dead_mask & ~proved & (self.woken >= 0)
        return InBox(self.dead, int(proved.sum()), int(woken.sum()), self.dead - int(proved.sum() + woken.sum()))

    @cached_property
    def listed(self) -> BoolArray:
        """True for neurons that are neither alive nor unknown, and for contested ones, bool ``(N,)``."""
        return self.contested | (self.labels < CLAIMS.index("alive"))

    @property
    def neurons(self) -> int:
        """The number of neurons, ``N``."""
        return int(self.labels.size)

    @cached_property
    def dead_or_suspected(self) -> BoolArray:
        """True for neurons that are dead, never trained or without gradient, suspected ones included, bool ``(N,)``."""
        mask: BoolArray = _IS_GONE[self.labels]
        return mask

    @cached_property
    def idle(self) -> BoolArray:
        """True for neurons without gradient because their whole layer gets none, bool ``(N,)``; not counted as dead."""
        whole = [index for index, one in enumerate(self.evidence) if one.whole_layer]
        if not whole:
            return np.zeros(self.neurons, dtype=np.bool_)
        mask: BoolArray = self.dead_or_suspected & (self.labels != CLAIMS.index("dead")) & np.isin(self.deciding, whole)
        return mask

    @cached_property
    def dead_mask(self) -> BoolArray:
        """True for neurons that are dead, never trained or without gradient on a firm basis, bool ``(N,)``."""
        return self.dead_or_suspected & ~self.idle & (self.basis <= _FIRM_CODES)

    @property
    def dead(self) -> int:
        """Number of neurons that are dead, never trained or without gradient on a firm basis."""
        return int(self.dead_mask.sum())

    @property
    def suspected(self) -> int:
        """Number of neurons that are only suspected to be dead, never trained or without gradient."""
        return int((self.dead_or_suspected & ~self.idle & (self.basis > _FIRM_CODES)).sum())

    @cached_property
    def collapse(self) -> str:
        """Whether the whole layer has collapsed: ``firm``, ``suspected``, or ``""`` for no.

        It is firm if every neuron is dead, never trained or without gradient on a firm basis. A layer of one neuron
        is never called collapsed.
        """
        if self.neurons < 2 or not self.dead_or_suspected.all():
            return ""
        if self.dead_mask.all():
            return "firm"
        claimed = any(one.collapsed for one in self.evidence)
        return "suspected" if claimed and not self.idle.any() else ""

    @property
    def dead_percent(self) -> float:
        """``dead`` in percent of the layer's neurons; NaN without neurons."""
        return 100.0 * self.dead / self.neurons if self.neurons else float("nan")

    @property
    def is_clocked(self) -> bool:
        """Whether ``since`` of any dead neuron is from a clock, and so the earliest possible step or an estimate."""
        return any(one.basis != "measured" for one in self._dating_evidence)

    @property
    def is_estimated(self) -> bool:
        """Whether ``since`` of any dead neuron is an estimate, from SGD's clock or a batch norm's."""
        return any(one.measure.endswith("about") for one in self._dating_evidence)

    @property
    def _dating_evidence(self) -> list[Evidence]:
        return [self.evidence[index] for index in set(self.dating[self.dead_mask & (self.since >= 0)].tolist())]

    def dead_by_basis(self) -> dict[str, int]:
        """Return the number of dead neurons by basis, the surest basis first."""
        by_basis = np.bincount(self.basis[self.dead_mask], minlength=len(BASES))
        return {basis: int(by_basis[BASES.index(basis)]) for basis in FIRM}

    def count(self, label: str) -> int:
        """Return the number of neurons with a label, on a firm basis if the label has one."""
        return int(self._firm_labels[LABELS.index(label)])

    @cached_property
    def _firm_labels(self) -> IntArray:
        """Number of neurons with each label, int64 ``(labels,)``; those that are only suspected to have it left out."""
        firm = (self.basis <= _FIRM_CODES) | (self.basis == NO_BASIS)
        return np.bincount(self.labels[firm], minlength=len(LABELS))

    def label_of(self, neuron: int) -> str:
        """Return the label of one neuron."""
        return LABELS[self.labels[neuron]]

    def verdict(self, neuron: int) -> PostmortemVerdict:
        """Return the verdict on one neuron with all evidence for and against it."""
        label = self.label_of(neuron)
        evidence = [one for one in self.evidence if neuron in one.neurons[np.searchsorted(one.neurons, neuron) :][:1]]
        against = [one for one in evidence if contradicts(one.claim, label)]
        deciding = self.evidence[self.deciding[neuron]] if self.deciding[neuron] >= 0 else None
        dating = self.evidence[self.dating[neuron]] if self.dating[neuron] >= 0 else None
        number = float(self.numbers[neuron])
        return PostmortemVerdict(
            site=self.name,
            neuron=neuron,
            label=label,
            basis=deciding.basis if deciding else "",
            source=deciding.source_label if deciding else "",
            number=None if np.isnan(number) else number,
            measure=deciding.measure if deciding else "",
            since=None if dating is None else int(self.since[neuron]),
            since_source=dating.source_label if dating else "",
            supports=tuple(_one_line(one) for one in evidence if one not in against),
            contradictions=tuple(map(_one_line, against)),
            woken_by=int(self.woken[neuron]) if self.woken is not None and self.woken[neuron] >= 0 else None,
            permanent=bool(self.permanent[neuron]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as plain data: all evidence, and each verdict that is contested or not alive or unknown."""
        listed = np.flatnonzero(self.listed)
        woken = None
        if self.woken is not None:
            neurons = np.flatnonzero(self.woken >= 0)
            woken = {"neuron": neurons.tolist(), "input": self.woken[neurons].tolist()}
        return {
            "name": self.name,
            "sites": list(self.sites),
            "in_headlines": self.in_headlines,
            "left_out": self.left_out or None,
            "neurons": self.neurons,
            "dead": self.dead,
            "suspected": self.suspected,
            "idle": int(self.idle.sum()),
            "collapse": self.collapse or None,
            "contested": int(self.contested.sum()),
            "labels": {label: int((self.labels == code).sum()) for code, label in enumerate(LABELS)},
            "dead_by_basis": self.dead_by_basis(),
            "verdicts": {
                "neuron": listed.tolist(),
                "label": [LABELS[code] for code in self.labels[listed]],
                "basis": [BASES[code] for code in self.basis[listed]],
                "evidence": self.deciding[listed].tolist(),
                "number": _plain(self.numbers[listed]),
                "since": [None if step == UNDATED else step for step in self.since[listed].tolist()],
                "contested": self.contested[listed].tolist(),
            },
            "permanent": np.flatnonzero(self.permanent).tolist(),
            "in_box": None if self.in_box is None else self.in_box._asdict(),
            "woken": woken,
            "evidence": [_evidence_as_dict(one) for one in self.evidence],
        }


def contradicts(claim: str, label: str) -> bool:
    """Whether a claim and a label cannot both be true.

    Args:
        claim: One of ``CLAIMS``.
        label: One of :data:`LABELS`.
    """
    if claim in ("alive", "silent"):
        return label in DEAD_CLAIMS
    if label == "silent":  # *dead* agrees with it that the output is zero
        return claim in ("never trained", "no gradient")
    return claim in DEAD_CLAIMS and label in ("alive", "quiet")


def _one_line(one: Evidence) -> str:
    return f"{one.claim} · {one.basis} · {one.source_label}"


def _evidence_as_dict(one: Evidence) -> dict[str, Any]:
    return {
        "source": one.source,
        "site": one.site or None,
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
