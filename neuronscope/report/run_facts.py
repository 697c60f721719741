"""Extract the facts for a diagnosis from the report of a watched run or a scan."""

from __future__ import annotations

import numpy as np

from neuronscope.arrays import IntArray
from neuronscope.judge.symptoms import UNDATED, LayerFacts, RunFacts
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import Report, SiteReport

__all__ = ["death_steps", "facts_from_report", "observed_every"]


def facts_from_report(report: Report) -> RunFacts:
    """Return the facts about a watched run or a scan, one :class:`LayerFacts` per site.

    Each neuron in the totals is counted at one site. Sites that are not in the totals are left out.
    """
    labels = [site.judgement.labels().astype(np.int64) for site in report.layers]
    since = [death_steps(site) for site in report.layers]
    layers = [
        LayerFacts(
            name=site.name,
            dead=label == LABELS.index("dead"),
            since=steps,
            not_finite=int((label == LABELS.index("not finite")).sum()),
            silent=int((label == LABELS.index("silent")).sum()),
            kind=site.kind,
            normalised=site.is_norm,
        )
        for (site, label), (_, steps) in zip(report.totals.at_home(labels), report.totals.at_home(since), strict=True)
    ]
    return RunFacts(
        tuple(layers),
        step=report.global_step or None,
        observed_every=observed_every(report),
        checkpoints=report.checkpoints,
        in_training=report.phase == "train",
    )


def death_steps(site: SiteReport) -> IntArray:
    """Return the step of each neuron's latest death, as in :class:`LayerFacts`, int64 ``(N,)``."""
    died = np.where(site.history.died_step >= 0, site.history.died_step, UNDATED)
    return np.where(site.last_active_step < 0, -1, died)


def observed_every(report: Report) -> int:
    """Return the longest gap, in steps, between the last time a dead neuron was seen to fire and its observed death."""
    gaps = [
        (site.history.died_step - site.last_active_step)[site.judgement.dead & (site.history.died_step >= 0)]
        for site in report.headline_layers
    ]
    return max([1, *(int(gap.max()) for gap in gaps if gap.size)])
