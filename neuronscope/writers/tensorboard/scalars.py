"""Scalars: the few numbers a run is judged by, as tags and floats for whatever logger there is.

What was not measured has no value here: a number that is missing leaves a gap in a chart, a zero would be a lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from neuronscope.report.report import LEVEL_DEAD, LEVEL_NOT_FINITE, LEVEL_UNSEEN, Report, SiteHistory, SiteReport
from neuronscope.writers.tensorboard.tags import group_tag, groups, metric

__all__ = ["scalars", "turnover"]

BoolArray = npt.NDArray[np.bool_]


def scalars(report: Report, *, since: int | None = None, per_site: bool = True) -> dict[str, float]:
    """The report's numbers by tag, for any logger.

    Percentages are of the neurons that were observed. Phases other than ``train`` have their name before the metric's:
    ``neuronscope/val_dead_pct``.

    - What matters, in one group: ``neuronscope/dead_pct``, ``neuronscope/dormant_pct``, ``neuronscope/not_finite_pct``,
      and, of training, ``neuronscope/deaths`` and ``neuronscope/revivals``: how many neurons died and revived in the
      windows after ``since``.
    - What one asks next: ``neuronscope.more/born_dead_pct``, the part of the dead that never fired since watching
      began, and ``neuronscope.more/cut_off_pct`` (only where gradients were seen).

    By site (or, in networks of more than 40 sites, by group of sites): ``neuronscope.dead_pct/<site>`` and
    ``neuronscope.dormant_pct/<site>``. A network that gives nothing but NaN has no dead share;
    ``not_finite_pct`` says 100.

    Args:
        report: The report.
        since: Step of the report that was logged before this one (its own ``report.global_step``), so that no death
            falls between two logs; ``None`` counts the last window alone.
        per_site: Whether to give the numbers of the sites too.

    Returns:
        Finite floats by tag, in a stable order.
    """
    sites = report.layers
    found = dict(_shares(sites))
    with_gradient = [site for site in sites if site.gradient_positions > 0]
    if observed := _observed(with_gradient):
        found["cut_off_pct"] = 100.0 * sum(site.cut_off for site in with_gradient) / observed
    if report.phase == "train" and any(len(site.history.steps) for site in sites):
        changes = [turnover(site.history, since) for site in sites]
        found["deaths"] = float(sum(deaths for deaths, _ in changes))
        found["revivals"] = float(sum(revivals for _, revivals in changes))
    values = {f"{_group(name)}/{metric(name, report.phase)}": value for name, value in found.items()}
    if per_site:
        by_name = {site.name: site for site in sites}
        for group in groups(list(by_name)):
            shares = _shares([by_name[name] for name in group.sites])
            for name in ("dead_pct", "dormant_pct"):
                if name in shares:
                    values[f"neuronscope.{metric(name, report.phase)}/{group_tag(group)}"] = shares[name]
    return values


def turnover(history: SiteHistory, since: int | None = None) -> tuple[int, int]:
    """How many deaths and revivals happened in the windows of a history that ended after a step.

    A neuron that was not observed in a window, or gave NaN, is taken to be as it was: neither a death nor a revival
    can be told from it. The first window has none: there is nothing to compare it with.

    Args:
        history: The history of one site, ``(W, N)``.
        since: Step; ``None`` for the last window alone.

    Returns:
        Deaths and revivals.
    """
    count = len(history.steps)
    first = count - 1 if since is None else int(np.searchsorted(history.steps, since, side="right"))
    start = max(first, 1)
    if start >= count:
        return 0, 0
    dead, known = _state(history.levels[start - 1])
    back = start - 2
    while back >= 0 and not known.all():
        earlier, seen = _state(history.levels[back])
        dead, known, back = np.where(known, dead, earlier), known | seen, back - 1
    deaths = revivals = 0
    for levels in history.levels[start:]:
        now, seen = _state(levels)
        deaths += int((now & ~dead & known & seen).sum())
        revivals += int((dead & ~now & known & seen).sum())
        dead, known = np.where(seen, now, dead), known | seen
    return deaths, revivals


def _state(levels: npt.NDArray[np.uint8]) -> tuple[BoolArray, BoolArray]:
    """Which neurons were dead in a window, and of which that can be said."""
    return levels == LEVEL_DEAD, (levels != LEVEL_UNSEEN) & (levels != LEVEL_NOT_FINITE)


def _group(name: str) -> str:
    """The group of a metric. TensorBoard sorts a group by name and shows twelve cards: the rest must not come first."""
    return "neuronscope.more" if name in ("born_dead_pct", "cut_off_pct") else "neuronscope"


def _shares(sites: Sequence[SiteReport]) -> dict[str, float]:
    """Percentages over some sites; empty where nothing was observed."""
    observed = _observed(sites)
    if not observed:
        return {}
    broken = sum(int(site.judgement.not_finite.sum()) for site in sites)
    shares = {"not_finite_pct": 100.0 * broken / observed}
    if broken < observed:
        shares["dead_pct"] = 100.0 * sum(site.dead for site in sites) / observed
        shares["born_dead_pct"] = 100.0 * sum(site.born_dead for site in sites) / observed
        shares["dormant_pct"] = 100.0 * sum(site.dormant for site in sites) / observed
    return shares


def _observed(sites: Sequence[SiteReport]) -> int:
    return sum(site.neurons - site.unseen for site in sites)
