"""Join the counts of all ranks of a distributed run that hold copies of one network, exactly.

Every rank must call this equally often: see :meth:`neuronscope.scope.Scope.step`. Ranks have agreed on a layout of each
phase, which says where the counts of every site lie in the arrays that are reduced. A header of six numbers tells
whether all ranks bring counts of one such layout. If not, the ranks tell each other the sites that are new first; and
the first time, which network they hold. What ranks of another network count has layouts of its own.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from neuronscope.count.counter_tensors import NEVER
from neuronscope.errors import warn_user
from neuronscope.options import ProcessGroup
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census
from neuronscope.tally.distributed.collectives import Collectives, base_group, world_size
from neuronscope.tally.distributed.meetings import meetings_of
from neuronscope.tally.distributed.reduce_layout import ReduceLayout, Sites, whole_site

__all__ = ["Exchanges", "RankSync", "world_size"]

#: A phase of the ranks that hold one network: the number of that network, and the phase's name.
Part = tuple[int, str]
#: Identifies a network: a number for its layers, and numbers for its weights at times when the ranks may have had the
#: same ones. See :class:`neuronscope.attach.copies.NetworkDigest`.
Network = tuple[int, frozenset[int]]

_MAX_LENGTH = 300


class Exchanges(NamedTuple):
    """What joining has cost this rank so far."""

    ranks: int
    times: int  # how often counts were joined
    #: How many collectives that took: four each, two more where ranks told each other of new sites, and three more for
    #: each further phase. An exchange to which no rank brings anything takes one.
    collectives: int
    bytes: int  # bytes that this rank gave to the last exchange
    seconds: float  # seconds that all of them took, waiting for the slowest rank included


class Contribution(NamedTuple):
    """What one rank brings to an exchange."""

    census: Census  # what it counted
    phase: str  # in which phase
    active: bool  # false if it brings no counts; then it does not influence the layout


class RankSync:
    """The exchanges of this rank with the others; one instance a scope.

    Ranks may have more batches than others, or none, and be in different phases: no count is lost. A rank that is done
    goes on answering until all are.

    Args:
        together: Whether counts are joined at all.
        process_group: The option of :func:`neuronscope.watch`.
        digest: A function that returns which network this rank holds; by default that of all others.
    """

    def __init__(
        self,
        *,
        together: bool = True,
        process_group: ProcessGroup = None,
        digest: Callable[[], Network] = lambda: (0, frozenset()),
    ) -> None:
        self._together = together
        self._process_group = process_group
        self._digest = digest
        self._group: Callable[[], dist.ProcessGroup | None] = lambda: None  # weak: the trainer ends its group
        self._rank = 0
        # These change only in exchanges, by what all ranks learn there, so they are the same on all ranks.
        self._networks: list[int] = []  # by rank, the number of the network that it holds; empty = not known yet
        self._agreed: dict[Part, ReduceLayout] = {}
        self._refused: dict[Part, set[str]] = {}  # sites whose ranks differ in their numbers of neurons
        self._kept: dict[str, Census] = {}  # by phase, what others brought while this rank was in another phase
        self._error = ""
        self.duplicate = False  # another rank has the same data, and counts for both what is not split
        self.all_done = True  # whether every rank was done in the last exchange
        self.more = False  # whether any rank asked for another exchange right after the last one
        self.acting = False  # whether this rank calls `agree` after an exchange that closes a window
        self.all_acting = False  # whether all ranks do after the last exchange
        self.exchanges = Exchanges(1, 0, 0, 0, 0.0)

    @property
    def alone(self) -> bool:
        """True if no other rank counts along."""
        return not self._together or self._size() == 1

    @property
    def missed(self) -> int:
        """How often in a row ranks that train did not come together; see :meth:`ready`."""
        group = self._group()
        return 0 if group is None else meetings_of(group).missed

    @property
    def note(self) -> str:
        """What a report must say of the ranks that are not in its counts; empty if there are none."""
        others = len(self._networks) - self._copies
        if self._error:
            return f"The counts of the other ranks could not be joined, so later ones are missing: {self._error}"
        if not others:
            return ""
        held = "this rank" if self._copies == 1 else f"the {self._copies} ranks that hold this network"
        rest = "the other rank holds" if others == 1 else f"the other {others} ranks hold"
        return f"These are the counts of {held}: {rest} no copy of it (other layers, or other weights at the start)."

    def ready(self) -> bool:
        """Return whether all ranks are ready to join their counts, after waiting a short while; the same on all ranks.

        For ranks that train. :meth:`join` waits for the others as long as the process group does.
        """
        group = None if self.alone else self._group()
        if group is None:
            return True
        try:
            return meetings_of(group).wait()
        except Exception as error:  # noqa: BLE001  # the training goes on
            self._give_up(error)
            return True

    def _size(self) -> int:
        base = base_group(self._process_group)
        if base is None:
            return 1
        if base is not self._group():  # the run may have ended its group and made another one
            self._group, self._rank = weakref.ref(base), base.rank()
            self._networks, self._agreed, self._refused = [], {}, {}
        return base.size()

    @property
    def _own(self) -> int:
        """The number of the network that this rank holds."""
        return self._networks[self._rank] if self._networks else 0

    @property
    def _copies(self) -> int:
        """The number of ranks that hold the same network as this one; 0 if that is not known yet."""
        return self._networks.count(self._own)

    def _give_up(self, error: Exception) -> None:
        """Count for this rank alone from now on: another rank is gone, or does not answer."""
        self._together, self.all_done, self.more = False, True, False
        self._error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MAX_LENGTH]
        warn_user(
            "Neuronscope could not join the counts of the ranks; from now on each counts for itself, and training goes "
            f"on. {self._error}"
        )

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
        try:
            collectives = self._enter()
            counted = any(tally.positions or tally.gradient_positions for tally in census.values())
            active = (census.last_step >= 0 or counted) and self._copies != 1
            contribution = Contribution(census, phase, active)
            joined_by_phase = self._exchange(contribution, collectives, done=done, more=more)
            if self._copies == 1:
                joined_by_phase = {phase: census}
        except Exception as error:  # noqa: BLE001  # a rank is gone, or did not come in time
            self._give_up(error)
            return self._kept.pop(phase, Census()).merge(census)
        for other, joined in joined_by_phase.items():
            self._kept[other] = _after(self._kept.get(other, Census()), joined)
        before = self.exchanges
        self.exchanges = Exchanges(
            ranks=self._copies or self._size(),
            times=before.times + 1,
            collectives=before.collectives + collectives.number,
            bytes=collectives.bytes,
            seconds=before.seconds + time.perf_counter() - began,
        )
        return self._kept.pop(phase, Census())

    def agree(self, number: int) -> bool:
        """Return whether all ranks bring the same number, from 0 to 2**31.

        If :attr:`acting` is set, every rank must call this, once. They do not agree if some rank does not act: it is
        done, in another phase, or its counts are not joined. No rank waits for it then.
        """
        if self.alone:
            return world_size() == 1
        if not self.all_acting:
            return False
        self.all_acting = False
        try:
            largest_and_smallest = np.array([number, -number], dtype=np.int64)
            self._enter().max(largest_and_smallest)
        except Exception as error:  # noqa: BLE001  # a rank is gone, or did not come in time
            self._give_up(error)
            return False
        return bool(largest_and_smallest[0] == -largest_and_smallest[1])

    def pop_late(self) -> dict[str, Census]:
        """Return and forget, by phase, what others brought after this rank had joined that phase for the last time."""
        late, self._kept = self._kept, {}
        return late

    def _enter(self) -> Collectives:
        """Return the collectives of the next exchange, which this rank does not leave before all ranks have come."""
        group = self._group()
        if group is not None:
            meetings_of(group).enter()
        return Collectives(None if self._process_group is None else group)

    def _layout(self, part: Part) -> ReduceLayout:
        """Return the layout that was agreed on; one without sites where none was."""
        return self._agreed.get(part, ReduceLayout(part, {}))

    def _exchange(self, own: Contribution, collectives: Collectives, *, done: bool, more: bool) -> dict[str, Census]:
        """Return what all ranks brought that hold the same network, by phase."""
        sites = {name: whole_site(tally) for name, tally in own.census.items()}
        signature = self._covering((self._own, own.phase), sites).signature if own.active else None
        largest_and_smallest = (-NEVER, -NEVER) if signature is None else (signature, -signature)
        header = np.array([not done, own.active, *largest_and_smallest, more, not self.acting], dtype=np.int64)
        collectives.max(header)
        busy, active, largest, negated_smallest, asked, other_acts = header.tolist()
        self.all_done, self.more, self.all_acting = not busy, bool(asked), not other_acts
        if not active:
            return {}
        refused: dict[str, list[int]] = {}
        layouts = [each for each in self._agreed.values() if each.signature == largest == -negated_smallest]
        if not layouts:
            layouts, refused = self._agree(own, sites, collectives)
        joined = {}
        for layout in layouts:
            network, phase = layout.part
            brought = own.census if own.active and layout.part == (self._own, own.phase) else Census()
            census = layout.reduce(brought, collectives, duplicate=self.duplicate)
            if network == self._own:
                joined[phase] = census
        for name, widths in refused.items():
            warn_user(
                f"Expected every rank to have as many neurons at site {name}, but got {widths}: it is not counted. "
                "Exclude it with `exclude=`, or watch with `join_ranks=False`."
            )
        return joined

    def _covering(self, part: Part, sites: Sites) -> ReduceLayout:
        """Return the layout that was agreed on, with this rank's sites that it lacks, but for those refused."""
        refused = self._refused.get(part, ())
        return self._layout(part).covering({name: site for name, site in sites.items() if name not in refused})

    def _agree(
        self, own: Contribution, sites: Sites, collectives: Collectives
    ) -> tuple[list[ReduceLayout], dict[str, list[int]]]:
        """Return a layout of each part that any rank is in, and the sites that are newly refused, with their widths.

        Each rank tells the names and widths of the sites that were not agreed on yet; the first time, its network too.
        """
        if not self._networks:
            given = collectives.gather((tuple(self._digest()), (own.phase, sites) if own.active else None))
            self._networks = _numbered([network for network, _ in given])
            offers = [offer for _, offer in given]
        else:
            part = (self._own, own.phase)
            new = self._layout(part).lacking(self._covering(part, sites).sites)
            offers = collectives.gather((own.phase, new) if own.active else None)
        found: dict[Part, list[Sites]] = {}
        for network, offer in zip(self._networks, offers, strict=True):
            if offer is not None:
                found.setdefault((network, offer[0]), []).append(offer[1])
        layouts, all_refused = [], {}
        for part in sorted(found):
            common = self._layout(part)
            sites, refused = _united([common.covering(sites).sites for sites in found[part]])
            self._agreed[part] = ReduceLayout(part, sites)
            self._refused.setdefault(part, set()).update(refused)
            if self._networks.count(part[0]) > 1:
                layouts.append(self._agreed[part])
            if part[0] == self._own:
                all_refused.update(refused)
        return layouts, all_refused


def _numbered(networks: Sequence[Network]) -> list[int]:
    """Return by rank the number of its network: the first rank that holds it.

    Two ranks hold one network if it has the same layers and once had the same weights. If the weights of a rank are not
    known, it holds the first network of its layers.
    """
    numbers = [*range(len(networks))]
    for rank, (layers, weights) in enumerate(networks):
        for other, (other_layers, other_weights) in enumerate(networks[:rank]):
            if numbers[other] != numbers[rank] and layers == other_layers and weights & other_weights:
                both = {numbers[other], numbers[rank]}
                numbers = [min(both) if number in both else number for number in numbers]
    for rank, (layers, weights) in enumerate(networks):
        if not weights:
            known = [other for other, network in enumerate(networks) if network[0] == layers]
            numbers[rank] = numbers[next((other for other in known if networks[other][1]), known[0])]
    return numbers


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
