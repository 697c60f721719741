"""Pack the neurons and the history of a layer as bytes within a budget, and say what resolution was lost.

Neurons are sorted worst first (dead ones at the top) and, if the budget asks for it, joined into bands. A band holds
the *share of dead* beside the mean of the rest, so that averaging never hides a dead neuron.
"""

from __future__ import annotations

import base64
import json
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from neuronscope.arrays import ByteArray, FloatArray, IntArray
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import (
    LEVEL_CUT_OFF,
    LEVEL_DEAD,
    LEVEL_DORMANT,
    LEVEL_MAX,
    LEVEL_NOT_FINITE,
    LEVEL_SILENT,
    LEVEL_UNSEEN,
    LEVELS,
    SiteReport,
)
from neuronscope.writers.formatting import visible

__all__ = [
    "NetworkMap",
    "Packed",
    "Resolution",
    "coarse_levels",
    "encode",
    "first_that_fits",
    "four_planes",
    "fraction_levels",
    "pack",
    "share_budget",
    "spread_windows",
    "summarise",
    "summarise_histories",
]


class _HasNeurons(Protocol):  # a layer of either kind of report
    @property
    def neurons(self) -> int: ...


class _HasData(Protocol):  # a layer that was packed, as base64
    @property
    def data(self) -> str: ...


LayerT = TypeVar("LayerT", bound=_HasNeurons)
PackedT = TypeVar("PackedT", bound=_HasData)
RungT = TypeVar("RungT")


