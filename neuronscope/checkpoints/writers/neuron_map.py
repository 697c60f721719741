"""Pack the neurons of a layer, and the whole network over the steps, as bytes for the page's drawings.

Neurons are sorted worst first: the dead ones at the top, the surest of them first. Whatever is lost, the number of
neurons with each label and basis is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.arrays import ByteArray, IntArray
from neuronscope.checkpoints.verdict.evidence import CLAIMS
from neuronscope.checkpoints.verdict.layer_verdicts import LABELS, UNKNOWN, LayerReport
from neuronscope.judge.symptoms import UNDATED
from neuronscope.report.report import (
    LEVEL_CUT_OFF,
    LEVEL_DEAD,
    LEVEL_DORMANT,
    LEVEL_NOT_FINITE,
    LEVEL_SILENT,
    LEVEL_UNSEEN,
)
from neuronscope.writers.packing import NetworkMap, encode, first_that_fits, four_planes, summarise_histories

__all__ = ["IDLE", "MOST_EVIDENCE", "Detail", "NeuronMap", "network_map", "pack", "worst_first"]

#: Code of idle neurons, beside those of LABELS.
IDLE = len(LABELS)
#: Columns of the map of the network, if deaths are dated; there is no history to take windows from.
COLUMNS = 96
#: Levels of labels that are not dead, as of the checkpoint.
_LEVELS = {
    "not finite": LEVEL_NOT_FINITE,
    "silent": LEVEL_SILENT,
    "zero row": LEVEL_CUT_OFF,
    "unread": LEVEL_CUT_OFF,
    "quiet": LEVEL_DORMANT,
    "alive": 0,
}
#: Pieces of evidence that fit into a neuron's mask.
MOST_EVIDENCE = 32


@dataclass(frozen=True)
class Detail:
    """What is kept of each neuron, beside its label and basis."""

    neurons: bool  # whether its index and the evidence about it are kept
    steps: int  # steps are rounded down to multiples of this; 0 = steps are not kept
    numbers: bool  # whether the number behind its verdict is kept
    lost: str  # what is lost, in words; ``""`` = nothing


#: From everything to little; the first that fits the budget is taken, or else the last.
LADDER = (
    Detail(True, 1, True, ""),
    Detail(True, 1, False, "the numbers behind single verdicts are left out"),
    Detail(True, 16, False, "numbers are left out and steps rounded down to multiples of 16"),
    Detail(True, 0, False, "numbers and steps of single neurons are left out"),
    Detail(False, 0, False, "single neurons are left out"),
)


@dataclass(frozen=True)
class NeuronMap:
    """One layer, packed (``N`` neurons, ``T`` of which have a label other than alive and unknown, or are contested)."""

    runs: list[tuple[int, int, int]]  # label or IDLE, basis and number of neighbours that are alike, worst first
    marked: int  # ``T``; these neurons come first
    detail: Detail  # what was kept
    #: Base64 of the zlib-deflated planes, one after another, each one byte an item: if ``detail.neurons``, index (4
    #: planes of N, lowest byte first), evidence mask (4 planes of N), deciding and dating evidence + 1, and marks (N
    #: each): 1 = contested, 2 = woken by an input of the box; if ``detail.steps``, ``since + 2`` (4 planes of T); if
    #: ``detail.numbers``, the number as float32 (4 planes of T).
    data: str


def pack(layer: LayerReport, budget: int) -> NeuronMap:
    """Pack a layer in as much detail as the budget allows.

    Args:
        layer: The layer.
        budget: Most characters that ``NeuronMap.data`` should have.
    """
    order = worst_first(layer)
    marked = int(layer.listed.sum())

    def packed(detail: Detail) -> NeuronMap:
        planes: list[ByteArray] = []
        if detail.neurons:
            planes += [four_planes(order.astype("<u4")), four_planes(_mask(layer)[order])]
            planes += [(which[order] + 1).clip(0, 255).astype(np.uint8) for which in (layer.deciding, layer.dating)]
            woken = np.zeros(layer.neurons, dtype=np.bool_) if layer.woken is None else layer.woken >= 0
            planes.append((layer.contested + 2 * woken).astype(np.uint8)[order])
        if detail.steps:
            since = layer.since[order[:marked]]
            rounded = np.where(since > 0, since // detail.steps * detail.steps, since)
            planes.append(four_planes((rounded - UNDATED).clip(0, (1 << 32) - 1).astype("<u4")))
        if detail.numbers:
            planes.append(four_planes(layer.numbers[order[:marked]].astype("<f4")))
        return NeuronMap(_runs(layer, order), marked, detail, encode(planes))

    return first_that_fits(LADDER, packed, budget)


def network_map(layers: Sequence[LayerReport], last: int, budget: int) -> NetworkMap | None:
    """Pack all layers over the steps: who is dead now, from the step at which each died; ``None`` if nothing is known.

    Before the checkpoint nothing is known of the others, so there they are *unseen*. A death that is not dated counts
    at the checkpoint alone.

    Args:
        layers: The layers.
        last: Step of the checkpoint.
        budget: Most characters that ``NetworkMap.data`` should have.
    """
    steps = np.array([max(last, 0)], dtype=np.int64)
    if last > 0 and any((layer.dead_mask & (layer.since >= 0)).any() for layer in layers):
        steps = np.unique(np.linspace(0, last, COLUMNS).astype(np.int64))
    histories = [(steps, _levels(layer, steps)) for layer in layers]
    return summarise_histories([layer.name for layer in layers], histories, budget)


def _levels(layer: LayerReport, steps: IntArray) -> ByteArray:
    """Return what is known of each neuron at each step, as ``LEVEL_*``, uint8 ``(W, N)``."""
    levels = np.full((steps.size, layer.neurons), LEVEL_UNSEEN, dtype=np.uint8)
    now = np.array([_LEVELS.get(label, LEVEL_UNSEEN) for label in LABELS], dtype=np.uint8)
    levels[-1] = np.where(layer.idle, LEVEL_CUT_OFF, now[layer.labels])
    since = np.where(layer.since == UNDATED, steps[-1], layer.since)
    levels[layer.dead_mask & (since <= steps[:, None])] = LEVEL_DEAD
    levels[-1, layer.dead_mask] = LEVEL_DEAD
    return levels


def worst_first(layer: LayerReport) -> IntArray:
    """Return the indices of the neurons, worst first, int64 ``(N,)``; *unknown* comes before *alive*."""
    rank = np.where(layer.labels == UNKNOWN, CLAIMS.index("alive") - 0.5, layer.labels)
    return np.lexsort((layer.since, layer.basis, rank, layer.idle, ~layer.listed)).astype(np.int64)


def _runs(layer: LayerReport, order: IntArray) -> list[tuple[int, int, int]]:
    labels = np.where(layer.idle, IDLE, layer.labels)[order]
    codes = labels.astype(np.int64) * 256 + layer.basis[order]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    sizes = np.diff([*starts, codes.size])
    return [(int(codes[at]) // 256, int(codes[at]) % 256, int(size)) for at, size in zip(starts, sizes, strict=True)]


def _mask(layer: LayerReport) -> npt.NDArray[np.uint32]:
    """Return a mask for each neuron, uint32 ``(N,)``: a bit for each piece of evidence about it."""
    mask = np.zeros(layer.neurons, dtype="<u4")
    for index, one in enumerate(layer.evidence[:MOST_EVIDENCE]):
        mask[one.neurons] |= np.uint32(1 << index)
    return mask
