"""Join the counts of all ranks of a distributed run, exactly.

Every rank must call this equally often: see :meth:`neuronscope.scope.Scope.step`. Ranks have agreed on a layout of each
phase, which says where the counts of every site lie in the arrays that are reduced. A header of five numbers tells
whether all ranks bring counts of one such layout. If not, the ranks tell each other the sites that are new first.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from neuronscope.count.counters import NEVER
from neuronscope.errors import NeuronscopeWarning
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census
from neuronscope.tally.distributed.collectives import Collectives, world_size
from neuronscope.tally.distributed.reduce_layout import ReduceLayout, Sites, whole_site

__all__ = ["Exchanges", "RankSync", "world_size"]


class Exchanges(NamedTuple):
    """What joining has cost this rank so far.

    Attributes:
        ranks: Number of ranks.
        times: How often counts were joined.
        collectives: How many collectives that took: four each, two more where ranks told each other of new sites, and
            three more for each further phase. An exchange to which no rank brings anything takes one.
        bytes: Bytes that this rank gave to the last exchange.
        seconds: Seconds that all of them took, waiting for the slowest rank included.
    """

    ranks: int
    times: int
    collectives: int
    bytes: int
    seconds: float


class Contribution(NamedTuple):
    """What one rank brings to an exchange.

    Attributes:
        census: What it counted.
        layout: The layout that was agreed on for its phase, with the sites of the census that are not in it.
        active: False if it brings no counts; then it does not influence the layout.
    """

    census: Census
    layout: ReduceLayout
    active: bool


class RankSync:
    """The exchanges of this rank with the others; one instance a scope.

    Ranks may have more batches than others, or none, and be in different phases: no count is lost. A rank that is done
    goes on answering until all are.

    Args:
        together: Whether counts are joined at all.
    """

    def __init__(self, *, together: bool = True) -> None:
        self._together = together
        # By phase. These change only in exchanges, by what all ranks learn there, so they are the same on all ranks.
        self._agreed: dict[str, ReduceLayout] = {}
        self._refused: dict[str, set[str]] = {}  # sites whose ranks differ in their numbers of neurons
        self._kept: dict[str, Census] = {}  # by phase, what others brought while this rank was in another phase
        self.duplicate = False  # another rank has the same data, and counts for both what is not split
        self.all_done = True  # whether every rank was done in the last exchange
        self.more = False  # whether any rank asked for another exchange right after the last one
        self.exchanges = Exchanges(1, 0, 0, 0, 0.0)

    @property
    def alone(self) -> bool:
        """True if no other rank counts along."""
        return not self._together or world_size() == 1

    def join(self, census: Census, *, phase: str, done: bool = False, more: bool = False) -> Census:
        """Return what all ranks counted since they last joined. Every rank must call this equally often, or be done.

        Args:
            census: What this rank counted, and in which steps.
            phase: The phase of this rank.
            done: This rank will not call again, unless :attr:`all_done` stays false: then it must.
            more: This rank has counts of another phase that belong to the same steps. Every rank must then call again
                for that phase; each learns it from :attr:`more`.

        Returns:
            The same counts on every rank in that phase; the steps are from the first of any rank to the last.
        """
        if self.alone:
            self.all_done, self.more = True, more
            return census
        began = time.perf_counter()
        collectives = Collectives()
        contribution = self._contribution(census, phase)
        for other, joined in self._exchange(contribution, collectives, done=done, more=more).items():
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

    def pop_late(self) -> dict[str, Census]:
        """Return and forget, by phase, what others brought after this rank had joined that phase for the last time."""
        late, self._kept = self._kept, {}
        return late

    def _contribution(self, census: Census, phase: str) -> Contribution:
        refused = self._refused.get(phase, ())
        sites = {name: whole_site(tally) for name, tally in census.items() if name not in refused}
        counted = any(tally.positions or tally.gradient_positions for tally in census.values())
        return Contribution(census, self._layout(phase).covering(sites), active=census.last_step >= 0 or counted)

    def _layout(self, phase: str) -> ReduceLayout:
        """Return the layout that was agreed on; one without sites where none was."""
        return self._agreed.get(phase, ReduceLayout(phase, {}))

    def _exchange(self, own: Contribution, collectives: Collectives, *, done: bool, more: bool) -> dict[str, Census]:
        """Return what all ranks brought, by phase."""
        signature = own.layout.signature if own.active else None
        largest_and_smallest = (-NEVER, -NEVER) if signature is None else (signature, -signature)
        header = np.array([not done, own.active, *largest_and_smallest, more], dtype=np.int64)
        collectives.max(header)
        busy, active, largest, negated_smallest, asked = header.tolist()
        self.all_done, self.more = not busy, bool(asked)
        if not active:
            return {}
        refused: dict[str, list[int]] = {}
        layouts = [each for each in self._agreed.values() if each.signature == largest == -negated_smallest]
        if not layouts:
            layouts, refused = self._agree(own, collectives)
        joined = {}
        for layout in layouts:
            brought = own.census if own.active and own.layout.phase == layout.phase else Census()
            joined[layout.phase] = layout.reduce(brought, collectives, duplicate=self.duplicate)
        for name, widths in refused.items():
            warnings.warn(
                f"Expected every rank to have as many neurons at site {name}, but got {widths}: it is not counted. "
                "Exclude it with `exclude=`, or watch with `join_ranks=False`.",
                NeuronscopeWarning,
                stacklevel=2,
            )
        return joined

    def _agree(self, own: Contribution, collectives: Collectives) -> tuple[list[ReduceLayout], dict[str, list[int]]]:
        """Return a layout of each phase that any rank is in, and the sites that are newly refused, with their widths.

        Each rank tells the names and widths of the sites that were not agreed on yet.
        """
        phase = own.layout.phase
        new = (phase, self._layout(phase).lacking(own.layout.sites)) if own.active else None
        offers = [offer for offer in collectives.gather(new) if offer is not None]
        layouts, all_refused = [], {}
        for phase in sorted({phase for phase, _ in offers}):
            common = self._layout(phase)
            sites, refused = _united([common.covering(sites).sites for other, sites in offers if other == phase])
            self._agreed[phase] = ReduceLayout(phase, sites)
            self._refused.setdefault(phase, set()).update(refused)
            layouts.append(self._agreed[phase])
            all_refused.update(refused)
        return layouts, all_refused


def _united(offers: Sequence[Sites]) -> tuple[Sites, dict[str, list[int]]]:
    """Return the sites of all ranks, and the widths of those that differ between ranks: these are not one layer."""
    sites: dict[str, tuple[SiteInfo, int]] = {}
    widths: dict[str, set[int]] = {}
    for offer in offers:
        for name, site in offer.items():
            sites.setdefault(name, site)
            widths.setdefault(name, set()).add(site[1])
    refused = {name: sorted(found) for name, found in widths.items() if len(found) > 1}
    return {name: site for name, site in sites.items() if name not in refused}, refused


def _after(kept: Census, joined: Census) -> Census:
    """Return what was kept and what came since; a site of another width is no longer the same site."""
    changed = [name for name in kept if name in joined and kept[name].neurons != joined[name].neurons]
    return kept.without(*changed).merge(joined)
