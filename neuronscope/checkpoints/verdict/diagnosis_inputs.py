"""Collect the facts of a post-mortem from which the diagnosis is made."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport
from neuronscope.judge.symptoms import LayerFacts, RunFacts

__all__ = ["postmortem_facts"]


def postmortem_facts(
    layers: Sequence[LayerReport],
    *,
    step: int | None = None,
    learning_rates: Sequence[float] = (),
    decay: float = 0.0,
    dead_norm_ratios: Mapping[str, float] | None = None,
    input_offset: float | None = None,
    kinds: Mapping[str, str] | None = None,
    normalised: Collection[str] = (),
    observed_every: int = 1,
    checkpoints: Collection[int] = (),
) -> RunFacts:
    """Return the facts of a post-mortem in the form that :func:`neuronscope.judge.diagnosis.diagnose` takes.

    Args:
        layers: The verdicts, from the input to the output.
        step: Number of optimizer steps taken; ``None`` = not known.
        learning_rates: The saved learning rates of the optimizer's groups.
        decay: The fraction by which weight decay shrinks weights per step.
        dead_norm_ratios: By layer, the median norm of the dead neurons' weights over that of the others.
        input_offset: ‖mean‖ / ‖standard deviation‖ of the model's input; ``None`` = not known.
        kinds: Kind of each layer's activation by layer, as far as known.
        normalised: Layers that are known to have a normalisation before their activation or their weights.
        observed_every: The largest number of steps between two observations of a monitor.
        checkpoints: Steps of checkpoints of the run, as far as known.
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
        step=step,
        learning_rates=tuple(learning_rates),
        decay=decay,
        clocked=any(layer.is_clocked for layer in headlines),
        estimated=any(layer.is_estimated for layer in headlines),
        input_offset=input_offset,
        observed_every=observed_every,
        checkpoints=tuple(sorted(checkpoints)),
    )


def _drifted(layer: LayerReport) -> int:
    """Count the neurons that are proved dead by an upper bound of their pre-activation that is below zero."""
    below = np.zeros(layer.neurons, dtype=np.bool_)
    for one in layer.evidence:
        if one.claim == "dead" and one.basis == "proved":
            below[one.neurons[one.numbers < 0.0]] = True
    return int(below.sum())
