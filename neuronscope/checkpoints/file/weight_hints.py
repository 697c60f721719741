"""Look for signs of dead neurons in weights alone, where the file holds neither an optimizer's state nor a record.

Weights do not show whether a neuron fires, so all of this is only *suspected*. ``scripts/weight_hints.py`` counts on
trained networks how many of the dead each hint finds and how many of the living it takes for dead;
``docs/postmortem.md`` has the table from which the thresholds were chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import Checkpoint, StoredTensor
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer, find_projections, normalised_layers
from neuronscope.checkpoints.file.weights import sequential_readers
from neuronscope.checkpoints.verdict.evidence import Evidence, evidence_where

__all__ = ["HINTS", "Hint", "hint_evidence", "hint_scores"]

#: A layer is examined if it has this many rows, and each row this many weights: fewer show nothing by their spread.
FEWEST_ROWS, FEWEST_WEIGHTS = 8, 16


@dataclass(frozen=True)
class Hint:
    """One sign in the weights."""

    name: str  # its name, a key of what ``hint_scores`` returns
    below: float  # a neuron shows the sign if its score is below this
    measure: str  # the meaning of the score
    text: str  # the sign, in words for the reader


HINTS = (
    Hint(
        "negative weights",
        0.2,
        "norm of the positive incoming weights, as a share of the norm of all",
        "Nearly all incoming weights are negative. Inputs that are never negative, such as those from a ReLU, hold the "
        "neuron below zero. On small trained networks, 12 % of the dead and 0.2 % of the living show this.",
    ),
    Hint(
        "small row",
        0.2,
        "norm of the incoming weights, as a share of the layer's median",
        "The incoming weights are far smaller than those of the layer's other neurons, as weight decay makes those of "
        "a neuron that gets no gradient. On small trained networks, 16 % of the dead and 0.2 % of the living show "
        "this.",
    ),
    Hint(
        "small column",
        0.1,
        "norm of the outgoing weights, as a share of the layer's median",
        "The outgoing weights are far smaller than those of the layer's other neurons, as weight decay makes those of "
        "a neuron whose output is zero. On small trained networks, 14 % of the dead and 0.2 % of the living show this. "
        "Which layer reads the neuron is a guess from their places in one sequence.",
    ),
)


def hint_scores(layer: Layer, tensors: Mapping[str, StoredTensor], reader: Layer | None) -> dict[str, Tensor]:
    """Return the scores of a layer's ``N`` rows by the hint's name, float64 ``(N,)``; NaN where one cannot be known.

    Args:
        layer: The layer.
        tensors: The network's tensors by name.
        reader: The layer that reads its rows, as far as it is known.
    """
    unknown = torch.full((layer.width,), torch.nan, dtype=torch.float64)
    scores = {hint.name: unknown for hint in HINTS}
    weight = layer.rows(tensors[layer.weight].read()).double()
    if layer.width < FEWEST_ROWS or weight.shape[1] < FEWEST_WEIGHTS or layer.gain is not None:
        return scores
    norm = weight.norm(dim=1)
    scores["negative weights"] = weight.clamp(min=0.0).norm(dim=1) / norm
    scores["small row"] = norm / norm.nanmedian()
    if reader is not None:
        columns = reader.columns(tensors[reader.weight].read()).double().norm(dim=1)
        scores["small column"] = columns / columns.nanmedian()
    return scores


def hint_evidence(checkpoint: Checkpoint, layers: Sequence[Layer]) -> Iterator[Evidence]:
    """Yield the neurons that show a hint in their weights. Each weight is read once or twice.

    Layers beside a norm are left out: it undoes the scale of weights, and what it gives may be negative. So are layers
    that no activation seems to follow.

    Args:
        checkpoint: The opened checkpoint.
        layers: Its layers; see :func:`neuronscope.checkpoints.file.layers.find_layers`.
    """
    readers = {writer.path: reader for writer, reader in sequential_readers(layers)}
    projections = find_projections(layers, checkpoint.networks, is_ordered=checkpoint.is_ordered)
    left_out = {*normalised_layers(layers), *projections}
    tensors = checkpoint.tensors
    for layer in layers:
        if layer.kind not in NEURON_KINDS or layer.path in left_out:
            continue
        scores = hint_scores(layer, tensors, readers.get(layer.path))
        for hint in HINTS:
            # A score of exactly zero is told for certain elsewhere: a row or a column of zeros.
            yield from evidence_where(
                layer.path,
                (scores[hint.name] < hint.below) & (scores[hint.name] > 0),
                scores[hint.name],
                source="weights alone",
                claim="dead",
                basis="suspected",
                measure=hint.measure,
                text=hint.text,
            )
