"""Makes the rows of an overview: one for each layer, or one for each group of layers if there are too many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.report.report import LEVEL_NOT_FINITE, LEVEL_UNSEEN, Report, SiteReport
from neuronscope.writers.grouping import Group, group_sites
from neuronscope.writers.wording import observed as neurons_observed

__all__ = ["Row", "rows_of"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One row of an overview (``W`` windows).

    Attributes:
        label: Its name.
        sites: Number of layers in it.
        steps: Last step of each window, rising, int64 ``(W,)``.
        share: Dead neurons ÷ observed neurons in each window, float64 ``(W,)``; NaN if none was observed.
        not_finite: Whether any neuron gave NaN or infinity in each window, bool ``(W,)``.
        observed: Neurons observed in the report's window.
        dead: Dead neurons in it.
        silent: Silent neurons in it.
        dormant: Dormant neurons in it.
        broken: Neurons in it that gave NaN or infinity.
    """

    label: str
    sites: int
    steps: IntArray
    share: FloatArray
    not_finite: npt.NDArray[np.bool_]
    observed: int
    dead: int
    silent: int
    dormant: int
    broken: int


def rows_of(report: Report, most: int) -> list[Row]:
    """Return the rows that show a report's layers, in the order in which the layers ran.

    Args:
        report: The report.
        most: Most rows.
    """
    by_name = {site.name: site for site in report.layers}
    return [_row(group, [by_name[name] for name in group.sites]) for group in group_sites(list(by_name), most)]


def _row(group: Group, sites: list[SiteReport]) -> Row:
    steps = np.unique(np.concatenate([site.history.steps for site in sites]))
    dead, observed, broken = (np.zeros(len(steps), np.int64) for _ in range(3))
    for site in sites:
        at = np.searchsorted(steps, site.history.steps)
        levels = site.history.levels
        dead[at] += site.history.dead
        observed[at] += site.neurons - (levels == LEVEL_UNSEEN).sum(axis=1)
        broken[at] += (levels == LEVEL_NOT_FINITE).sum(axis=1)
    share = np.full(len(steps), np.nan)
    np.divide(dead, observed, out=share, where=observed > 0)
    return Row(
        label=group.label,
        sites=len(sites),
        steps=steps,
        share=share,
        not_finite=broken > 0,
        observed=sum(map(neurons_observed, sites)),
        dead=sum(site.dead for site in sites),
        silent=sum(site.silent for site in sites),
        dormant=sum(site.dormant for site in sites),
        broken=sum(int(site.judgement.not_finite.sum()) for site in sites),
    )
