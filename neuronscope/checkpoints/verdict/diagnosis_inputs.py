"""Facts: what the diagnosis is tested on, taken from the layers of a post-mortem."""

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
) -> RunFacts:
    """The facts of a post-mortem.

    Args:
        layers: Its layers, from the input on.
        step: Optimizer steps taken, where the checkpoint says so.
        learning_rates: Those of the optimizer's groups, as they were saved.
        decay: By what share weight decay shrinks weights a step.
        dead_norm_ratios: By layer, the middle norm of dead rows over that of the others.
        input_offset: ‖mean‖ / ‖standard deviation‖ of the model's input.
        kinds: Kind of each layer's activation, by layer, where it is known.
        normalised: Layers that are known to have a normalisation before their activation or their weights.
        observed_every: Steps at most between two at which a monitor looked for deaths.
    """
    norms = dead_norm_ratios or {}
    return RunFacts(
        layers=tuple(
            LayerFacts(
                name=layer.name,
                dead=layer.dead_mask,
                since=layer.since,
                drifted=_drifted(layer),
                not_finite=layer.count("not finite"),
                unread=layer.count("unread"),
                dead_norm=norms.get(layer.name),
                may_have_collapsed=layer.collapse == "suspected",
                idle=int(layer.idle.sum()),
                kind=(kinds or {}).get(layer.name, ""),
                normalised=layer.name in normalised,
            )
            for layer in layers
        ),
        step=step,
        learning_rates=tuple(learning_rates),
        decay=decay,
        clocked=any(layer.is_clocked for layer in layers),
        input_offset=input_offset,
        observed_every=observed_every,
    )


def _drifted(layer: LayerReport) -> int:
    """Neurons proved dead by a bound on their pre-activation: one that is below zero."""
    below = np.zeros(layer.neurons, dtype=np.bool_)
    for one in layer.evidence:
        if one.claim == "dead" and one.basis == "proved":
            below[one.neurons[one.numbers < 0.0]] = True
    return int(below.sum())
