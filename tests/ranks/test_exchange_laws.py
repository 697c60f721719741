"""Whatever ranks bring, in whatever phases and in whatever order: together it is all that they counted, on each rank.

The ranks are threads that meet at a barrier in place of ``torch.distributed``: a collective is only made if all make
the same one, of the same size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import neuronscope.tally.distributed.sync
from neuronscope.count.counters import NEVER
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.distributed.sync import RankSync
from tests.ranks.assertions import assert_equal_counts

WIDTHS = {"a": 1, "b": 3, "c": 2}
INFO = SiteInfo("relu", "relu-like", True, 1, "producer (linear)")
TIME_LIMIT_S = 30


class Event(NamedTuple):
    """What a rank brings to one exchange."""

    phase: str
    sites: str
    steps: int  # since the last event of any phase
    long: bool  # whether the steps have no room in a float64's powers
    seed: int

    def census(self, start: int) -> Census:
        drawn = np.random.default_rng(self.seed)
        span = 2000 if self.long else self.steps
        return Census(
            {name: tally(WIDTHS[name], start, start + span, drawn) for name in self.sites},
            first_step=start if self.steps else -1,
            last_step=start + span if self.steps else -1,
        )


def tally(neurons: int, first: int, last: int, drawn: np.random.Generator) -> Tally:
    """Counts of all sizes up to 2**50; some neurons never fire."""
    arrays = {name: drawn.integers(0, 2**50, neurons) for name in ("zero_outputs", "zero_gradients")}
    steps = np.sort(drawn.integers(first, last, (2, neurons), endpoint=True), axis=0)
    never = drawn.random(neurons) < 0.5
    return Tally(
        info=INFO,
        **arrays,
        not_finite_outputs=drawn.integers(0, 3, neurons),
        abs_sum=drawn.integers(0, 2**40, neurons).astype(np.float64),  # whole: exact in any order
        last_active_step=np.where(never, -1, steps[1]),
        first_active_step=np.where(never, NEVER, steps[0]),
        positions=int(drawn.integers(1, 2**50)),
        gradient_positions=int(drawn.integers(2**50)),
        examples=int(drawn.integers(2**40)),
    )


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

    def collectives(self) -> Any:
        """In place of :class:`neuronscope.tally.distributed.collectives.Collectives`."""
        meeting = self

        class Collectives:
            number = bytes = 0

            def _reduce(self, kind: str, numbers: Any, together: Callable[[Any, Any], Any]) -> None:
                everyone = meeting.all_give((kind, numbers.copy()))
                assert {(name, other.shape) for name, other in everyone} == {(kind, numbers.shape)}
                numbers[:] = reduce(together, (other for _, other in everyone))
                self.number += 1

            def add_up(self, numbers: Any) -> None:
                self._reduce("sum", numbers, np.add)

            def take_largest(self, numbers: Any) -> None:
                self._reduce("largest", numbers, np.maximum)

            def gather(self, mine: Any) -> list[Any]:
                everyone = meeting.all_give(("gather", mine))
                assert {kind for kind, _ in everyone} == {"gather"}
                self.number += 1
                return [other for _, other in everyone]

        return Collectives


class Given(NamedTuple):
    """What one rank was given, by phase, and the collectives that it took part in."""

    joined: dict[str, list[Census]]
    collectives: int


def run_rank(events: list[Event], given: dict[int, Given], brought: list[tuple[str, Census]]) -> None:
    """As a scope does it: an exchange for each event, then answering until all are done."""
    ranks, joined = RankSync(), dict[str, list[Census]]()
    step = 10**6
    for event in events:
        census = event.census(step)
        brought.append((event.phase, census))
        joined.setdefault(event.phase, []).append(ranks.join(census, phase=event.phase))
        step = max(step, census.last_step + 1)
    while True:
        joined.setdefault("train", []).append(ranks.join(Census(), phase="train", done=True))
        if ranks.all_done:
            break
    for phase, census in ranks.late().items():
        joined.setdefault(phase, []).append(census)
    given[int(threading.current_thread().name)] = Given(joined, ranks.exchanges.collectives)


def together(runs: list[list[Event]]) -> tuple[list[Given], list[tuple[str, Census]]]:
    """What each rank was given, and all that was brought."""
    given_: dict[int, Given] = {}
    brought: list[tuple[str, Census]] = []
    meeting = Meeting(len(runs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuronscope.tally.distributed.sync, "Collectives", meeting.collectives())
        patch.setattr(neuronscope.tally.distributed.sync, "world_size", lambda: len(runs))
        threads = [
            threading.Thread(target=run_rank, args=(events, given_, brought), name=str(rank), daemon=True)
            for rank, events in enumerate(runs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIME_LIMIT_S)
            assert not thread.is_alive()
    return [given_[rank] for rank in range(len(runs))], brought


def counts(censuses: list[Census]) -> dict[str, Any]:
    """Of the sites of which anything was counted, and the steps of all."""
    whole = reduce(Census.merge, censuses, Census())
    fields = [name for name in Tally.__dataclass_fields__ if name != "info"]
    seen = {name: {field: getattr(each, field) for field in fields} for name, each in whole.items() if each.positions}
    return {**seen, "steps": {"first": whole.first_step, "last": whole.last_step}}


EVENTS = st.builds(
    Event,
    phase=st.sampled_from(["train", "val"]),
    sites=st.sampled_from(["", "a", "ab", "ba", "abc"]),
    steps=st.integers(0, 100),
    long=st.booleans(),
    seed=st.integers(0, 2**32),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(EVENTS, max_size=4), min_size=2, max_size=4))
def test_each_rank_gets_all_that_was_brought(runs: list[list[Event]]) -> None:
    everyone, brought = together(runs)
    for joined, _ in everyone:
        for phase in ("train", "val"):
            wanted = counts([census for place, census in brought if place == phase])
            assert_equal_counts(counts(joined.get(phase, [])), wanted)


@given(EVENTS, st.integers(2, 4))
def test_ranks_that_do_alike_make_one_collective_after_the_first(event: Event, number: int) -> None:
    everyone, _ = together([[event._replace(sites="abc", long=False, steps=100)] * 3] * number)
    # Two for the first event, one for each of the others, and one that says that all are done.
    assert [collectives for _, collectives in everyone] == [2 + 1 + 1 + 1] * number
