"""Decide which neurons of several sites are one neuron, and which of its places stands for it in totals.

A neuron is a unit of a layer. It is seen at several sites if it goes through several activations, or if both a gate
and its product are counted. Totals count it once. The units of a site are a few runs, so all work is
done on slices.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol

import numpy as np

from neuronscope.arrays import BoolArray, ByteArray, IntArray
from neuronscope.judge.verdicts import LABELS

__all__ = ["DistinctNeurons", "SiteUnits"]


_UNSEEN = LABELS.index("unseen")
#: Kinds of sites that are what the next layer reads of an activation: a gate's product, latents after their selection.
_READ = ("gated", "sparse")
# A key is one byte that orders the places of a neuron: the place with the lowest key stands for it.
_STEP = 40  # between ranks of keys; a key modulo this is the label
_OUTSIDE = 3 * _STEP  # keys of sites out of headlines start here
_NOWHERE = 255  # no site has this unit

#: Highest index of a unit, so that a damaged file cannot take all memory.
MAX_UNIT = 1 << 24


class SiteUnits(Protocol):
    """List what :class:`DistinctNeurons` reads of one site with ``N`` neurons.

    A :class:`neuronscope.tally.census.Tally` and a :class:`neuronscope.report.report.SiteReport` have them all.
    """

    @property
    def kind(self) -> str:
        """The activation's kind; ``gated`` for the product of a gate."""

    @property
    def activation(self) -> str:
        """Name of the activation function, product or selection."""

    @property
    def neurons(self) -> int:
        """``N``."""

    @property
    def units(self) -> tuple[tuple[str, int, int, int], ...]:
        """The units that the neurons are; see :class:`neuronscope.sites.SiteInfo`."""

    @property
    def in_headlines(self) -> bool:
        """Whether totals include the site."""


