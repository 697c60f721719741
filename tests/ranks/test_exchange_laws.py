"""Whatever ranks bring, in whatever phases and in whatever order: together it is all that they counted, on each rank.

The ranks are threads: see :mod:`tests.ranks.meeting`.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuronscope.count.counter_tensors import NEVER
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.distributed.sync import RankSync
from tests.ranks.assertions import assert_equal_counts
from tests.ranks.meeting import on_each_rank

WIDTHS = {"a": 1, "b": 3, "c": 2}
INFO = SiteInfo(activation="relu", kind="relu-like", linear_when_on=True, axis=1, axis_source="layer (fc)")


class Event(NamedTuple):
    """What a rank brings to one exchange."""

    phase: str
    sites: str
    steps: int  # since the last event of any phase
    seed: int

    def census(self, start: int) -> Census:
        drawn = np.random.default_rng(self.seed)
        return Census(
            {name: tally(WIDTHS[name], start, start + self.steps, drawn) for name in self.sites},
            first_step=start if self.steps else -1,
            last_step=start + self.steps if self.steps else -1,
        )


def tally(neurons: int, first: int, last: int, drawn: np.random.Generator) -> Tally:
    """Counts of all sizes up to 2**58, most of which no float64 holds; some neurons never fire."""
    arrays = {name: drawn.integers(0, 2**58, neurons) for name in ("zero_outputs", "zero_gradients")}
    steps = np.sort(drawn.integers(first, last, (2, neurons), endpoint=True), axis=0)
    never = drawn.random(neurons) < 0.5
    return Tally(
        **vars(INFO),
        **arrays,
        not_finite_outputs=drawn.integers(0, 3, neurons),
        abs_sum=drawn.integers(0, 2**40, neurons).astype(np.float64),  # whole: exact in any order
        last_active_step=np.where(never, -1, steps[1]),
        first_active_step=np.where(never, NEVER, steps[0]),
        positions=int(drawn.integers(1, 2**58)),
        gradient_positions=int(drawn.integers(2**58)),
        examples=int(drawn.integers(2**40)),
    )


class Given(NamedTuple):
    """What one rank was given, by phase, and the collectives that it took part in."""

    joined: dict[str, list[Census]]
    collectives: int


def run_rank(events: list[Event], brought: list[tuple[str, Census]]) -> Given:
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
    for phase, census in ranks.pop_late().items():
        joined.setdefault(phase, []).append(census)
    return Given(joined, ranks.exchanges.collectives)


def together(runs: list[list[Event]]) -> tuple[list[Given], list[tuple[str, Census]]]:
    """What each rank was given, and all that was brought."""
    brought: list[tuple[str, Census]] = []
    return on_each_rank(len(runs), lambda rank: run_rank(runs[rank], brought)), brought


def counts(censuses: list[Census]) -> dict[str, Any]:
    """Of the sites of which anything was counted, and the steps of all."""
    whole = reduce(Census.merge, censuses, Census())
    fields = Tally.__dataclass_fields__.keys() - SiteInfo.__dataclass_fields__.keys()
    seen = {name: {field: getattr(each, field) for field in fields} for name, each in whole.items() if each.positions}
    return {**seen, "steps": {"first": whole.first_step, "last": whole.last_step}}


EVENTS = st.builds(
    Event,
    phase=st.sampled_from(["train", "val"]),
    sites=st.sampled_from(["", "a", "ab", "ba", "abc"]),
    steps=st.one_of(st.integers(0, 100), st.just(2000)),
    seed=st.integers(0, 2**32),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(EVENTS, max_size=4), min_size=2, max_size=4))
def test_each_rank_receives_the_counts_of_all_ranks(runs: list[list[Event]]) -> None:
    everyone, brought = together(runs)
    for joined, _ in everyone:
        for phase in ("train", "val"):
            wanted = counts([census for place, census in brought if place == phase])
            assert_equal_counts(counts(joined.get(phase, [])), wanted)


@given(EVENTS, st.integers(2, 4))
def test_ranks_with_the_same_sites_gather_names_once(event: Event, number: int) -> None:
    everyone, _ = together([[event._replace(sites="abc", steps=100)] * 3] * number)
    # Each event takes a header, a maximum and two sums; the first one two more for the names and widths. At last one
    # header says that all are done.
    assert [collectives for _, collectives in everyone] == [2 + 3 * 4 + 1] * number
