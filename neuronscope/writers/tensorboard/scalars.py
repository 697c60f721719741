"""Give the few numbers that a run is judged by, as tags and floats for any logger.

What was not measured gets no number: a missing number leaves a gap in a chart, while a zero would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from neuronscope.arrays import BoolArray, ByteArray, IntArray
from neuronscope.judge.symptoms import COLLAPSED_SHARE
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.expert_layers import expert_layers
from neuronscope.report.report import Report, SiteReport
from neuronscope.report.totals import Totals
from neuronscope.writers.grouping import group_sites
from neuronscope.writers.tensorboard.tags import MOST_CHARTS, group_tag, metric, network_tag

__all__ = ["scalars"]


#: Whether a neuron with a label is dead or not; with any other it keeps its state: it neither died nor revived.
_HAS_STATE = np.array([label not in ("unseen", "not finite", "silent") for label in LABELS], dtype=np.bool_)


def scalars(report: Report, *, since: int | None = None, per_site: bool = True) -> dict[str, float]:
    """Return a report's numbers, finite floats by tag in a stable order, for any logger.

    Percentages are of the neurons that were observed. Phases other than ``train`` have their name before the metric's:
    ``neuronscope/val_dead_pct``.

    - What matters most, in one group: ``neuronscope/dead_pct``, ``neuronscope/worst_layer_dead_pct`` (the highest share
      of any layer of two neurons or more), ``neuronscope/dormant_pct`` and, in training, ``neuronscope/deaths_total``:
      how often neurons died since watching began, which never falls. If neurons were revived by
      :func:`neuronscope.revive`, ``neuronscope/revived_total``: how many so far.
    - What is zero in most runs, in a second group: ``neuronscope.more/not_finite_pct``,
      ``neuronscope.more/collapsed_layers`` (layers of two neurons or more of which 90 % or more are dead),
      ``neuronscope.more/born_dead_pct`` (neurons that never fired since watching began) and, in training,
      ``neuronscope.more/deaths`` and ``neuronscope.more/revivals``: how many neurons died and revived in the windows
      after ``since``. If gradients were seen, ``neuronscope.more/silent_pct`` and ``neuronscope.more/cut_off_pct`` too.
    - Of mixtures of experts: ``neuronscope.experts/routing_entropy_pct`` (100 if all experts get as many tokens; the
      mean over the mixtures), ``neuronscope.experts/fewest_tokens`` and ``neuronscope.experts/most_tokens`` of one
      expert in the window, and, unless the window is too short to be sure, ``neuronscope.experts/dead_experts``: how
      many got no token at all.

    By layer (or by group of layers, if there are more than 40): ``neuronscope.dead_pct/<layer>`` and
    ``neuronscope.dormant_pct/<layer>``. A neuron that goes through several activations counts once in the network's
    numbers and in those of a group. Layers that are not in the totals get no number. A network that gives only NaN has
    no dead share; its ``not_finite_pct`` is 100.

    Args:
        report: The report.
        since: ``report.global_step`` of the report that was logged before this one, so that deaths between the two are
            counted; ``None`` counts the last window alone.
        per_site: Whether to return the numbers of each layer too.
    """
    sites, totals = report.headline_layers, report.totals
    found = _shares(totals.label_counts())
    if _never_dormant(sites):
        found.pop("dormant_pct", None)
    if "dead_pct" in found:
        found["born_dead_pct"] = 100.0 * report.born_dead / report.observed_neurons
        found |= _layers(sites)
    seen = [site for site in sites if site.gradient_positions > 0]
    labels = (totals if len(seen) == len(sites) else Totals(seen)).label_counts()
    if observed := _observed(labels):
        found["silent_pct"] = 100.0 * labels["silent"] / observed
        found["cut_off_pct"] = 100.0 * labels["cut off"] / observed
    if report.phase == "train" and any(len(site.history.steps) for site in sites):
        deaths, revivals = _changes_of(totals, since)
        found |= {"deaths_total": float(totals.deaths()), "deaths": float(deaths), "revivals": float(revivals)}
    if report.phase == "train" and report.acts:
        found["revived_total"] = float(sum(len(act.neurons) for act in report.acts))
    values = {network_tag(name, report.phase): value for name, value in found.items()}
    values |= _of_experts(report)
    return values | _by_layer(report) if per_site else values


def _by_layer(report: Report) -> dict[str, float]:
    """Return the shares of each layer, or of each group of layers."""
    places = {site.name: at for at, site in enumerate(report.layers) if site.in_headlines}
    values: dict[str, float] = {}
    for group in group_sites(list(places), MOST_CHARTS):
        found = [places[name] for name in group.sites]
        if report.totals.shared:  # a neuron that two layers share stands at one place in the network's totals
            labels = Totals([report.layers[at] for at in found]).label_counts()
        else:
            labels = dict(zip(LABELS, report.totals.by_site[found].sum(axis=0).tolist(), strict=True))
        shares = _shares(labels)
        sparse = _never_dormant([report.layers[at] for at in found])
        for name in ("dead_pct",) if sparse else ("dead_pct", "dormant_pct"):
            if name in shares:
                values[f"neuronscope.{metric(name, report.phase)}/{group_tag(group)}"] = shares[name]
    return values


def _of_experts(report: Report) -> dict[str, float]:
    """Return how tokens are spread over experts, by tag; empty if the network has none, or no token was seen."""
    mixtures = [layer for layer in expert_layers(report.headline_layers) if layer.tokens.sum() > 0]
    if not mixtures:
        return {}
    found = {
        "routing_entropy_pct": 100 * sum(layer.routing_entropy for layer in mixtures) / len(mixtures),
        "fewest_tokens": float(min(int(layer.tokens.min()) for layer in mixtures)),
        "most_tokens": float(max(int(layer.tokens.max()) for layer in mixtures)),
    }
    if not report.provisional:
        found["dead_experts"] = float(sum(len(layer.idle) for layer in mixtures))
    return {f"neuronscope.experts/{metric(name, report.phase)}": value for name, value in found.items()}


def _changes_of(totals: Totals, since: int | None) -> tuple[int, int]:
    """Return the deaths and revivals of neurons in the windows that ended after a step; each neuron counts once."""
    if totals.shared:
        steps = totals.steps()
        return _count_changes(steps, since, lambda window: totals.labels_at(int(steps[window])))
    histories = [site.history for site in totals.sites if site.in_headlines]
    changes = [_count_changes(history.steps, since, history.labels) for history in histories]
    return sum(deaths for deaths, _ in changes), sum(revivals for _, revivals in changes)


def _count_changes(steps: IntArray, since: int | None, labels_in: Callable[[int], ByteArray]) -> tuple[int, int]:
    """Return the deaths and revivals in the windows that ended after a step, or in the last one alone.

    A neuron that was not observed in a window, gave NaN or was silent keeps its state: it neither died nor revived. The
    first window has no deaths: there is nothing to compare it with.
    """
    count = len(steps)
    start = max(count - 1 if since is None else int(np.searchsorted(steps, since, side="right")), 1)
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


def _state(labels: ByteArray) -> tuple[BoolArray, BoolArray]:
    """Return which neurons were dead in a window, and of which that is known, bool ``(N,)`` each."""
    return labels == LABELS.index("dead"), _HAS_STATE[labels]


def _shares(labels: Mapping[str, int]) -> dict[str, float]:
    """Return percentages of observed neurons, by the number of neurons with each label; empty if there are none."""
    observed, broken = _observed(labels), labels["not finite"]
    if not observed:
        return {}
    whole = ("dead", "dormant") if broken < observed else ()
    return {f"{label.replace(' ', '_')}_pct": 100.0 * labels[label] / observed for label in (*whole, "not finite")}


def _never_dormant(sites: Sequence[SiteReport]) -> bool:
    """Whether all layers are of latents that seldom fire, of which none is called dormant."""
    return all(site.kind == "sparse" for site in sites)


def _layers(sites: Sequence[SiteReport]) -> dict[str, float]:
    """Return the share of the worst layer, and how many have collapsed; empty if no layer of two neurons was seen."""
    wide = [site for site in sites if site.neurons > 1]
    numbers = [(site.dead, site.unseen, site.not_finite_neurons, site.neurons) for site in wide]
    seen = [(dead, neurons - unseen) for dead, unseen, broken, neurons in numbers if unseen + broken < neurons]
    if not seen:
        return {}
    collapsed = sum(dead >= COLLAPSED_SHARE * neurons for dead, *_, neurons in numbers)
    worst = max(dead / observed for dead, observed in seen)
    return {"worst_layer_dead_pct": 100.0 * worst, "collapsed_layers": float(collapsed)}


def _observed(labels: Mapping[str, int]) -> int:
    return sum(labels.values()) - labels["unseen"]
