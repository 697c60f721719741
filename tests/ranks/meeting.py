"""Ranks as threads that meet at a barrier, in place of processes and ``torch.distributed``.

A collective is only made if all ranks make the same one, of the same dtype and size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pytest

import neuronscope.tally.distributed.sync

TIME_LIMIT_S = 30


class AllThere:
    """In place of :class:`neuronscope.tally.distributed.meetings.Meetings`: every rank is always ready."""

    missed = 0

    def wait(self) -> bool:
        return True

    def enter(self) -> None:
        """Nobody asks who is inside."""


class Meeting:
    """Where the threads of a run put what each gives to a collective."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=TIME_LIMIT_S)
        self._given: list[Any] = [None] * ranks

    def all_give(self, mine: Any) -> list[Any]:
        self._given[int(threading.current_thread().name)] = mine
        self._barrier.wait()
        everyone = list(self._given)
        self._barrier.wait()
        return everyone

    def group(self) -> Any:
        """In place of a process group."""
        barrier = self._barrier

        class Group:
            def size(self) -> int:
                return barrier.parties

            def rank(self) -> int:
                return int(threading.current_thread().name)

        return Group()

    def collectives(self) -> Any:
        """In place of :class:`neuronscope.tally.distributed.collectives.Collectives`."""
        meeting = self

        class Collectives:
            number = bytes = 0

            def __init__(self, group: Any) -> None:
                assert group is None  # the option was not given

            def _reduce(self, kind: str, numbers: Any, together: Callable[[Any, Any], Any]) -> None:
                everyone = meeting.all_give((kind, numbers.copy()))
                alike = {(name, other.dtype, other.shape) for name, other in everyone}
                assert alike == {(kind, numbers.dtype, numbers.shape)}
                numbers[:] = reduce(together, (other for _, other in everyone))
                self.number += 1

            def sum(self, numbers: Any) -> None:
                self._reduce("sum", numbers, np.add)

            def max(self, numbers: Any) -> None:
                self._reduce("max", numbers, np.maximum)

            def gather(self, item: Any) -> list[Any]:
                everyone = meeting.all_give(("gather", item))
                assert {kind for kind, _ in everyone} == {"gather"}
                self.number += 2
                return [other for _, other in everyone]

        return Collectives


def on_each_rank(ranks: int, work: Callable[[int], Any]) -> list[Any]:
    """What each rank's work gives; the work of all of them runs at once."""
    given: dict[int, Any] = {}

    def run(rank: int) -> None:
        given[rank] = work(rank)

    with pytest.MonkeyPatch.context() as patch:
        meeting = Meeting(ranks)
        group = meeting.group()
        patch.setattr(neuronscope.tally.distributed.sync, "Collectives", meeting.collectives())
        patch.setattr(neuronscope.tally.distributed.sync, "base_group", lambda given: group)
        patch.setattr(neuronscope.tally.distributed.sync, "meetings_of", lambda group: AllThere())
        threads = [threading.Thread(target=run, args=(rank,), name=str(rank), daemon=True) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIME_LIMIT_S)
            assert not thread.is_alive()
    return [given[rank] for rank in range(ranks)]
