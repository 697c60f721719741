"""Take from a report of a watched run what a diagnosis is made from."""

from __future__ import annotations

import numpy as np

from neuronscope.judge.symptoms import UNDATED, LayerFacts, RunFacts
from neuronscope.report.report import Report

__all__ = ["facts_of"]


def facts_of(report: Report) -> RunFacts:
    """Return the facts of a watched run, one :class:`LayerFacts` a site."""
    layers = []
    for site in report.sites:
        born = site.last_active_step < 0
        died = np.where(site.history.died_step >= 0, site.history.died_step, UNDATED)
        layers.append(
            LayerFacts(
                name=site.name,
                dead=site.judgement.dead,
                since=np.where(born, -1, died),
                not_finite=int(site.judgement.not_finite.sum()),
            )
        )
    return RunFacts(tuple(layers), step=report.step or None)
