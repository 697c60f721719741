"""Gifts: what one rank brings to an exchange, and how those of all ranks become one census."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neuronscope.count.counters import NEVER
from neuronscope.tally.census import Census
from neuronscope.tally.distributed.collectives import Collectives
from neuronscope.tally.distributed.reduce_layout import ReduceLayout
from neuronscope.tally.distributed.sums import Steps, StepWords

__all__ = ["Contribution", "joined_by", "summed"]

FloatArray = npt.NDArray[np.float64]


class Contribution(NamedTuple):
    """What one rank brings to an exchange.

    Attributes:
        layout: Of its phase, as this rank would have it.
        census: What it counted.
        duplicate: Another rank holds the same data, and counts for both what is not split.
        first: First step that it knows of; ``NEVER`` where it knows of none.
        last: Last such step; −1 where it knows of none.
        full: Whether it brings anything at all. Who does not has no say in what is joined.
    """

    layout: ReduceLayout
    census: Census
    duplicate: bool
    first: int
    last: int
    full: bool

    @classmethod
    def of(cls, census: Census, layout: ReduceLayout, *, duplicate: bool) -> Contribution:
        """What a rank brings that counted a census.

        The first step is one that was noted, where any was: then ranks whose neurons first fire at different steps
        still name the same one.
        """
        tallies = census.values()
        firsts = [int(tally.first_active_step.min(initial=NEVER)) for tally in tallies]
        lasts = [int(tally.last_active_step.max(initial=-1)) for tally in tallies]
        first = min([*firsts, census.first_step if census.first_step >= 0 else NEVER])
        last = max([*lasts, census.last_step])
        full = last >= 0 or any(tally.positions or tally.gradient_positions for tally in tallies)
        return cls(layout, census, duplicate, first, last, full)

    def fits(self, layout: ReduceLayout) -> bool:
        """Whether there is anything to put into a layout: of its phase, and not nothing."""
        return self.full and self.layout.phase == layout.phase

    def put(self, layout: ReduceLayout, row: FloatArray, steps: Steps) -> None:
        """Write it into a row of zeros; steps that have no room there travel apart."""
        layout.put_sums(self.census, row[: layout.sums], duplicate=self.duplicate)
        if isinstance(steps, StepWords) and steps.hold(self.first, self.last):
            layout.put_steps(self.census, row[layout.sums : layout.size], steps, duplicate=self.duplicate)


def summed(layout: ReduceLayout, steps: Steps, gift: Contribution, collectives: Collectives) -> Census:
    """What all ranks bring by one layout. A rank that brings nothing of it learns it too, and takes part.

    Args:
        layout: The same on all ranks.
        steps: How steps travel, the same on all ranks.
        gift: What this rank brings.
        collectives: Of this exchange.
    """
    row = np.zeros(layout.size)
    if gift.fits(layout):
        gift.put(layout, row, steps)
    collectives.add_up(row)
    return joined_by(layout, row, steps, gift, collectives)


def joined_by(
    layout: ReduceLayout, row: FloatArray, steps: Steps, gift: Contribution, collectives: Collectives
) -> Census:
    """The same from a row that was summed already; steps that have no room in it take one collective more."""
    sums = row[: layout.sums]
    if isinstance(steps, StepWords):
        return layout.read(sums, row[layout.sums : layout.size], steps)
    apart = np.full(layout.steps, steps.nothing, dtype=np.int64)
    if gift.fits(layout):
        layout.put_steps(gift.census, apart, steps, duplicate=gift.duplicate)
    collectives.take_largest(apart)
    return layout.read(sums, apart, steps)
