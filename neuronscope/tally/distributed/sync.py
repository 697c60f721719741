"""Census of all ranks: what every process of a distributed run counted, together, exactly.

Only what every rank calls may come here: see :meth:`neuronscope.scope.Scope.step`. Ranks have a layout of each phase in
common, which says where the counts of every site lie: one sum then joins all of them. Where a rank has something that
is not in the layout, or is in another phase than the rest, that sum says so, and the ranks agree on a new layout first.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from neuronscope.errors import NeuronscopeWarning
from neuronscope.tally.census import Census
from neuronscope.tally.distributed.collectives import Collectives
from neuronscope.tally.distributed.contribution import Contribution, joined_by, summed
from neuronscope.tally.distributed.reduce_layout import ReduceLayout, Sites, whole_site
from neuronscope.tally.distributed.sums import SAYING, PlainSteps, Steps, StepWords, said_by_all, saying

__all__ = ["Exchanges", "RankSync", "world_size"]

FloatArray = npt.NDArray[np.float64]


def world_size() -> int:
    """Number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Exchanges(NamedTuple):
    """What joining has cost this rank so far.

    Attributes:
        ranks: Number of ranks.
        times: How often counts were joined.
        collectives: How many collectives that took: one each, and more where ranks had to agree on a layout first, or
            where steps had no room in the sum.
        bytes: Bytes that this rank gave to the last exchange.
        seconds: Seconds that all of them took, waiting for the slowest rank included.
    """

    ranks: int
    times: int
    collectives: int
    bytes: int
    seconds: float


class _Head(NamedTuple):
    """The first words of the sum: what each rank says, and then what they all said.

    Attributes:
        busy: Ranks that are not done.
        givers: Ranks that bring anything.
        strays: Those whose steps have no room in their :class:`~neuronscope.tally.distributed.sums.StepWords`.
        mark: The givers' layout, by its mark; ``None`` where they have several.
        base: The givers' first step; ``None`` where they have several.
    """

    busy: int
    givers: int
    strays: int
    mark: int | None
    base: int | None

    @staticmethod
    def words(gift: Contribution, steps: StepWords, *, done: bool) -> FloatArray:
        """What one rank says, ``(19,)``."""
        if not gift.full:
            return np.array([not done] + [0] * (2 + 2 * SAYING), dtype=np.float64)
        stray = not steps.hold(gift.first, gift.last)
        return np.concatenate([[not done, 1, stray], saying(gift.layout.mark), saying(steps.base)])

    @classmethod
    def read(cls, sums: FloatArray) -> _Head:
        """What all of them said, from the sums of their words."""
        busy, givers, strays = (int(number) for number in sums[:3])
        mark, base = (said_by_all(part, givers) for part in np.split(sums[3:], 2))
        return cls(busy, givers, strays, mark, base)


