"""Rows of an overview: a site each, or, where there are too many, a group of sites."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.report.report import LEVEL_NOT_FINITE, LEVEL_UNSEEN, Report, SiteReport
from neuronscope.writers.grouping import Group, group_sites

__all__ = ["Row", "rows_of"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One row of an overview (``W`` windows).

    Attributes:
        label: What it is called.
        sites: Number of sites in it.
        steps: Last step of each window, rising, int64 ``(W,)``.
        share: Dead neurons ÷ observed neurons in each window, float64 ``(W,)``; NaN where none was observed.
        not_finite: Whether a neuron gave NaN or infinity in each window, bool ``(W,)``.
        observed: Neurons observed in the report's window.
        dead: Dead neurons in it.
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
    dormant: int
    broken: int

    @property
    def dead_share(self) -> float:
        """Dead neurons ÷ observed ones in the report's window; NaN where none was observed."""
        return self.dead / self.observed if self.observed else float("nan")

    @property
    def dormant_share(self) -> float:
        """Dormant neurons ÷ observed ones in the report's window; NaN where none was observed."""
        return self.dormant / self.observed if self.observed else float("nan")


def rows_of(report: Report, most: int) -> list[Row]:
    """The rows that show a report's sites, at most ``most``, in the order in which the sites ran."""
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
        observed=sum(site.neurons - site.unseen for site in sites),
        dead=sum(site.dead for site in sites),
        dormant=sum(site.dormant for site in sites),
        broken=sum(int(site.judgement.not_finite.sum()) for site in sites),
    )