def share_budget(
    layers: Mapping[int, LayerT], pack: Callable[[LayerT, int], PackedT], total: int, least: int
) -> dict[int, PackedT]:
    """Pack layers so that all of them together keep a budget: what small layers leave goes to the large ones.

    Args:
        layers: The layers, by index.
        pack: Packs a layer within a budget.
        total: Most characters for all layers.
        least: The fewest characters that any layer gets.
    """
    packed: dict[int, PackedT] = {}
    left = total
    for turn, index in enumerate(sorted(layers, key=lambda index: layers[index].neurons)):
        packed[index] = pack(layers[index], max(left // (len(layers) - turn), least))
        left -= len(packed[index].data)
    return {index: packed[index] for index in layers}


def first_that_fits(rungs: Sequence[RungT], pack: Callable[[RungT], PackedT], budget: int) -> PackedT:
    """Pack with a rung of a ladder that keeps the budget and whose finer neighbour does not, or else with the last one.

    Args:
        rungs: From everything to little; about half as many are tried as would be from the top.
        pack: Packs with a rung.
        budget: Most characters.
    """
    packed = pack(rungs[0])
    if len(packed.data) <= budget:
        return packed
    tried: dict[int, PackedT] = {}

    def fits(place: int) -> bool:
        tried[place] = pack(rungs[place])
        return len(tried[place].data) <= budget

    last = len(rungs) - 1
    place = 1 + bisect_left(range(1, last), True, key=fits)
    return tried[place] if place < last else pack(rungs[last])


def encode(planes: Iterable[ByteArray]) -> str:
    """Return planes of bytes as base64 of the zlib-deflated bytes; empty if there are none."""
    raw = b"".join(np.ascontiguousarray(plane).tobytes() for plane in planes)
    return base64.b64encode(zlib.compress(raw, 7)).decode("ascii") if raw else ""


def four_planes(values: npt.NDArray[np.generic]) -> ByteArray:
    """Return numbers of four bytes ``(N,)`` as four planes, lowest byte first, ``(4, N)``: zero planes deflate well."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, 4).T


def fraction_levels(fractions: FloatArray) -> ByteArray:
    """Return fractions ``(N,)`` as levels, uint8 ``(N,)``: only an exact 0 is 0, only an exact 1 is ``LEVEL_MAX``."""
    inner = np.clip(np.rint(np.nan_to_num(fractions) * LEVEL_MAX), 1, LEVEL_MAX - 1)
    coded = np.where(fractions == 0.0, 0, np.where(fractions == 1.0, LEVEL_MAX, inner))
    return np.where(np.isnan(fractions), LEVEL_UNSEEN, coded).astype(np.uint8)


def _history(site: SiteReport, step: int) -> tuple[IntArray, ByteArray]:
    """Return the steps and levels of a layer's windows; of one without any its verdicts, or else fractions of zeros."""
    if site.history.steps.size:
        return site.history.steps, site.history.levels
    levels = fraction_levels(site.zero_output_fraction)
    levels[levels == LEVEL_MAX] = LEVEL_MAX - 1  # LEVEL_MAX itself is a verdict
    labels = site.judgement.labels()
    for label, level in LEVELS.items():
        levels[labels == LABELS.index(label)] = level
    return np.array([max(step, 0)], dtype=np.int64), levels[None, :]


@dataclass(frozen=True)
class Resolution:
    """How finely a layer is packed."""

    columns: int  # most windows that are kept; they are spread evenly and include the first and the last one
    rows: int  # most rows that are kept; if there are more neurons, neighbours share a row
    greys: int = LEVEL_MAX  # steps between "never zero" and "always zero"
    steps: bool = True  # whether each neuron's death and revival steps are kept
    neurons: bool = True  # whether each neuron's index, label and fraction are kept


#: From everything to little; the first that fits the budget is taken, or else the last.
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


@dataclass(frozen=True)
class Packed:
    """A layer's neurons and history, packed (``N`` neurons, ``R`` rows, ``C`` columns)."""

    steps: list[int]  # last step of each column, rising, ``C`` numbers
    windows: int  # number of windows of the history; more than ``C`` if some were left out
    rows: int  # ``R``; row ``r`` holds the neurons from ``r * N // R`` up to ``(r + 1) * N // R``, sorted worst first
    resolution: Resolution  # what was kept
    #: Base64 of the zlib-deflated planes, one after another, each one byte an item: if ``resolution.neurons``, index (4
    #: planes of N, lowest byte first), label and fraction (N each); if ``resolution.steps`` too, death step + 1 and
    #: revival step + 1 (4 planes of N each); then share of dead (R × C, row by row; 0 only for none, 255 only for all)
    #: and level of the rest (R × C).
    data: str


def pack(site: SiteReport, budget: int, step: int) -> Packed:
    """Pack a layer as finely as the budget allows.

    Args:
        site: A layer with at least one neuron.
        budget: Most characters that ``Packed.data`` should have.
        step: Step of the verdicts, if the layer has no history.
    """
    steps, levels = _history(site, step)
    labels, fractions = site.judgement.labels(), fraction_levels(site.zero_output_fraction)
    order = _worst_first(site, levels)

    def packed(resolution: Resolution) -> Packed:
        picked = spread_windows(len(steps), resolution.columns)
        rows = min(site.neurons, resolution.rows)
        planes: list[ByteArray] = []
        if resolution.neurons:
            planes += [four_planes(order.astype("<u4")), labels[order].astype(np.uint8), fractions[order]]
        if resolution.steps:
            died, revived = site.history.died_step[order], site.history.revived_step[order]
            planes += [four_planes(np.clip(at + 1, 0, (1 << 32) - 1).astype("<u4")) for at in (died, revived)]
        share, rest = _bands(levels[picked][:, order], rows)
        planes += [_coarse(share, resolution.greys, 255), coarse_levels(rest, resolution.greys)]
        return Packed([int(step) for step in steps[picked]], len(steps), rows, resolution, encode(planes))

    return first_that_fits(LADDER, packed, budget)


@dataclass(frozen=True)
class NetworkMap:
    """The history of all layers, packed (``L`` layers, ``C`` columns)."""

    steps: list[int]  # last step of each column, rising, ``C`` numbers
    windows: int  # number of windows; more than ``C`` if some were left out
    #: Base64 of the zlib-deflated planes, one after another: neurons (4 planes of L, lowest byte first), dead neurons
    #: (4 planes of L × C, layer by layer), level of the rest (L × C, one byte each), and the names of the layers as
    #: JSON.
    data: str


def summarise(sites: Sequence[SiteReport], budget: int, step: int) -> NetworkMap | None:
    """Pack the history of a network's layers with as many windows as the budget allows; ``None`` if nothing was seen.

    Args:
        sites: The layers.
        budget: Most characters that ``NetworkMap.data`` should have; with few windows it may have more.
        step: Step of the verdicts, for layers that have no history.
    """
    histories = [_history(site, step) for site in sites]
    return summarise_histories([site.name for site in sites], histories, budget)


def summarise_histories(
    layers: Sequence[str], histories: Sequence[tuple[IntArray, ByteArray]], budget: int
) -> NetworkMap | None:
    """Pack the histories of layers with as many windows as the budget allows; ``None`` if nothing was seen.

    Args:
        layers: Names of the layers.
        histories: The history of each: last step of each window, int64 ``(W,)``, and levels, uint8 ``(W, N)``.
        budget: Most characters that ``NetworkMap.data`` should have; with few windows it may have more.
    """
    seen = [steps for steps, levels in histories if levels.size and (levels != LEVEL_UNSEEN).any()]
    if not seen:
        return None
    steps = np.unique(np.concatenate(seen))
    names = np.frombuffer(json.dumps(list(map(visible, layers))).encode(), dtype=np.uint8)
    sizes = four_planes(np.array([levels.shape[1] for _, levels in histories], dtype="<u4"))

    def packed(columns: int) -> NetworkMap:
        picked = steps[spread_windows(len(steps), columns)]
        dead = np.zeros((len(layers), picked.size), dtype="<u4")
        rest = np.full(dead.shape, LEVEL_UNSEEN, dtype=np.uint8)
        for row, (own, levels) in enumerate(histories):
            at = np.searchsorted(own, picked, side="right") - 1
            if levels.shape[1]:
                found = levels[at[at >= 0]]
                dead[row, at >= 0] = (found == LEVEL_DEAD).sum(axis=1)
                rest[row, at >= 0] = coarse_levels(_bands(found, 1)[1][0], 25)
        return NetworkMap(picked.tolist(), steps.size, encode([sizes, four_planes(dead.ravel()), rest, names]))

    return first_that_fits((256, 128, 64, 32, 16), packed, budget)


def _worst_first(site: SiteReport, levels: ByteArray) -> IntArray:
    """Return the neurons by label (worst first), earliest death, most dead windows, most zeros, int64 ``(N,)``."""
    labels = site.judgement.labels()
    rank = np.where(labels == LABELS.index("unseen"), len(LABELS), labels)
    return np.lexsort(
        (
            np.arange(site.neurons),
            -fraction_levels(site.zero_output_fraction).astype(np.int64),
            -(levels == LEVEL_DEAD).sum(axis=0),
            np.where(labels == LABELS.index("dead"), site.history.died_step, 0),
            rank,
        )
    ).astype(np.int64)


def spread_windows(windows: int, columns: int) -> IntArray:
    """Return indices of windows that are spread evenly from the first to the last, int64 ``(C,)``.

    Args:
        windows: Number of windows.
        columns: Most indices.
    """
    return np.unique(np.linspace(0, windows - 1, min(windows, columns)).round().astype(np.int64))


def coarse_levels(levels: ByteArray, shades: int) -> ByteArray:
    """Round levels between "never zero" and "always zero" to ``shades`` steps; verdicts stay unchanged.

    Args:
        levels: uint8, any shape.
        shades: The number of steps.
    """
    return _coarse(levels, shades, LEVEL_MAX)


def _coarse(plane: ByteArray, greys: int, top: int) -> ByteArray:
    """Round what lies between 0 and ``top`` to ``greys`` steps; 0, ``top`` and all above it stay unchanged."""
    if greys >= LEVEL_MAX:
        return plane
    unit = top / greys
    rounded = np.clip(np.round(np.round(plane / unit) * unit), 1, top - 1)
    return np.where((plane == 0) | (plane >= top), plane, rounded).astype(np.uint8)


def _bands(levels: ByteArray, rows: int) -> tuple[ByteArray, ByteArray]:
    """Return the share of dead and the level of the rest, uint8 ``(rows, C)`` each.

    Levels are uint8 ``(C, N)``, neurons sorted worst first. The rest of a band is not finite if any of it is; else it
    is what most of it is; fractions are averaged.
    """
    columns, neurons = levels.shape
    if rows == neurons:  # a band is one neuron
        return np.where(levels == LEVEL_DEAD, 255, 0).T.astype(np.uint8), levels.T
    starts = np.arange(rows) * neurons // rows
    sizes = np.diff([*starts, neurons])

    def total(values: npt.NDArray[np.generic]) -> IntArray:
        if not values.any():  # as of most verdicts
            return np.zeros((columns, rows), dtype=np.int64)
        return np.add.reduceat(values, starts, axis=1, dtype=np.int64)

    dead = total(levels == LEVEL_DEAD)
    share = dead * 255 / sizes
    inner = np.clip(np.round(share), 1, 254)
    share = np.where(dead == 0, 0, np.where(dead == sizes, 255, inner))

    graded = levels < LEVEL_MAX
    counts = [total(graded)]
    mean = total(np.where(graded, levels, 0)) / np.maximum(counts[0], 1)
    rest = [np.round(mean)]
    for level in (LEVEL_UNSEEN, LEVEL_DORMANT, LEVEL_CUT_OFF, LEVEL_SILENT):
        counts.append(total(levels == level))
        rest.append(np.full((columns, rows), level))
    chosen = np.take_along_axis(np.stack(rest), np.argmax(counts, axis=0)[None], axis=0)[0]
    chosen = np.where(dead == sizes, LEVEL_DEAD, chosen)
    chosen = np.where(total(levels == LEVEL_NOT_FINITE) > 0, LEVEL_NOT_FINITE, chosen)
    return share.T.astype(np.uint8), chosen.T.astype(np.uint8)
