"""Layouts: where each site's counts lie in the one row of numbers that ranks add up.

Ranks that share a model's data add their counts up; ranks that share a layer's neurons (tensor parallelism) lay theirs
side by side. Both are one sum: each rank puts its neurons where they belong in the whole layer, and nothing elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from neuronscope.count.counters import NEVER
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.distributed.sums import Numbers, Steps

__all__ = ["ReduceLayout", "Sites", "whole_site"]

FloatArray = npt.NDArray[np.float64]

#: Sites by name, in the order in which they lie: what each is, and the neurons of its whole layer.
Sites = Mapping[str, tuple[SiteInfo, int]]

_COUNTS = ("zero_outputs", "zero_gradients", "not_finite_outputs")
_NUMBERS = ("positions", "gradient_positions", "examples")
_SPAN = 2  # the last step of all, and the first


class ReduceLayout:
    """The sites of one phase, one after another, as float64: integers are exact up to 2**53, far above any window's.

    There are two rows. The one of *sums* has, for each site of ``N`` neurons, three counts and the sum of magnitudes,
    ``N`` each, and three numbers. The one of *steps* has the last and the first step of all, and for each site the
    latest and the first step, ``N`` each. What a rank does not give is not written.

    Args:
        phase: The phase.
        sites: Its sites.
    """

    def __init__(self, phase: str, sites: Sites) -> None:
        self.phase = phase
        self.sites = dict(sites)
        neurons = sum(count for _, count in self.sites.values())
        self.sums = 4 * neurons + len(_NUMBERS) * len(self.sites)
        self.steps = 2 * neurons + _SPAN

    @cached_property
    def mark(self) -> int:
        """A number of 64 bits, the same wherever the layout is, and of no other."""
        digest = hashlib.sha256(repr((self.phase, list(self.sites.items()))).encode()).digest()
        return int.from_bytes(digest[:8], "big")

    @property
    def size(self) -> int:
        """Numbers of both rows."""
        return self.sums + self.steps

    def lacking(self, sites: Sites) -> Sites:
        """Those sites that it does not have, or not in this width."""
        return {name: site for name, site in sites.items() if name not in self.sites or self.sites[name][1] != site[1]}

    def covering(self, sites: Sites) -> ReduceLayout:
        """This layout, with the sites that it lacks."""
        new = self.lacking(sites)
        return ReduceLayout(self.phase, {**self.sites, **new}) if new else self

    def put_sums(self, census: Census, row: FloatArray, *, duplicate: bool) -> None:
        """Write what a rank adds to the sums, into a row of zeros.

        Args:
            census: What the rank counted.
            row: The row of sums.
            duplicate: Another rank holds the same data, and counts for both what is not split.
        """
        end = 0
        for name, (_, neurons) in self.sites.items():
            start, end = end, end + 4 * neurons + len(_NUMBERS)
            place = _place(census.get(name), duplicate)
            if place is not None:
                tally, site = census[name], row[start:end]
                for number, field in enumerate((*_COUNTS, "abs_sum")):
                    site[number * neurons : (number + 1) * neurons][place] = getattr(tally, field)
                if place.start == 0:  # the rank of the first part speaks for the positions of all parts
                    site[4 * neurons :] = [getattr(tally, field) for field in _NUMBERS]

    def put_steps(self, census: Census, row: Numbers, steps: Steps, *, duplicate: bool) -> None:
        """Write what a rank knows of steps, into a row of nothing; see :meth:`put_sums`."""
        first_step = census.first_step if census.first_step >= 0 else NEVER
        row[:1], row[1:_SPAN] = steps.latest(np.array([census.last_step])), steps.first(np.array([first_step]))
        end = _SPAN
        for name, (_, neurons) in self.sites.items():
            start, end = end, end + 2 * neurons
            place = _place(census.get(name), duplicate)
            if place is not None:
                tally = census[name]
                row[start : start + neurons][place] = steps.latest(tally.last_active_step)
                row[start + neurons : end][place] = steps.first(tally.first_active_step)

    def read(self, sums: FloatArray, row: Numbers, steps: Steps) -> Census:
        """The census of all ranks, from the rows that they added up. Its arrays take the place of the rows'."""
        first_step, last_step = int(steps.read_first(row[1:_SPAN])[0]), int(steps.read_latest(row[:1])[0])
        row = row[_SPAN:]
        tallies = {}
        for name, (info, neurons) in self.sites.items():
            values: dict[str, Any] = {}
            for field in _COUNTS:
                values[field], sums = _stored(sums[:neurons].astype(np.int64), sums[:neurons]), sums[neurons:]
            values["abs_sum"], sums = sums[:neurons], sums[neurons:]
            values.update((field, int(number)) for field, number in zip(_NUMBERS, sums[: len(_NUMBERS)], strict=True))
            sums = sums[len(_NUMBERS) :]
            values["last_active_step"] = _stored(steps.read_latest(row[:neurons]), row[:neurons])
            row = row[neurons:]
            values["first_active_step"] = _stored(steps.read_first(row[:neurons]), row[:neurons])
            row = row[neurons:]
            tallies[name] = Tally(info=info, **values)
        return Census(tallies, first_step=first_step if first_step < NEVER else -1, last_step=last_step)


def whole_site(tally: Tally) -> tuple[SiteInfo, int]:
    """The layer of which a rank counted a part, or all: what it is, and its neurons."""
    return replace(tally.info, first=0, whole=0), tally.info.whole or tally.neurons


def _place(tally: Tally | None, duplicate: bool) -> slice | None:
    """Where in the layer a rank's neurons lie; ``None`` where it counts none, or another counts them for it."""
    if tally is None or tally.info.first < 0 or (duplicate and tally.info.whole == 0):
        return None
    return slice(tally.info.first, tally.info.first + tally.neurons)


def _stored(values: npt.NDArray[np.int64], where: Numbers) -> npt.NDArray[np.int64]:
    """Integers, in the memory of the numbers that they were read from: a row is as large as a census."""
    stored = where.view(np.int64)
    stored[:] = values
    return stored
