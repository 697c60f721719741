"""Gives the few numbers that a run is judged by, as tags and floats for any logger.

What was not measured gets no number: a missing number leaves a gap in a chart, while a zero would be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from neuronscope.report.report import (
    LEVEL_DEAD,
    LEVEL_NOT_FINITE,
    LEVEL_SILENT,
    LEVEL_UNSEEN,
    Report,
    SiteHistory,
    SiteReport,
)
from neuronscope.writers.tensorboard.tags import group_tag, groups, metric
from neuronscope.writers.wording import observed

__all__ = ["scalars", "turnover"]

BoolArray = npt.NDArray[np.bool_]


def scalars(report: Report, *, since: int | None = None, per_site: bool = True) -> dict[str, float]:
    """Return a report's numbers by tag, for any logger.

    Percentages are of the neurons that were observed. Phases other than ``train`` have their name before the metric's:
    ``neuronscope/val_dead_pct``.

    - What matters most, in one group: ``neuronscope/dead_pct``, ``neuronscope/dormant_pct``,
      ``neuronscope/not_finite_pct`` and, in training, ``neuronscope/deaths`` and ``neuronscope/revivals``: how many
      neurons died and revived in the windows after ``since``. If gradients were seen, ``neuronscope/silent_pct`` too.
    - Details: ``neuronscope.more/born_dead_pct``, the neurons that never fired since watching began, and
      ``neuronscope.more/cut_off_pct`` (only if gradients were seen).

    By layer (or by group of layers, if there are more than 40): ``neuronscope.dead_pct/<layer>`` and
    ``neuronscope.dormant_pct/<layer>``. A network that gives only NaN has no dead share; its ``not_finite_pct`` is 100.

    Args:
        report: The report.
        since: ``report.global_step`` of the report that was logged before this one, so that deaths between the two are
            counted; ``None`` counts the last window alone.
        per_site: Whether to return the numbers of each layer too.

    Returns:
        Finite floats by tag, in a stable order.
    """
    sites = report.layers
    found = dict(_shares(sites))
    with_gradient = [site for site in sites if site.gradient_positions > 0]
    if neurons := _observed(with_gradient):
        found["silent_pct"] = 100.0 * sum(site.silent for site in with_gradient) / neurons
        found["cut_off_pct"] = 100.0 * sum(site.cut_off for site in with_gradient) / neurons
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
    """Count the deaths and revivals in the windows of a history that ended after a step.

    A neuron that was not observed in a window, gave NaN or was silent keeps its state: it neither died nor revived. The
    first window has no deaths: there is nothing to compare it with.

    Args:
        history: The history of one layer (``W`` windows, ``N`` neurons).
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
    """Return which neurons were dead in a window, and of which that is known, bool ``(N,)`` each."""
    return levels == LEVEL_DEAD, ~np.isin(levels, (LEVEL_UNSEEN, LEVEL_NOT_FINITE, LEVEL_SILENT))


def _group(name: str) -> str:
    """Return the group of a metric. TensorBoard sorts a group by name and shows 12 cards: details come last."""
    return "neuronscope.more" if name in ("born_dead_pct", "cut_off_pct") else "neuronscope"


def _shares(sites: Sequence[SiteReport]) -> dict[str, float]:
    """Return percentages over some layers; empty if nothing was observed."""
    neurons = _observed(sites)
    if not neurons:
        return {}
    broken = sum(int(site.judgement.not_finite.sum()) for site in sites)
    shares = {"not_finite_pct": 100.0 * broken / neurons}
    if broken < neurons:
        shares["dead_pct"] = 100.0 * sum(site.dead for site in sites) / neurons
        shares["born_dead_pct"] = 100.0 * sum(site.born_dead for site in sites) / neurons
        shares["dormant_pct"] = 100.0 * sum(site.dormant for site in sites) / neurons
    return shares


def _observed(sites: Sequence[SiteReport]) -> int:
    return sum(map(observed, sites))
