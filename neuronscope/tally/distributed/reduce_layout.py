"""Lay out the counts of a phase in arrays that are reduced over ranks.

Ranks that hold copies of a model count the same neurons on different data, and their counts are added up. Ranks that
share a layer (tensor parallelism) each count a part of its neurons. One reduction does both: each rank writes its
counts at the places of its neurons in the whole layer, and leaves the other places empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from neuronscope.count.counter_tensors import NEVER
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.distributed.collectives import Collectives

__all__ = ["ReduceLayout", "Sites", "whole_site"]

#: Sites by name, in the order in which they are laid out: what each is, and the number of neurons of the whole layer.
Sites = Mapping[str, tuple[SiteInfo, int]]

_COUNTS = ("zero_outputs", "zero_gradients", "not_finite_outputs")
_TOTALS = ("positions", "gradient_positions", "examples")


class ReduceLayout:
    """The sites of one phase, whose ``T`` neurons lie one after another. It must be the same on all ranks."""

    def __init__(self, part: tuple[int, str], sites: Sites) -> None:
        self.part = part
        self.sites = dict(sites)
        self._slices: dict[str, slice] = {}
        self._neurons = 0
        self._idle: dict[str, slice] = {}  # sites of which it is kept how long each neuron has not fired
        self._idle_neurons = 0
        for name, (info, neurons) in self.sites.items():
            self._slices[name] = slice(self._neurons, self._neurons + neurons)
            self._neurons += neurons
            if info.kind == "sparse":
                self._idle[name] = slice(self._idle_neurons, self._idle_neurons + neurons)
                self._idle_neurons += neurons

    @cached_property
    def signature(self) -> int:
        """A number below ``2**62`` that is the same for equal layouts, and different for others."""
        widths = [(name, neurons, info.kind == "sparse") for name, (info, neurons) in self.sites.items()]
        digest = hashlib.sha256(repr((self.part, widths)).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 2

    def lacking(self, sites: Sites) -> Sites:
        """Return those of some sites that it does not have, or not with as many neurons."""
        return {name: site for name, site in sites.items() if name not in self.sites or self.sites[name][1] != site[1]}

    def covering(self, sites: Sites) -> ReduceLayout:
        """Return this layout with the sites that it lacks."""
        lacking = self.lacking(sites)
        return ReduceLayout(self.part, {**self.sites, **lacking}) if lacking else self

    def reduce(self, census: Census, collectives: Collectives, *, duplicate: bool) -> Census:
        """Return the counts of all ranks, in three collectives.

        They are a sum of the int64 counts, a sum of the float64 magnitudes (each dtype has its own, so that counts are
        exact whatever their size), and a maximum of the steps. A first step is a minimum, so it is sent negated.

        Args:
            census: What this rank counted; empty where it has nothing of this phase.
            collectives: Those of this exchange.
            duplicate: Another rank has the same data, and counts for both what is not split.
        """
        shapes = (len(_COUNTS), self._neurons), (len(self.sites), len(_TOTALS)), (1, self._idle_neurons)
        ends = np.cumsum([rows * columns for rows, columns in shapes])
        integers = np.zeros(ends[-1], dtype=np.int64)
        counts, totals, (idle,) = (
            part.reshape(shape) for part, shape in zip(np.split(integers, ends[:-1]), shapes, strict=True)
        )
        abs_sum = np.zeros(self._neurons)
        steps = np.full(2 + 2 * self._neurons, -NEVER)
        last, first = steps[2:].reshape(2, self._neurons)
        steps[:2] = census.last_step, -census.first_step if census.first_step >= 0 else -NEVER
        for number, (name, layer) in enumerate(self._slices.items()):
            tally = census.get(name)
            if tally is None or tally.first < 0 or (duplicate and not tally.whole):
                continue
            own = slice(layer.start + tally.first, layer.start + tally.first + tally.neurons)
            counts[:, own] = [getattr(tally, field) for field in _COUNTS]
            abs_sum[own] = tally.abs_sum
            last[own] = tally.last_active_step
            first[own] = -tally.first_active_step
            if tally.first == 0:  # the positions are the same for all parts of a layer: one rank counts them
                totals[number] = [getattr(tally, field) for field in _TOTALS]
        collectives.max(steps)
        np.maximum(last, -1, out=last)
        np.negative(first, out=first)
        for name, layer in self._idle.items():  # how long ago a neuron fired depends on when it did on any rank
            tally = census.get(name)
            if tally is not None and tally.first >= 0 and not (duplicate and not tally.whole):
                own = slice(tally.first, tally.first + tally.neurons)
                idle[layer][own] = tally.idle_since(last[self._slices[name]][own])
        collectives.sum(integers)
        collectives.sum(abs_sum)
        tallies = {}
        for name, layer, total in zip(self._slices, self._slices.values(), totals.tolist(), strict=True):
            values: dict[str, Any] = dict(zip((*_COUNTS, *_TOTALS), (*counts[:, layer], *total), strict=True))
            if name in self._idle:
                values.update(idle_positions=idle[self._idle[name]])
            values.update(abs_sum=abs_sum[layer], last_active_step=last[layer], first_active_step=first[layer])
            tallies[name] = Tally(**vars(self.sites[name][0]), **values)
        last_step, first_step = steps[0].item(), -steps[1].item()
        return Census(tallies, first_step=first_step if first_step < NEVER else -1, last_step=last_step)


def whole_site(tally: Tally) -> tuple[SiteInfo, int]:
    """Return what the layer is of which a rank counted all neurons or a part, and how many neurons it has."""
    return replace(tally.info, first=0, whole=0), tally.whole or tally.neurons
