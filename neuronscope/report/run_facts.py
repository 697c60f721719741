"""Extract the facts for a diagnosis from the report of a watched run."""

from __future__ import annotations

import numpy as np

from neuronscope.judge.symptoms import UNDATED, LayerFacts, RunFacts
from neuronscope.report.report import Report, SiteReport

__all__ = ["facts_from_report", "is_normalised", "observed_every"]


def facts_from_report(report: Report) -> RunFacts:
    """Return the facts about a watched run, one :class:`LayerFacts` per site."""
    layers = []
    for site in report.layers:
        born = site.last_active_step < 0
        died = np.where(site.history.died_step >= 0, site.history.died_step, UNDATED)
        layers.append(
            LayerFacts(
                name=site.name,
                dead=site.judgement.dead,
                since=np.where(born, -1, died),
                not_finite=int(site.judgement.not_finite.sum()),
                silent=site.silent,
                kind=site.kind,
                normalised=is_normalised(site),
            )
        )
    return RunFacts(tuple(layers), step=report.global_step or None, observed_every=observed_every(report))


def is_normalised(site: SiteReport) -> bool:
    """Whether the last layer with weights before a site's activation is known to be a normalisation."""
    return site.axis_source.startswith("producer (") and site.axis_source.endswith("_norm)")


def observed_every(report: Report) -> int:
    """Return the longest gap, in steps, between the last time a dead neuron was seen to fire and its observed death."""
    gaps = [
        (site.history.died_step - site.last_active_step)[site.judgement.dead & (site.history.died_step >= 0)]
        for site in report.layers
    ]
    return max([1, *(int(gap.max()) for gap in gaps if gap.size)])
