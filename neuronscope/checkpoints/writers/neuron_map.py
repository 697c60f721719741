"""Field: one layer's neurons as bytes for the page's drawing, within a budget, losing detail and saying so.

Neurons stand in order of gravity: the dead first, the surest of them first, then the rest. Whatever is lost, how many
neurons bear which label on which basis is kept.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.checkpoints.verdict.evidence import CLAIMS
from neuronscope.checkpoints.verdict.layer_verdicts import LABELS, UNKNOWN, LayerReport
from neuronscope.judge.symptoms import UNDATED

__all__ = ["IDLE", "MOST_EVIDENCE", "Detail", "Field", "gravity", "pack"]

#: Code beside those of LABELS: idle.
IDLE = len(LABELS)
#: Pieces of evidence that a neuron's mask has room for.
MOST_EVIDENCE = 32


@dataclass(frozen=True)
class Detail:
    """What is kept of each neuron, beside its label and basis.

    Attributes:
        neurons: Its index, and which evidence speaks of it.
        steps: Steps between two that are told apart; 0 = none is kept.
        numbers: The number behind its verdict.
        lost: What is lost, in words; ``""`` = nothing.
    """

    neurons: bool
    steps: int
    numbers: bool
    lost: str


#: From everything to little; the first that fits the budget is taken, the last whether it fits or not.
LADDER = (
    Detail(True, 1, True, ""),
    Detail(True, 1, False, "the numbers behind single verdicts are left out"),
    Detail(True, 16, False, "numbers are left out and steps rounded down to multiples of 16"),
    Detail(True, 0, False, "numbers and steps of single neurons are left out"),
    Detail(False, 0, False, "single neurons are left out"),
)


@dataclass(frozen=True)
class Field:
    """One layer, packed (``N`` neurons, of which ``T`` have more to tell than that they are alive or unknown).

    Attributes:
        runs: ``(label or IDLE, basis, neurons)`` of neighbours that are alike, in order of gravity; ``N`` in all.
        told: ``T``; these come first.
        detail: What was kept.
        data: Base64 of the zlib-deflated planes, one after another, each one byte an item: if ``detail.neurons``, index
            (4 planes of N, lowest byte first), evidence mask (4 planes of N), deciding and dating evidence + 1, and
            whether contested (N each); if ``detail.steps``, ``since + 2`` (4 planes of T); if ``detail.numbers``, the
            number as float32 (4 planes of T).
    """

    runs: list[tuple[int, int, int]]
    told: int
    detail: Detail
    data: str


def pack(layer: LayerReport, budget: int) -> Field:
    """Pack a layer in as much detail as ``budget`` characters of base64 allow."""
    order = gravity(layer)
    told = int((layer.contested | (layer.labels < CLAIMS.index("alive"))).sum())

    def packed(detail: Detail) -> Field:
        planes: list[npt.NDArray[np.uint8]] = []
        if detail.neurons:
            planes += [_planes(order.astype("<u4")), _planes(_mask(layer)[order])]
            planes += [(which[order] + 1).clip(0, 255).astype(np.uint8) for which in (layer.deciding, layer.dating)]
            planes.append(layer.contested[order].astype(np.uint8))
        if detail.steps:
            since = layer.since[order[:told]]
            rounded = np.where(since > 0, since // detail.steps * detail.steps, since)
            planes.append(_planes((rounded - UNDATED).clip(0, (1 << 32) - 1).astype("<u4")))
        if detail.numbers:
            planes.append(_planes(layer.numbers[order[:told]].astype("<f4")))
        raw = b"".join(np.ascontiguousarray(plane).tobytes() for plane in planes)
        data = base64.b64encode(zlib.compress(raw, 9)).decode("ascii") if raw else ""
        return Field(_runs(layer, order), told, detail, data)

    tried = map(packed, LADDER)
    return next((one for one in tried if len(one.data) <= budget), None) or packed(LADDER[-1])


def gravity(layer: LayerReport) -> npt.NDArray[np.int64]:
    """Indices of the neurons, gravest first; *unknown* before *alive*, for it may be worse. int64 ``(N,)``."""
    alive = CLAIMS.index("alive")
    rank = np.where(layer.labels == UNKNOWN, alive - 0.5, layer.labels.astype(np.float64))
    plain = ~layer.contested & (rank > alive - 1)
    return np.lexsort((np.arange(layer.neurons), layer.since, layer.basis, rank, layer.idle, plain)).astype(np.int64)


def _runs(layer: LayerReport, order: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    labels = np.where(layer.idle, IDLE, layer.labels)[order]
    codes = labels.astype(np.int64) * 256 + layer.basis[order]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    sizes = np.diff([*starts, codes.size])
    return [(int(codes[at]) // 256, int(codes[at]) % 256, int(size)) for at, size in zip(starts, sizes, strict=True)]


def _mask(layer: LayerReport) -> npt.NDArray[np.uint32]:
    """A bit for each piece of evidence that speaks of a neuron, ``(N,)``."""
    mask = np.zeros(layer.neurons, dtype="<u4")
    for index, one in enumerate(layer.evidence[:MOST_EVIDENCE]):
        mask[one.neurons] |= np.uint32(1 << index)
    return mask


def _planes(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Numbers of four bytes as four planes, lowest byte first, ``(4, N)``: planes of zeros deflate to nothing."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, 4).T
