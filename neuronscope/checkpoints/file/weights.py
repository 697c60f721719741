"""Examine the weights alone: rows of zeros or not finite, neurons that nothing reads.

Where the file holds neither an optimizer's state nor a record, weights are searched for hints of dead neurons too.
Weights do not show whether a neuron fires, so all of these are only *suspected*. ``scripts/weight_hints.py`` counts on
trained networks how many of the dead each hint finds and how many of the living it takes for dead;
``docs/postmortem.md`` has the table from which the thresholds were chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import Checkpoint, StoredTensor
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer, find_projections, normalised_layers
from neuronscope.checkpoints.verdict.evidence import Evidence, evidence_where

__all__ = ["HINTS", "Hint", "examine_weights", "hint_evidence", "hint_scores", "sequential_readers"]

_SOURCE = "weights"


def examine_weights(tensors: Mapping[str, StoredTensor], layers: Sequence[Layer]) -> Iterator[Evidence]:
    """Yield rows of zeros or not finite, neurons that are not read, and neurons that a norm makes constant.

    Each tensor is read once and then released.

    Args:
        tensors: The network's tensors by name.
        layers: Its layers; see :func:`neuronscope.checkpoints.file.layers.find_layers`.
    """
    for layer, norm in pairwise(layers):
        yield from _constant(tensors, layer, norm)
    read_by = {reader.weight: layer for layer, reader in sequential_readers(layers)}
    for layer in layers:
        if layer.kind not in NEURON_KINDS:
            continue
        not_finite = torch.zeros(layer.width, dtype=torch.int64)  # number of such weights of each row
        all_zero = torch.ones(layer.width, dtype=torch.bool)
        bias = torch.zeros(layer.width, dtype=torch.float64)
        for name in layer.incoming:
            tensor = tensors[name].read()
            rows = layer.rows(tensor if tensor.dtype.itemsize > 1 else tensor.float())  # float8 cannot be compared
            low, high = torch.aminmax(rows, dim=1)  # one pass; NaN if the row contains one
            affected = ~(torch.isfinite(low) & torch.isfinite(high))
            if affected.any():
                not_finite[affected] += (~torch.isfinite(rows[affected])).sum(dim=1)
            zero = (low == 0) & (high == 0)
            if name == layer.bias:
                bias = rows[:, 0].double()
            elif name == layer.weight:
                all_zero &= zero
                writer = read_by.get(name)
                if writer is not None:
                    yield from _unread(writer, layer, tensor)
            else:  # weight norm's magnitudes: a magnitude of zero makes a row of zeros
                all_zero |= zero
        evidence = partial(evidence_where, layer.path, source=_SOURCE, basis="inferred")
        yield from evidence(
            not_finite > 0,
            not_finite.double(),
            claim="not finite",
            measure="incoming weights that are NaN or infinite",
            text="A weight or bias of these neurons is NaN or infinite; so is their pre-activation for any input.",
        )
        yield from evidence(
            all_zero & (not_finite == 0),
            bias,
            claim="zero row",
            measure="bias",
            text=(
                "All incoming weights are zero: the pre-activation is the bias for every input. Pruning and zero "
                "initialisation cause this too."
            ),
        )


def _constant(tensors: Mapping[str, StoredTensor], layer: Layer, norm: Layer) -> Iterator[Evidence]:
    """Yield the neurons that a norm with a scale of zero keeps at a constant that is not above zero.

    That the norm normalises the layer's outputs is a guess from their order: it follows directly in the same module,
    has as many channels, and takes the place of the layer's bias. Scales that are all zero are an initialisation.
    """
    parents = {one.path.rpartition(".")[0] for one in (layer, norm)}
    if norm.kind != "norm" or layer.kind not in NEURON_KINDS or len(parents) > 1:
        return
    if norm.bias is None or layer.bias is not None or norm.width != layer.width:
        return
    zero, shift = tensors[norm.weight].read() == 0, tensors[norm.bias].read().double()
    if not zero.all():
        yield from evidence_where(
            layer.path,
            zero & (shift <= 0),
            shift,
            source=_SOURCE,
            claim="dead",
            basis="suspected",
            measure="output of the norm",
            text=(
                f"The scale of {norm.path}, which follows directly, is zero, so that its output is this number for "
                "every input. The neuron is dead if an activation follows that is zero for it, as ReLU is; with "
                "`model=` it is known."
            ),
        )


def _unread(writer: Layer, reader: Layer, weight: Tensor) -> Iterator[Evidence]:
    """Yield the neurons whose outgoing weights are all zero, if only one layer seems to read them."""
    return evidence_where(
        writer.path,
        (reader.columns(weight) == 0).all(dim=1),
        source=_SOURCE,
        claim="unread",
        basis="suspected",
        text=(
            f"Every weight of {reader.path} that reads these neurons is zero. That nothing else reads them is a guess "
            "from their places in one sequence; with `model=` it is known."
        ),
    )


def sequential_readers(layers: Sequence[Layer]) -> list[tuple[Layer, Layer]]:
    """Return pairs ``(earlier, later)`` of layers of one ``Sequential`` in which the later one reads the earlier one.

    This is a guess from names, ``path.number``, and sizes. Only norms and modules without weights lie between the two,
    and at least one: layers with consecutive numbers may be parallel ones in a list.
    """
    pairs = []
    before: dict[str, tuple[int, Layer]] = {}
    for layer in layers:
        match = re.fullmatch(r"(.*\.)?(\d{1,6})", layer.path)
        if match is None or layer.kind == "norm":
            continue
        parent, number = match[1] or "", int(match[2])
        earlier_number, earlier = before.get(parent, (number, layer))
        if (
            number - earlier_number > 1
            and layer.kind == earlier.kind
            and layer.kind in NEURON_KINDS
            and layer.inputs == earlier.width
            and layer.gain is None
            and layer.axis_known
        ):
            pairs.append((earlier, layer))
        before[parent] = number, layer
    return pairs


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
