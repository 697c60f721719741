"""Collect the facts of a post-mortem from which the diagnosis is made."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport
from neuronscope.judge.symptoms import LayerFacts, RunFacts

__all__ = ["postmortem_facts"]


def postmortem_facts(
    layers: Sequence[LayerReport],
    *,
    dead_norm_ratios: Mapping[str, float] | None = None,
    kinds: Mapping[str, str] | None = None,
    normalised: Collection[str] = (),
    **run: Any,
) -> RunFacts:
    """Return the facts of a post-mortem in the form that :func:`neuronscope.judge.diagnosis.diagnose` takes.

    Args:
        layers: The verdicts, from the input to the output.
        dead_norm_ratios: By layer, the median norm of the dead neurons' weights over that of the others.
        kinds: Kind of each layer's activation by layer, as far as known.
        normalised: Layers that are known to have a normalisation before their activation or their weights.
        **run: Attributes of :class:`RunFacts`: what is known of the run.
    """
    ratios = dead_norm_ratios or {}
    headlines = [layer for layer in layers if layer.in_headlines]
    return RunFacts(
        layers=tuple(
            LayerFacts(
                name=layer.name,
                dead=layer.dead_mask,
                since=layer.since,
                drifted=_drifted(layer),
                not_finite=layer.count("not finite"),
                unread=layer.count("unread"),
                silent=layer.count("silent"),
                dead_norm=ratios.get(layer.name),
                may_have_collapsed=layer.collapse == "suspected",
                idle=int(layer.idle.sum()),
                kind=(kinds or {}).get(layer.name, ""),
                normalised=layer.name in normalised,
            )
            for layer in headlines
        ),
        clocked=any(layer.is_clocked for layer in headlines),
        estimated=any(layer.is_estimated for layer in headlines),
        **run,
    )


def _drifted(layer: LayerReport) -> int:
    """Count the neurons that are proved dead by an upper bound of their pre-activation that is below zero."""
    below = np.zeros(layer.neurons, dtype=np.bool_)
    for one in layer.evidence:
        if one.claim == "dead" and one.basis == "proved":
            below[one.neurons[one.numbers < 0.0]] = True
    return int(below.sum())