class RankSync:
    """The ranks of a distributed run, as one of them meets the others; one instance a scope.

    Each exchange takes whatever each rank brings and puts it where it belongs: ranks with more batches than others, or
    none, keep nobody waiting for ever and lose no count. A rank that is done goes on answering until all are.

    Args:
        together: Whether counts are joined at all.
    """

    def __init__(self, *, together: bool = True) -> None:
        self._together = together
        # By phase. These change only in exchanges, by what all ranks learn there: so they are the same on all of them.
        self._agreed: dict[str, ReduceLayout] = {}
        self._refused: dict[str, set[str]] = {}  # sites that are not of one width
        self._kept: dict[str, Census] = {}  # by phase, what others brought while this rank was in another phase
        self.duplicate = False  # another rank holds the same data, and counts for both what is not split
        self.all_done = True  # whether, in the last exchange, every rank was done
        self.exchanges = Exchanges(1, 0, 0, 0, 0.0)

    @property
    def alone(self) -> bool:
        """Whether no other rank counts along."""
        return not self._together or world_size() == 1

    def join(self, census: Census, *, phase: str, done: bool = False) -> Census:
        """What all ranks counted since they last joined. Every rank must call this equally often, or be done.

        Args:
            census: What this rank counted, and in which steps.
            phase: Of this rank.
            done: This rank will not call again, unless :attr:`all_done` stays false: then it must.

        Returns:
            The same counts on every rank in that phase; the steps are from the first of any rank to the last.
        """
        if self.alone:
            self.all_done = True
            return census
        began = time.perf_counter()
        collectives = Collectives()
        gift = Contribution.of(census, self._layout(census, phase), duplicate=self.duplicate)
        for other, joined in self._exchange(gift, collectives, done=done).items():
            self._kept[other] = _after(self._kept.get(other, Census()), joined)
        before = self.exchanges
        self.exchanges = Exchanges(
            ranks=world_size(),
            times=before.times + 1,
            collectives=before.collectives + collectives.number,
            bytes=collectives.bytes,
            seconds=before.seconds + time.perf_counter() - began,
        )
        return self._kept.pop(phase, Census())

    def late(self) -> dict[str, Census]:
        """By phase, what others brought after this rank had joined that phase for the last time; gone once told."""
        late, self._kept = self._kept, {}
        return late

    def _layout(self, census: Census, phase: str) -> ReduceLayout:
        """The layout that was agreed on, with what of this census is not in it."""
        refused = self._refused.get(phase, ())
        own = {name: whole_site(tally) for name, tally in census.items() if name not in refused}
        return self._common(phase).covering(own)

    def _common(self, phase: str) -> ReduceLayout:
        """The layout that was agreed on; one without sites where none was."""
        return self._agreed.get(phase, ReduceLayout(phase, {}))

    def _exchange(self, gift: Contribution, collectives: Collectives, *, done: bool) -> dict[str, Census]:
        """What all ranks brought, by phase; in one collective, if their layout is one that was agreed on."""
        layout, ranks = gift.layout, world_size()
        own = StepWords(gift.first, ranks)
        said = _Head.words(gift, own, done=done)
        ahead = len(said)
        row = np.zeros(ahead + max((agreed.size for agreed in self._agreed.values()), default=0))
        row[:ahead] = said
        if gift.full and self._agreed.get(layout.phase) is layout:
            gift.put(layout, row[ahead:], own)
        collectives.add_up(row)
        head = _Head.read(row[:ahead])
        self.all_done = not head.busy
        if not head.givers:
            return {}
        steps: Steps = PlainSteps()
        if head.base is not None and not head.strays:
            steps = StepWords(head.base, ranks)
        for agreed in self._agreed.values():
            if agreed.mark == head.mark:
                return {agreed.phase: joined_by(agreed, row[ahead:], steps, gift, collectives)}
        if head.mark == layout.mark and head.givers == ranks:  # all have the same new one
            self._agreed[layout.phase] = layout
            return {layout.phase: summed(layout, steps, gift, collectives)}
        return self._negotiated(gift, collectives)

    def _negotiated(self, gift: Contribution, collectives: Collectives) -> dict[str, Census]:
        """The same after all ranks told what was not agreed on: phase by phase, by a layout with the sites of all."""
        phase = gift.layout.phase
        mine = (phase, self._common(phase).lacking(gift.layout.sites), gift.first, gift.last) if gift.full else None
        offers = [offer for offer in collectives.gather(mine) if offer is not None]
        joined, strange = {}, {}
        for phase in sorted({phase for phase, *_ in offers}):
            new, firsts, lasts = zip(*(offer[1:] for offer in offers if offer[0] == phase), strict=True)
            sites, unlike = _united([self._common(phase).covering(each).sites for each in new])
            strange.update(unlike)
            self._refused.setdefault(phase, set()).update(unlike)
            self._agreed[phase] = layout = ReduceLayout(phase, sites)
            words = StepWords(min(firsts), world_size())
            steps = words if words.hold(min(firsts), max(lasts)) else PlainSteps()
            joined[phase] = summed(layout, steps, gift, collectives)
        for name, found in strange.items():
            warnings.warn(
                f"Expected every rank to have as many neurons at site {name}, but got {found}: it is not counted. "
                "Exclude it with `exclude=`, or watch with `join_ranks=False`.",
                NeuronscopeWarning,
                stacklevel=2,
            )
        return joined


def _united(layouts: Sequence[Sites]) -> tuple[Sites, dict[str, list[int]]]:
    """The sites of all, and the widths of those that are not of one: they cannot be one layer, and are nobody's."""
    widths: dict[str, set[int]] = {}
    for layout in layouts:
        for name, (_, neurons) in layout.items():
            widths.setdefault(name, set()).add(neurons)
    unlike = {name: sorted(found) for name, found in widths.items() if len(found) > 1}
    sites = {name: site for layout in reversed(layouts) for name, site in layout.items()}  # the first to know it says
    return {name: sites[name] for name in widths if name not in unlike}, unlike


def _after(kept: Census, joined: Census) -> Census:
    """What was kept, and what came since; a site of another width is no longer the same site."""
    changed = [name for name in kept if name in joined and kept[name].neurons != joined[name].neurons]
    return kept.without(*changed).merge(joined)
