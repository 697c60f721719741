"""Make the rows of an overview: one for each layer, or one for each group of layers if there are too many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neuronscope.arrays import BoolArray, FloatArray, IntArray
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import LEVEL_NOT_FINITE, LEVEL_UNSEEN, Report, SiteReport
from neuronscope.report.totals import NeuronCounts, Totals
from neuronscope.writers.grouping import Group, group_sites
from neuronscope.writers.wording import mark

__all__ = ["Row", "rows_of"]


@dataclass(frozen=True)
class Row:
    """One row of an overview (``W`` windows)."""

    label: str
    mark: str  # the mark of layers that are not in the totals; ``""`` for others
    sites: int  # number of layers in it
    steps: IntArray  # last step of each window, rising, int64 ``(W,)``
    share: FloatArray  # dead neurons ÷ observed neurons in each window, float64 ``(W,)``; NaN if none was observed
    not_finite: BoolArray  # whether any neuron gave NaN or infinity in each window, bool ``(W,)``
    observed: int  # neurons observed in the report's window
    dead: int  # dead neurons in it
    silent: int  # silent neurons in it
    dormant: int  # dormant neurons in it
    broken: int  # neurons in it that gave NaN or infinity


def rows_of(report: Report, most: int) -> list[Row]:
    """Return the rows that show a report's layers, in the order in which the layers ran.

    Args:
        report: The report.
        most: Most rows.
    """
    by_name = {site.name: site for site in report.layers}
    return [_row(group, [by_name[name] for name in group.sites]) for group in group_sites(list(by_name), most)]


def _row(group: Group, sites: list[SiteReport]) -> Row:
    """Return a row. In a group, a neuron counts once, and layers that are not in the totals do not count.

    A layer by itself shows its own neurons. So do layers that are all not in the totals.
    """
    totals = Totals(sites)
    counted = [site for site in sites if site.in_headlines]
    steps, dead, observed, broken = _histories(counted or sites) if not totals.shared else _history(totals)
    share = np.full(len(steps), np.nan)
    np.divide(dead, observed, out=share, where=observed > 0)
    holders: list[NeuronCounts] = [totals] if counted else [*sites]
    return Row(
        label=group.label,
        mark="" if counted else mark(sites[0]),
        sites=len(sites),
        steps=steps,
        share=share,
        not_finite=broken > 0,
        observed=sum(each.observed_neurons for each in holders),
        dead=sum(each.dead for each in holders),
        silent=sum(each.silent for each in holders),
        dormant=sum(each.dormant for each in holders),
        broken=sum(each.not_finite_neurons for each in holders),
    )


def _histories(sites: list[SiteReport]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return steps, dead, observed and not finite neurons of each window, int64 ``(W,)`` each, all sites added up."""
    steps = np.unique(np.concatenate([site.history.steps for site in sites]))
    dead, observed, broken = (np.zeros(len(steps), np.int64) for _ in range(3))
    for site in sites:
        at = np.searchsorted(steps, site.history.steps)
        levels = site.history.levels
        dead[at] += site.history.dead
        observed[at] += site.neurons - (levels == LEVEL_UNSEEN).sum(axis=1)
        broken[at] += (levels == LEVEL_NOT_FINITE).sum(axis=1)
    return steps, dead, observed, broken


def _history(totals: Totals) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return what :func:`_histories` returns, but count each neuron once."""
    steps = totals.steps()
    counts = np.array([np.bincount(totals.labels_at(int(step)), minlength=len(LABELS)) for step in steps], np.int64)
    counts = counts.reshape(len(steps), len(LABELS))
    dead, unseen, broken = (counts[:, LABELS.index(label)] for label in ("dead", "unseen", "not finite"))
    return steps, dead, totals.neurons - unseen, broken
