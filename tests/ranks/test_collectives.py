"""How many collectives watching takes, and of what size: none in a step, one a window; and no count is lost by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import neuronscope as ns
from tests.ranks.assertions import assert_equal_counts
from tests.ranks.exchanges import EXCHANGES, Noted
from tests.ranks.recorded import union
from tests.ranks.uneven import WIDTH

Runs = dict[int, list[dict[str, Any]]]

# Ahead of the counts: 3 numbers, and 8 words each for the layout and the base. A site of N neurons gives 4 sums and 2
# steps of N each and 3 numbers; the steps of all are 2. Site a has 7 neurons and b 9: 6 x 16 + 2 x 3 + 2.
AHEAD, ONE, BOTH = 19, 6 * 7 + 3 + 2, 6 * 16 + 2 * 3 + 2
STEPS_APART = 2 * 16 + 2

Made = list[tuple[str, int]]


def sums(*sizes: int) -> Made:
    return [("allreduce_", size) for size in sizes]


def kinds(made: Made) -> list[str]:
    return [kind for kind, _ in made]


NEGOTIATED = ["allreduce_", "allgather_", "allgather_", "allreduce_"]


@pytest.mark.parametrize("task", [task.__name__ for task in EXCHANGES])
def test_no_step_makes_any_and_no_count_is_lost(runs: Runs, task: str) -> None:
    given = [rank[task] for rank in runs[2]]
    for rank in given:
        assert rank["made"]["step"]
        assert not any(rank["made"]["step"])
        for phase, counts in rank["counted"].items():
            wanted: dict[str, Any] = {}
            for other in [rank] if task == "apart" else given:
                for name, part in other["recorded"][phase].items():
                    wanted[name] = union([wanted[name], part]) if name in wanted else part
            assert_equal_counts(counts, wanted)


@pytest.mark.parametrize("task", [task.__name__ for task in EXCHANGES])
def test_the_report_counts_them(runs: Runs, task: str) -> None:
    for rank in runs[2]:
        made = [made for event in rank[task]["made"].values() for made in event]
        assert rank[task]["exchanges"].collectives == sum(map(len, made))


def test_one_a_window(runs: Runs) -> None:
    """The first time nobody knows the sites yet, and all say that theirs are the same."""
    for rank in runs[2]:
        made = rank["steady"]["made"]
        assert made["window"] == [sums(AHEAD, BOTH), sums(AHEAD + BOTH), sums(AHEAD + BOTH)]
        assert made["val"] == [sums(AHEAD + BOTH, BOTH), sums(AHEAD + BOTH), sums(AHEAD + BOTH)]
        assert made["detach"] == [sums(AHEAD + BOTH)]
        assert rank["steady"]["exchanges"].times == 7
        assert rank["steady"]["exchanges"].bytes == 8 * (AHEAD + BOTH)


def test_none_where_each_rank_counts_for_itself(runs: Runs) -> None:
    for rank in runs[2]:
        assert not any(made for event in rank["apart"]["made"].values() for made in event)
        assert rank["apart"]["exchanges"].times == 0


def test_none_without_a_process_group() -> None:
    assert not torch.distributed.is_initialized()
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU())
    with Noted() as noted, ns.watch(model, window_steps=2) as scope:
        for _ in range(4):
            model(torch.ones(3, WIDTH)).sum().backward()
            scope.step()
        with scope.phase("val", join=True):
            model(torch.ones(3, WIDTH))
        scope.state_dict(join=True)
    assert noted.made == []
    assert scope.census()["1"].positions == 4 * 3


def test_steps_that_have_no_room_take_another(runs: Runs) -> None:
    """Two ranks have room for 1023 steps, and a window has 1100. What is left in the end is nothing, and fits."""
    for rank in runs[2]:
        assert rank["long_window"]["made"]["window"] == [
            sums(AHEAD, BOTH, STEPS_APART),
            sums(AHEAD + BOTH, STEPS_APART),
        ]
        assert rank["long_window"]["made"]["detach"] == [sums(AHEAD + BOTH)]


def test_steps_of_a_window_that_stays_open_are_counted_from_where_it_was_looked_at(runs: Runs) -> None:
    for rank in runs[2]:
        made = rank["unsure_window"]["made"]
        assert made["window"] == [sums(AHEAD, BOTH), sums(AHEAD + BOTH), sums(AHEAD + BOTH)]


def test_a_site_that_one_rank_meets_later_is_agreed_on_once(runs: Runs) -> None:
    for rank in runs[2]:
        first, second, *later = rank["late_site"]["made"]["window"]
        assert first == sums(AHEAD, ONE)
        assert kinds(second) == NEGOTIATED
        assert [second[0], second[-1]] == sums(AHEAD + ONE, BOTH)
        assert later == [sums(AHEAD + BOTH)] * 2


def test_sites_in_another_order_are_agreed_on_once(runs: Runs) -> None:
    for rank in runs[2]:
        first, second = rank["other_order"]["made"]["window"]
        assert kinds(first) == NEGOTIATED
        assert second == sums(AHEAD + BOTH)
        assert list(rank["other_order"]["counted"]["train"]) == ["a.1", "b.1"]  # as on the first rank


def test_ranks_in_two_phases_add_up_each(runs: Runs) -> None:
    for rank in runs[2]:
        made = rank["mixed_phases"]["made"]
        for event in (*made["window"], *made["val"]):
            assert kinds(event) == [*NEGOTIATED, "allreduce_"]
        assert made["detach"] == [sums(AHEAD + BOTH)]


def test_a_rank_that_is_done_costs_no_more_than_one_that_is_not(runs: Runs) -> None:
    """It has nothing to give, hence no say in the phase: two windows, two validations and the end of the other rank."""
    goes_on, done = (rank["one_goes_on"]["made"] for rank in runs[2])
    assert [*goes_on["window"][1:], *goes_on["val"][1:], *goes_on["detach"]] == [sums(AHEAD + BOTH)] * 5
    assert done["detach"] == [sums(*[AHEAD + BOTH] * 5)]
