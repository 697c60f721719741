"""Packing: one site's neurons and history as bytes, within a budget, losing resolution step by step and saying so.

Neurons are put in order of gravity (dead first) and, where the budget asks for it, joined into bands. A band carries
the *share of dead* beside the mean of the rest, so that a dead neuron never vanishes by averaging.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import (
    LEVEL_CUT_OFF,
    LEVEL_DEAD,
    LEVEL_DORMANT,
    LEVEL_MAX,
    LEVEL_NOT_FINITE,
    LEVEL_UNSEEN,
    SiteReport,
)

__all__ = ["Packed", "Resolution", "pack"]

ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Resolution:
    """How finely a site is packed.

    Attributes:
        columns: Most windows that are kept; evenly spread, first and last always among them.
        rows: Most rows that are kept; beyond it, neighbours in the order of gravity share a row.
        greys: Steps between "never zero" and "always zero".
        steps: Whether each neuron's death and revival steps are kept.
        neurons: Whether each neuron's index, label and fraction are kept.
    """

    columns: int
    rows: int
    greys: int = LEVEL_MAX
    steps: bool = True
    neurons: bool = True


#: From everything to little; the first that fits the budget is taken, the last whether it fits or not.
LADDER = (
    Resolution(256, 1 << 30),
    Resolution(64, 1 << 30),
    Resolution(64, 1 << 30, greys=25),
    Resolution(64, 1024, greys=25),
    Resolution(64, 512, greys=25),
    Resolution(64, 256, greys=10),
    Resolution(64, 128, greys=10),
    Resolution(64, 64, greys=10),
    Resolution(64, 128, greys=10, steps=False),
    Resolution(64, 64, greys=10, steps=False),
    Resolution(48, 48, greys=5, steps=False),
    Resolution(32, 32, greys=5, steps=False),
    Resolution(48, 48, greys=5, steps=False, neurons=False),
    Resolution(24, 32, greys=5, steps=False, neurons=False),
)

_LEVEL_OF_LABEL = {
    "unseen": LEVEL_UNSEEN,
    "not finite": LEVEL_NOT_FINITE,
    "dead": LEVEL_DEAD,
    "cut off": LEVEL_CUT_OFF,
    "dormant": LEVEL_DORMANT,
}


@dataclass(frozen=True)
class Packed:
    """One site, packed (``R`` rows, ``C`` columns, ``N`` neurons).

    Attributes:
        steps: Last step of each column, rising, ``C`` numbers.
        windows: Windows there were; more than ``C`` where some were left out.
        rows: ``R``; row ``r`` holds the neurons from ``r * N // R`` up to ``(r + 1) * N // R`` in order of gravity.
        resolution: What was kept.
        data: Base64 of the zlib-deflated planes, one after another, each one byte an item: if ``resolution.neurons``,
            index (4 planes of N, lowest byte first), label and fraction (N each); if ``resolution.steps`` too, death
            step + 1 and revival step + 1 (4 planes of N each); then share of dead (R × C, row by row; 0 only for
            none, 255 only for all) and level of the rest (R × C).
    """

    steps: list[int]
    windows: int
    rows: int
    resolution: Resolution
    data: str


def pack(site: SiteReport, budget: int, step: int) -> Packed:
    """Pack a site as finely as ``budget`` characters of base64 allow.

    Args:
        site: A site with at least one neuron.
        budget: Most characters that ``Packed.data`` should have.
        step: Step to put the verdicts at, where the site has no history.
    """
    steps, levels = _history(site, step)
    labels = site.judgement.labels()
    order = _gravity(site, levels)

    def packed(resolution: Resolution) -> Packed:
        picked = _pick(len(steps), resolution.columns)
        rows = min(site.neurons, resolution.rows)
        planes = []
        if resolution.neurons:
            planes += [_shuffle(order), labels[order], _fractions(site)[order]]
        if resolution.steps:
            planes += [_shuffle(site.history.died_step[order] + 1), _shuffle(site.history.revived_step[order] + 1)]
        share, rest = _bands(levels[picked][:, order], rows)
        planes += [_coarse(share, resolution.greys, 255), _coarse(rest, resolution.greys, LEVEL_MAX)]
        raw = b"".join(np.ascontiguousarray(plane, dtype=np.uint8).tobytes() for plane in planes)
        data = base64.b64encode(zlib.compress(raw, 9)).decode("ascii")
        return Packed([int(step) for step in steps[picked]], len(steps), rows, resolution, data)

    tried = map(packed, LADDER)
    return next((one for one in tried if len(one.data) <= budget), None) or packed(LADDER[-1])


def _history(site: SiteReport, step: int) -> tuple[IntArray, ByteArray]:
    """Steps ``(W,)`` and levels ``(W, N)``; one window made from the verdicts where the history has none."""
    if site.history.steps.size:
        return site.history.steps, site.history.levels
    levels = _fractions(site)
    for label, level in _LEVEL_OF_LABEL.items():
        levels[site.judgement.labels() == LABELS.index(label)] = level
    return np.array([max(step, 0)], dtype=np.int64), levels[None, :]


def _fractions(site: SiteReport) -> ByteArray:
    """Zero-output fraction of each neuron as a byte ``(N,)``; 0 and ``LEVEL_MAX`` stand for exactly none and all."""
    fraction = site.zero_output_fraction
    known = np.nan_to_num(fraction)
    inner = np.clip(np.round(known * LEVEL_MAX), 1, LEVEL_MAX - 1)
    levels = np.where(known <= 0.0, 0, np.where(known >= 1.0, LEVEL_MAX, inner)).astype(np.uint8)
    levels[np.isnan(fraction)] = LEVEL_UNSEEN
    return levels


def _gravity(site: SiteReport, levels: ByteArray) -> IntArray:
    """Neurons in the order of their rows: gravest label, earliest death, most dead windows, most zeros; ``(N,)``."""
    labels = site.judgement.labels()
    rank = np.where(labels == LABELS.index("unseen"), len(LABELS), labels)
    return np.lexsort(
        (
            np.arange(site.neurons),
            -_fractions(site).astype(np.int64),
            -(levels == LEVEL_DEAD).sum(axis=0),
            np.where(labels == LABELS.index("dead"), site.history.died_step, 0),
            rank,
        )
    ).astype(np.int64)


def _pick(windows: int, columns: int) -> IntArray:
    """Indices of at most ``columns`` windows, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, windows - 1, min(windows, columns)).round().astype(np.int64))


