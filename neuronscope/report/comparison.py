"""Compare two reports on one network: which neurons died between them, which revived, which stayed dead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from neuronscope.arrays import BoolArray, ByteArray, IntArray
from neuronscope.judge.distinct import DistinctNeurons
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.rendering import Shown
from neuronscope.report.report import Report, SiteReport
from neuronscope.report.run_facts import death_steps

__all__ = ["LayerComparison", "ReportComparison", "compare_reports"]


_DEAD = LABELS.index("dead")
_NOT_JUDGED = [LABELS.index(label) for label in ("unseen", "not finite")]

#: Version of what :meth:`ReportComparison.to_dict` returns.
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """Hold which neurons of one layer died and revived between two reports.

    A neuron that one of the reports did not observe, or saw give NaN, is in none of the lists.

    Attributes:
        name: The layer's name.
        neurons: Number of its neurons.
        in_headlines: Whether totals include it.
        dead_before: Number of dead neurons in the first report.
        dead_after: Number of dead neurons in the second report.
        died: Indices of the neurons that were not dead and are now, int64.
        revived: Indices of the neurons that were dead and are not now, int64.
        died_step: Step of each death as far as the second report knows it, int64: −1 = it never saw the neuron fire,
            −2 = not known.
        broken: Number of neurons that give NaN or infinity now and did not.
    """

    name: str
    neurons: int
    in_headlines: bool
    dead_before: int
    dead_after: int
    died: IntArray
    revived: IntArray
    died_step: IntArray
    broken: int

    @property
    def changed(self) -> bool:
        """Whether a neuron died, revived or broke."""
        return bool(self.died.size or self.revived.size or self.broken)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison of the layer as plain data."""
        plain = vars(self).copy()
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in plain.items()}


@dataclass(frozen=True, eq=False, repr=False)
class ReportComparison(Shown):
    """Hold which neurons died and revived between two reports on one network.

    Attributes:
        before: The first report.
        after: The second report.
        layers: One :class:`LayerComparison` for each layer that both reports have with the same number of neurons.
        left_out: Layers that cannot be compared, each with the reason.
        died: Number of neurons in the totals that died. A neuron that goes through several activations counts once, by
            its most serious label, as in the reports.
        revived: Number of neurons in the totals that revived.
        compared: Number of neurons in the totals that both reports observed, with finite outputs.
    """

    WRITERS: ClassVar[Mapping[str, str]] = {
        "terminal": "neuronscope.writers.comparison_text",
        "html": "neuronscope.writers.html",
    }

    before: Report
    after: Report
    layers: tuple[LayerComparison, ...]
    left_out: tuple[tuple[str, str], ...]
    died: int
    revived: int
    compared: int

    @property
    def died_percent(self) -> float:
        """Neurons that died in percent of those that were compared; NaN if none was."""
        return 100.0 * self.died / self.compared if self.compared else float("nan")

    def _in_short(self) -> str:
        return f"of two reports: {self.died} neurons died, {self.revived} revived"

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        of = {
            name: {"model": one.model, "phase": one.phase, "global_step": one.global_step, "dead": one.dead}
            for name, one in (("before", self.before), ("after", self.after))
        }
        return {
            "schema_version": SCHEMA_VERSION,
            **of,
            "died": self.died,
            "revived": self.revived,
            "compared": self.compared,
            "layers": [layer.to_dict() for layer in self.layers],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
        }


def compare_reports(before: Report, after: Report) -> ReportComparison:
    """Compare two reports on one network: two steps of a run, two phases, two runs.

    Args:
        before: The first report.
        after: The second report.

    Returns:
        The neurons that died and revived, by layer, in the order of the second report.
    """
    first = {site.name: site for site in before.layers}
    pairs, left_out = [], []
    for site in after.layers:
        other = first.pop(site.name, None)
        if other is None:
            left_out.append((site.name, "only the second report has it"))
        elif other.neurons != site.neurons:
            left_out.append((site.name, f"it had {other.neurons:,} neurons and has {site.neurons:,}"))
        else:
            pairs.append((other, site))
    left_out += [(name, "only the first report has it") for name in first]
    distinct = DistinctNeurons([site for _, site in pairs])
    was, now = (distinct.label([pair[place].judgement.labels() for pair in pairs]) for place in (0, 1))
    died, revived, known = (int(mask.sum()) for mask in _changes(was, now))
    layers = tuple(_compare(*pair) for pair in pairs)
    return ReportComparison(before, after, layers, tuple(left_out), died, revived, known)


def _changes(was: ByteArray, now: ByteArray) -> tuple[BoolArray, BoolArray, BoolArray]:
    """Return which neurons died, which revived and which are known both times, by their labels before and after."""
    known = ~(np.isin(was, _NOT_JUDGED) | np.isin(now, _NOT_JUDGED))
    return known & (was != _DEAD) & (now == _DEAD), known & (was == _DEAD) & (now != _DEAD), known


def _compare(before: SiteReport, after: SiteReport) -> LayerComparison:
    was, now = before.judgement.labels(), after.judgement.labels()
    died, revived, _ = _changes(was, now)
    return LayerComparison(
        name=after.name,
        neurons=after.neurons,
        in_headlines=after.in_headlines,
        dead_before=before.dead,
        dead_after=after.dead,
        died=np.flatnonzero(died),
        revived=np.flatnonzero(revived),
        died_step=death_steps(after)[died],
        broken=int((after.judgement.not_finite & ~before.judgement.not_finite).sum()),
    )
