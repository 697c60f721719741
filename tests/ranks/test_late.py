"""No rank waits long, and no count is lost, where ranks are not ready at the end of the same window."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from neuronscope.tally.distributed.meetings import Meetings
from tests.ranks.assertions import assert_equal_counts
from tests.ranks.late import LATE, STEPS, WINDOW
from tests.ranks.recorded import union
from tests.ranks.spawning import together
from tests.ranks.uneven import BATCH


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each task gives on each of two ranks."""
    return together(tmp_path_factory.mktemp("late"), 2, *(task.__name__ for task in LATE))


@pytest.mark.parametrize("task", [task.__name__ for task in LATE])
def test_ranks_that_are_not_ready_together_lose_no_count_and_none_hangs(given: list[dict[str, Any]], task: str) -> None:
    found = [rank[task] for rank in given]
    wanted = {name: union([rank["recorded"][name] for rank in found]) for name in found[0]["recorded"]}
    assert {counts["examples"] for counts in wanted.values()} == {STEPS * BATCH}
    for rank in found:
        assert rank["same_weights"]
        assert_equal_counts(rank["counted"], wanted)


def test_a_window_at_which_one_rank_is_slow_becomes_longer_on_all(given: list[dict[str, Any]]) -> None:
    found = [rank["slow_at_a_window"] for rank in given]
    # Windows of two steps close at 2, then at 4, where one rank is late; the next try is after twice as many.
    steps = [2, 8, 10, 12, STEPS]
    assert steps[1] - 2 * WINDOW == 2 * WINDOW
    for rank in found:
        assert [step + 1 for step in rank["windows"]["0/relu"]["steps"]] == steps


class Exchange:
    """The exchanges of ranks that are threads: each ends when all ranks are inside."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._changed = threading.Condition()
        self._done: dict[int, list[bool]] = {}  # by number of the exchange, whether each rank is done

    def enter(self, number: int, *, done: bool) -> bool:
        """Return whether all ranks are done."""
        with self._changed:
            inside = self._done.setdefault(number, [])
            inside.append(done)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: len(inside) == self._ranks, timeout=20)
            return all(inside)


@settings(max_examples=40)
@drawn(st.lists(st.lists(st.booleans(), max_size=5), min_size=2, max_size=3))
def test_a_rank_that_is_told_that_all_are_ready_waits_for_none_in_vain(plans: list[list[bool]]) -> None:
    """Ranks ask in training whether all are ready, or enter and stay; at last each answers until all are done."""
    store, exchange = dist.HashStore(), Exchange(len(plans))

    def run(enters: list[bool]) -> list[bool]:
        meetings, number, met = Meetings(store, len(plans), limit_s=0.05), 0, []
        for entering in enters:
            if not entering:
                met.append(meetings.wait())
            if entering or met[-1]:
                meetings.enter()
                exchange.enter(number, done=False)
                number += 1
        while True:
            meetings.enter()
            if exchange.enter(number, done=True):
                return met
            number += 1

    with ThreadPoolExecutor(len(plans)) as threads:
        for enters, met in zip(plans, threads.map(run, plans), strict=True):
            assert len(met) == enters.count(False)
            if all(plan == plans[0] for plan in plans):
                assert all(met)


def test_where_a_rank_never_comes_the_others_wait_a_tenth_of_the_time_limit_and_less_and_less_often() -> None:
    meetings = Meetings(dist.HashStore(), 2, limit_s=0.01)
    assert [meetings.wait() for _ in range(3)] == [False] * 3
    assert meetings.missed == 3