def _coarse(plane: ByteArray, greys: int, top: int) -> ByteArray:
    """``plane`` with what lies between 0 and ``top`` rounded to ``greys`` steps; 0, ``top`` and all above it stay."""
    if greys >= LEVEL_MAX:
        return plane
    unit = top / greys
    rounded = np.clip(np.round(np.round(plane / unit) * unit), 1, top - 1)
    return np.where((plane == 0) | (plane >= top), plane, rounded).astype(np.uint8)


def _bands(levels: ByteArray, rows: int) -> tuple[ByteArray, ByteArray]:
    """Share of dead and level of the rest, each ``(rows, C)``, from levels ``(C, N)`` in order of gravity.

    The rest of a band is not finite where any of it is; else what most of it is; fractions are averaged.
    """
    columns, neurons = levels.shape
    starts = np.arange(rows) * neurons // rows
    sizes = np.diff([*starts, neurons])

    def total(mask: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
        return np.add.reduceat(mask.astype(np.int64), starts, axis=1)

    dead = total(levels == LEVEL_DEAD)
    share = dead * 255 / sizes
    inner = np.clip(np.round(share), 1, 254)
    share = np.where(dead == 0, 0, np.where(dead == sizes, 255, inner))

    graded = levels <= LEVEL_MAX
    counts = [total(graded)]
    mean = total(np.where(graded, levels, 0)) / np.maximum(counts[0], 1)
    rest = [np.round(mean)]
    for level in (LEVEL_UNSEEN, LEVEL_DORMANT, LEVEL_CUT_OFF):
        counts.append(total(levels == level))
        rest.append(np.full((columns, rows), level))
    chosen = np.take_along_axis(np.stack(rest), np.argmax(counts, axis=0)[None], axis=0)[0]
    chosen = np.where(dead == sizes, LEVEL_DEAD, chosen)
    chosen = np.where(total(levels == LEVEL_NOT_FINITE) > 0, LEVEL_NOT_FINITE, chosen)
    return share.T.astype(np.uint8), chosen.T.astype(np.uint8)


def _shuffle(numbers: IntArray) -> ByteArray:
    """Whole numbers below 2³² as four planes of bytes, lowest first, ``(4, N)``: planes of zeros deflate to nothing."""
    clipped = np.clip(numbers, 0, (1 << 32) - 1).astype("<u4")
    return clipped.view(np.uint8).reshape(-1, 4).T