class DistinctNeurons:
    """Map the neurons of several sites to distinct neurons: two neurons that are the same unit of a layer are one.

    The neurons of a site are its own if no layer is known, if its units are not as many as its neurons, or if a unit is
    not between 0 and :data:`MAX_UNIT`.

    Args:
        sites: The sites, in the order in which they first ran.

    >>> from types import SimpleNamespace as Site
    >>> site = Site(kind="relu-like", activation="relu", neurons=3, units=(("h", 0, 3, 1),), in_headlines=True)
    >>> DistinctNeurons([site, site]).neurons
    3
    """

    def __init__(self, sites: Sequence[SiteUnits]) -> None:
        self._sites = tuple(sites)
        self._read = tuple(self._find_read())
        sizes: dict[Hashable, int] = {}
        for index in range(len(self._sites)):
            for layer, run in self._runs(index):
                sizes[layer] = max(sizes.get(layer, 0), max(run[0], run[-1]) + 1)
        ends = np.cumsum([0, *sizes.values()]).tolist()
        self._size = ends[-1]  # distinct neurons are numbered by layer and unit; numbers of unused units are left out
        starts = dict(zip(sizes, ends, strict=False))
        self._parts = tuple(tuple(self._slices(index, starts)) for index in range(len(self._sites)))

    def _runs(self, index: int) -> Iterator[tuple[Hashable, range]]:
        """Yield the layer and the units of each run of a site; the layer of its own neurons is the site's index."""
        site = self._sites[index]
        runs = [(layer, range(start, stop, step)) for layer, start, stop, step in site.units]
        ends = [end for _, run in runs if run for end in (run[0], run[-1])]
        known = sum(len(run) for _, run in runs) == site.neurons and all(0 <= end <= MAX_UNIT for end in ends)
        for layer, run in runs if known else [(index, range(site.neurons))]:
            if run:
                yield layer, run

    def _find_read(self) -> Iterator[bool]:
        """Yield of each site whether it is a product of a gate, or the first selection of a name from its units.

        An auxiliary loss selects again, among latents that are dead: what it leaves out may well fire.
        """
        selected = set()
        for site in self._sites:
            this = (site.activation, site.units)
            yield site.kind in _READ and not (site.kind == "sparse" and this in selected)
            if site.kind == "sparse" and site.units and site.in_headlines:
                selected.add(this)

    def _slices(self, index: int, starts: dict[Hashable, int]) -> Iterator[tuple[slice, slice]]:
        """Yield which neurons of a site are which distinct neurons, as pairs of slices of the same length."""
        begin = 0
        for layer, run in self._runs(index):
            end, origin = begin + len(run), starts[layer]
            if run.step > 0:
                yield slice(begin, end), slice(origin + run[0], origin + run[-1] + 1, run.step)
            else:  # both in reverse, so that no slice ends before 0
                backwards = slice(end - 1, begin - 1 if begin else None, -1)
                yield backwards, slice(origin + run[-1], origin + run[0] + 1, -run.step)
            begin = end

    @property
    def neurons(self) -> int:
        """Number of distinct neurons in the totals."""
        return int((self._lowest(self._keys(self._alive())) < _OUTSIDE).sum())

    def label(self, labels: Sequence[ByteArray]) -> ByteArray:
        """Return one label for each distinct neuron in the totals, uint8 ``(D,)``, by those at each site, ``(N,)``.

        Where a product of a gate or a selection was observed, its label counts; of several selections of one name, that
        of the first. Otherwise, the most serious label of the sites at which the neuron was observed counts. A neuron
        that no site observed is unseen. The order is by layer and unit;
        neither it nor ``D`` depends on the labels, which are indices into :data:`neuronscope.judge.verdicts.LABELS`.
        """
        lowest = self._lowest(self._keys(labels))
        return np.asarray(lowest[lowest < _OUTSIDE] % _STEP, dtype=np.uint8)

    def stand_ins(self, labels: Sequence[ByteArray]) -> tuple[BoolArray, ...]:
        """Return which place stands for each distinct neuron: the one that gives it its label, see :meth:`label`.

        There is one mask by site, bool ``(N,)``; each distinct neuron is in exactly one of them, once. Of several such
        places, the first stands for it. A place at a site out of headlines stands for a neuron only if no site in
        headlines has it.
        """
        keys = self._keys(labels)
        lowest = self._lowest(keys)
        taken = np.zeros(self._size, dtype=np.bool_)
        masks = []
        for parts, key in zip(self._parts, keys, strict=True):
            mask = np.zeros(key.shape, dtype=np.bool_)
            for neurons, distinct in parts:
                mask[neurons] = (key[neurons] == lowest[distinct]) & ~taken[distinct]
                taken[distinct] |= mask[neurons]
            masks.append(mask)
        return tuple(masks)

    def homes(self) -> tuple[BoolArray, ...]:
        """Return one place for each distinct neuron that does not depend on labels: the product, else the first site.

        There is one mask by site, bool ``(N,)``, as from :meth:`stand_ins`.
        """
        return self.stand_ins(self._alive())

    def highest(self, values: Sequence[IntArray]) -> IntArray:
        """Return the highest value of each distinct neuron in the totals over the places that may be its home.

        These are the products of a gate if the neuron has one, else all its places in headlines: see :meth:`homes`.
        Values are given by site, each int64 ``(N,)``, ≥ 0, and returned by layer and unit, int64 ``(D,)``.
        """
        keys = self._keys(self._alive())
        lowest = self._lowest(keys)
        highest = np.zeros(self._size, dtype=np.int64)
        for parts, key, value in zip(self._parts, keys, values, strict=True):
            for neurons, distinct in parts:
                may_be_home = key[neurons] == lowest[distinct]
                np.maximum(highest[distinct], value[neurons], out=highest[distinct], where=may_be_home)
        return highest[lowest < _OUTSIDE]

    def spread(self, values: Sequence[IntArray], masks: Sequence[BoolArray]) -> list[IntArray]:
        """Give every place of a neuron the value of the place that stands for it: by site, int64 ``(N,)``.

        Args:
            values: Values by site, each int64 ``(N,)``.
            masks: The places that stand for a neuron, as from :meth:`stand_ins`, each bool ``(N,)``.
        """
        whole = np.zeros(self._size, dtype=np.int64)
        for parts, value, mask in zip(self._parts, values, masks, strict=True):
            for neurons, distinct in parts:
                np.copyto(whole[distinct], value[neurons], where=mask[neurons])
        spread = [np.empty_like(value) for value in values]
        for parts, value in zip(self._parts, spread, strict=True):
            for neurons, distinct in parts:
                value[neurons] = whole[distinct]
        return spread

    def _alive(self) -> list[ByteArray]:
        return [np.full(site.neurons, LABELS.index("alive"), dtype=np.uint8) for site in self._sites]

    def _keys(self, labels: Sequence[ByteArray]) -> list[ByteArray]:
        """Return keys by site, uint8 ``(N,)``: first in headlines, then observed, then a product, then serious."""
        keys = []
        for site, read, label in zip(self._sites, self._read, labels, strict=True):
            table = np.arange(len(LABELS), dtype=np.uint8) + (0 if read else _STEP)
            table[_UNSEEN] = 2 * _STEP + _UNSEEN
            keys.append((table + (0 if site.in_headlines else _OUTSIDE)).astype(np.uint8)[label])
        return keys

    def _lowest(self, keys: Sequence[ByteArray]) -> ByteArray:
        """Return the lowest key of each distinct neuron, uint8 ``(D,)``."""
        lowest = np.full(self._size, _NOWHERE, dtype=np.uint8)
        for parts, key in zip(self._parts, keys, strict=True):
            for neurons, distinct in parts:
                np.minimum(lowest[distinct], key[neurons], out=lowest[distinct])
        return lowest
