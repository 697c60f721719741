"""Weights: what their numbers alone say. Rows of zeros, rows that are not finite, neurons that nobody reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import StoredTensor
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer
from neuronscope.checkpoints.verdict.evidence import Evidence

__all__ = ["examine_weights", "sequential_readers"]

_SOURCE = "weights"


def examine_weights(tensors: Mapping[str, StoredTensor], layers: Sequence[Layer]) -> Iterator[Evidence]:
    """Zero rows, rows that are not finite, and neurons that no later layer of their ``Sequential`` reads.

    Each tensor is read once and let go.

    Args:
        tensors: The network's.
        layers: Its layers; see :func:`neuronscope.checkpoints.file.layers.find_layers`.
    """
    readers = sequential_readers(layers)
    read_by = {reader.weight: layer for layer, reader in readers}
    for layer in layers:
        if layer.kind not in NEURON_KINDS:
            continue
        bad = torch.zeros(layer.width, dtype=torch.int64)
        empty = torch.ones(layer.width, dtype=torch.bool)
        bias = torch.zeros(layer.width, dtype=torch.float64)
        for name in layer.incoming:
            tensor = tensors[name].read()
            rows = layer.rows(tensor if tensor.dtype.itemsize > 1 else tensor.float())  # float8 has no comparisons
            low, high = torch.aminmax(rows, dim=1)  # one pass; NaN wherever there is one
            broken = ~(torch.isfinite(low) & torch.isfinite(high))
            bad[broken] += (~torch.isfinite(rows[broken])).sum(dim=1)
            zero = (low == 0) & (high == 0)
            if name == layer.bias:
                bias = rows[:, 0].double()
            elif name == layer.weight:
                empty &= zero
                writer = read_by.get(name)
                if writer is not None:
                    yield from _unread(writer, layer, tensor)
            else:  # weight norm's magnitudes: a magnitude of zero makes a row of zeros
                empty |= zero
        if bad.any():
            yield _of(
                layer,
                "not finite",
                "inferred",
                bad > 0,
                bad.double(),
                "incoming weights that are NaN or infinite",
                "A weight or bias of these neurons is NaN or infinite; so is their pre-activation, whatever comes in.",
            )
        empty &= bad == 0
        if empty.any():
            yield _of(
                layer,
                "zero row",
                "inferred",
                empty,
                bias,
                "bias",
                "All incoming weights are zero: the pre-activation is the bias, the same for every input. Pruning and "
                "zero initialisation do this too.",
            )


def _unread(writer: Layer, reader: Layer, weight: Tensor) -> Iterator[Evidence]:
    """The neurons of a layer whose outgoing weights are all zero, where one layer alone seems to read them."""
    unread = (reader.columns(weight) == 0).all(dim=1)
    if unread.any():
        yield _of(
            writer,
            "unread",
            "suspected",
            unread,
            torch.full((writer.width,), torch.nan, dtype=torch.float64),
            "",
            f"Every weight of {reader.path} that reads these neurons is zero. That nothing else reads them is a guess "
            "from their places in one sequence; the model would tell.",
        )


def sequential_readers(layers: Sequence[Layer]) -> list[tuple[Layer, Layer]]:
    """Pairs of neighbours of one ``Sequential``, as far as names can tell: the later one reads the earlier one.

    Both are called ``path.number``, of one kind, with as many inputs as the earlier one has rows, with nothing but
    norms and what has no weights between them, and with a number between theirs: layers that follow each other at once
    may be parallel ones in a list.
    """
    pairs = []
    before: dict[str, tuple[int, Layer]] = {}
    for layer in layers:
        place = re.fullmatch(r"(.*\.)?(\d{1,6})", layer.path)
        if place is None or layer.kind == "norm":
            continue
        parent, number = place[1] or "", int(place[2])
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


def _of(layer: Layer, claim: str, basis: str, mask: Tensor, numbers: Tensor, measure: str, text: str) -> Evidence:
    neurons = torch.nonzero(mask).flatten()
    return Evidence(
        layer=layer.path,
        width=layer.width,
        source=_SOURCE,
        claim=claim,
        basis=basis,
        neurons=neurons.numpy(),
        numbers=numbers[neurons].numpy(),
        measure=measure,
        text=text,
    )
