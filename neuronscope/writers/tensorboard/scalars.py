"""Gives the few numbers that a run is judged by, as tags and floats for any logger.

What was not measured gets no number: a missing number leaves a gap in a chart, while a zero would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import Report, SiteHistory
from neuronscope.report.totals import Totals
from neuronscope.writers.tensorboard.tags import group_tag, groups, metric

__all__ = ["scalars", "turnover"]

BoolArray = npt.NDArray[np.bool_]


def scalars(report: Report, *, since: int | None = None, per_site: bool = True) -> dict[str, float]:
    """Return a report's numbers by tag, for any logger.

    Percentages are of the neurons that were observed. Phases other than ``train`` have their name before the metric's:
    ``neuronscope/val_dead_pct``.

    - What matters most, in one group: ``neuronscope/dead_pct``, ``neuronscope/dormant_pct``,
      ``neuronscope/not_finite_pct`` and, in training, ``neuronscope/deaths`` and ``neuronscope/revivals``: how many
      neurons died and revived in the windows after ``since``. If gradients were seen, ``neuronscope/silent_pct`` too.
      If neurons were revived by :func:`neuronscope.revive`, ``neuronscope/revived_total``: how many so far.
    - Details: ``neuronscope.more/born_dead_pct``, the neurons that never fired since watching began, and
      ``neuronscope.more/cut_off_pct`` (only if gradients were seen).

    By layer (or by group of layers, if there are more than 40): ``neuronscope.dead_pct/<layer>`` and
    ``neuronscope.dormant_pct/<layer>``. A neuron that goes through several activations counts once in the network's
    numbers and in those of a group. Layers that are not in the totals get no number. A network that gives only NaN has
    no dead share; its ``not_finite_pct`` is 100.

    Args:
        report: The report.
        since: ``report.global_step`` of the report that was logged before this one, so that deaths between the two are
            counted; ``None`` counts the last window alone.
        per_site: Whether to return the numbers of each layer too.

    Returns:
        Finite floats by tag, in a stable order.
    """
    sites = report.headline_layers
    found = dict(_shares(report.totals))
    with_gradient = Totals([site for site in sites if site.gradient_positions > 0])
    if neurons := _observed(with_gradient):
        found["silent_pct"] = 100.0 * with_gradient.count(lambda site: site.judgement.silent) / neurons
        found["cut_off_pct"] = 100.0 * with_gradient.count(lambda site: site.judgement.cut_off) / neurons
    if report.phase == "train" and any(len(site.history.steps) for site in sites):
        deaths, revivals = _changes_of(report.totals, since)
        found["deaths"], found["revivals"] = float(deaths), float(revivals)
    if report.phase == "train" and report.acts:
        found["revived_total"] = float(sum(len(act.neurons) for act in report.acts))
    values = {f"{_group(name)}/{metric(name, report.phase)}": value for name, value in found.items()}
    if per_site:
        by_name = {site.name: site for site in sites}
        for group in groups(list(by_name)):
            shares = _shares(Totals([by_name[name] for name in group.sites]))
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
    return _count_changes(first, count, history.labels)


def _changes_of(totals: Totals, since: int | None) -> tuple[int, int]:
    """Count the deaths and revivals of the neurons of several layers, each neuron once; see :func:`turnover`."""
    if not totals.shared:
        changes = [turnover(site.history, since) for site in totals.sites if site.in_headlines]
        return sum(deaths for deaths, _ in changes), sum(revivals for _, revivals in changes)
    steps = totals.steps()
    first = len(steps) - 1 if since is None else int(np.searchsorted(steps, since, side="right"))
    return _count_changes(first, len(steps), lambda window: totals.labels_at(int(steps[window])))


def _count_changes(first: int, count: int, labels_in: Callable[[int], npt.NDArray[np.uint8]]) -> tuple[int, int]:
    """Count the deaths and revivals in the windows ``first`` … ``count − 1``.

    Args:
        first: The first window.
        count: Number of windows.
        labels_in: Returns the labels in a window, uint8 ``(N,)``.

    Returns:
        Deaths and revivals.
    """
    start = max(first, 1)
    if start >= count:
        return 0, 0
    dead, known = _state(labels_in(start - 1))
    back = start - 2
    while back >= 0 and not known.all():
        earlier, seen = _state(labels_in(back))
        dead, known, back = np.where(known, dead, earlier), known | seen, back - 1
    deaths = revivals = 0
    for window in range(start, count):
        now, seen = _state(labels_in(window))
        deaths += int((now & ~dead & known & seen).sum())
        revivals += int((dead & ~now & known & seen).sum())
        dead, known = np.where(seen, now, dead), known | seen
    return deaths, revivals


# A neuron with one of these labels keeps its state: it neither died nor revived.
_STATELESS = ("unseen", "not finite", "silent")


def _state(labels: npt.NDArray[np.uint8]) -> tuple[BoolArray, BoolArray]:
    """Return which neurons were dead in a window, and of which that is known, bool ``(N,)`` each."""
    return labels == LABELS.index("dead"), ~np.isin(labels, [LABELS.index(label) for label in _STATELESS])


def _group(name: str) -> str:
    """Return the group of a metric. TensorBoard sorts a group by name and shows 12 cards: details come last."""
    return "neuronscope.more" if name in ("born_dead_pct", "cut_off_pct") else "neuronscope"


def _shares(totals: Totals) -> dict[str, float]:
    """Return percentages over some layers; empty if nothing was observed."""
    neurons = _observed(totals)
    if not neurons:
        return {}
    broken = totals.count(lambda site: site.judgement.not_finite)
    shares = {"not_finite_pct": 100.0 * broken / neurons}
    if broken < neurons:
        born = totals.count(lambda site: site.judgement.dead & (site.last_active_step < 0))
        shares["dead_pct"] = 100.0 * totals.count(lambda site: site.judgement.dead) / neurons
        shares["born_dead_pct"] = 100.0 * born / neurons
        if any(site.kind != "sparse" for site in totals.sites):
            shares["dormant_pct"] = 100.0 * totals.count(lambda site: site.judgement.dormant) / neurons
    return shares


def _observed(totals: Totals) -> int:
    return totals.neurons - totals.count(lambda site: site.judgement.unseen)
