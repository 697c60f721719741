"""Let the ranks meet for an exchange without a rank that trains ever waiting for long.

A rank may come late to an exchange, or never: it skips steps, has run out of data (in torch's ``Join`` it then answers
nothing but the trainer's own collectives), or waits for this one in a collective of the trainer. So a rank that trains
enters an exchange only once all ranks are there. They tell each other in the store of the process group, which answers
at once. A rank that has nothing else to do (its run is over, or its user said that all ranks are there) waits inside.
"""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist

from neuronscope.tally.distributed.collectives import time_limit

__all__ = ["Meetings", "meetings_of"]

_SHORTEST_WAIT_S = 1.0
_LONGEST_PAUSE_S = 0.02
_DEFAULT_LIMIT = timedelta(minutes=30)

_meetings: WeakKeyDictionary[dist.ProcessGroup, Meetings] = WeakKeyDictionary()
_names: Counter[str] = Counter()


def meetings_of(group: dist.ProcessGroup) -> Meetings:
    """Return the meetings of the ranks of a process group."""
    if group not in _meetings:
        name = group.group_name
        _names[name] += 1  # a run may end its process group and make another one with the same store
        store: dist.distributed_c10d.Store | None = dist.distributed_c10d._get_default_store()
        if store is not None:
            store = dist.distributed_c10d.PrefixStore(f"neuronscope/{name}/{_names[name]}", store)
        limit = time_limit(group) or _DEFAULT_LIMIT
        _meetings[group] = Meetings(store, group.size(), limit.total_seconds())
    return _meetings[group]


class Meetings:
    """Count the exchanges of the ranks of one process group, and wait for the next one.

    Args:
        store: Where the ranks tell each other that they are there; ``None`` if the backend has no store, as MPI.
        ranks: Number of ranks.
        limit_s: How many seconds the process group waits for a rank.

    Attributes:
        missed: How often in a row not all ranks came; the same on every rank that was asked as often.
    """

    def __init__(self, store: dist.distributed_c10d.Store | None, ranks: int, limit_s: float) -> None:
        self._store = store
        self._ranks = ranks
        self._limit_s = limit_s
        self._began = time.monotonic()
        self._number = 0  # exchanges that this rank has entered
        self.missed = 0

    def wait(self) -> bool:
        """Return whether all ranks are at the next exchange now, after waiting a short while for those that are not.

        The answer is the same on all ranks. The wait is a hundredth of the time since the first one, but at least a
        second, and at most a tenth of what the process group waits for a rank.
        """
        if self._store is None:
            return True
        place = f"{self._number}/{self.missed}"
        here = self._store.add(f"{place}/here", 1)
        now = time.monotonic()
        end = now + min(max(_SHORTEST_WAIT_S, (now - self._began) / 100), self._limit_s / 10)
        answer, pause = b"", 0.0005
        while not answer:
            if self._store.check([place]):
                answer = self._store.get(place)
            elif here + self._store.add(f"{self._number}/inside", 0) >= self._ranks:
                answer = self._store.compare_set(place, "", "met")
            elif time.monotonic() > end:
                answer = self._store.compare_set(place, "", "missed")
            else:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                here = self._store.add(f"{place}/here", 0)
        met = answer == b"met"
        self.missed = 0 if met else self.missed + 1
        return met

    def enter(self) -> None:
        """Note that this rank enters the next exchange, and stays until all ranks have."""
        if self._store is not None:
            self._store.add(f"{self._number}/inside", 1)
        self._number += 1
        self.missed = 0
