"""Collect the facts of a post-mortem from which the diagnosis is made: verdicts, and how the network was trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.file.layers import Layer
from neuronscope.checkpoints.file.optimizer_rules import finite_settings
from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport
from neuronscope.judge.symptoms import LayerFacts, RunFacts

__all__ = ["dead_norm_ratios", "learning_rates", "postmortem_facts", "weight_decay_per_step"]


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


def learning_rates(checkpoint: Checkpoint) -> list[float]:
    """Return the saved learning rates of the optimizers' groups."""
    return [rate for group in _groups(checkpoint) for rate in finite_settings(group, "lr")]


def weight_decay_per_step(checkpoint: Checkpoint) -> float:
    """Return the largest fraction by which weight decay shrinks weights per step."""
    pairs = ((finite_settings(group, "lr"), finite_settings(group, "weight_decay")) for group in _groups(checkpoint))
    return max((rate[0] * decay[0] for rate, decay in pairs if rate and decay), default=0.0)


def dead_norm_ratios(
    verdicts: Sequence[LayerReport], layers: Sequence[Layer], names: Mapping[str, str], checkpoint: Checkpoint
) -> dict[str, float]:
    """Return the median norm of the dead neurons' incoming weights over that of the others, by layer.

    Args:
        verdicts: The verdicts.
        layers: The checkpoint's layers.
        names: Name in the verdicts by a layer's path, if it differs from the path.
        checkpoint: The opened checkpoint; each weight is read once more.
    """
    reports = {layer.name: layer for layer in verdicts}
    found = {}
    for layer in layers:
        report = reports.get(names.get(layer.path, layer.path))
        if report is None or report.neurons != layer.width or not 0 < report.dead < report.neurons:
            continue
        norms = torch.linalg.vector_norm(layer.rows(checkpoint.tensors[layer.weight].read()).double(), dim=1)
        dead = torch.from_numpy(report.dead_mask)
        living_norm = float(norms[~dead].median())
        if living_norm > 0:
            found[report.name] = float(norms[dead].median()) / living_norm
    return found


def _groups(checkpoint: Checkpoint) -> Iterator[Mapping[str, Any]]:
    return (group for optimizer in checkpoint.optimizers for group in optimizer.groups)
